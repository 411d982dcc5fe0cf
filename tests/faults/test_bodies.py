"""Scopes of requests and generators that are read on, closed or dropped by another greenlet than their own."""

from __future__ import annotations

from wsgiref.util import FileWrapper

import gevent
import pytest
from sqlalchemy import event, text

from dbsession import DBSessionMiddleware, SessionManager
from dbsession.green import scope as scopes


@pytest.fixture
def manager(tmp_path):
    manager = SessionManager({"default": {"url": f"sqlite:///{tmp_path}/a.db", "options": {"pool_size": 2}}})
    with manager.scope():
        manager.get().execute(text("CREATE TABLE t (n INTEGER)"))
        manager.get().commit()
    yield manager
    manager.clear()
    manager.dispose()


def in_use(manager):
    return manager.engine().pool.checkedout()


def fail_rollback(manager, error):
    dialect = manager.engine().dialect

    def do_rollback(connection):
        del dialect.do_rollback
        raise error

    dialect.do_rollback = do_rollback


def request(app, path="/a"):
    return DBSessionMiddleware(app)({"REQUEST_METHOD": "GET", "PATH_INFO": path}, lambda *_: None)


def test_scope_opened_in_a_lazy_body_is_suspended_with_it(manager):
    """It used to stay current between two reads: each of the two lost what it wrote."""

    def lazy(environ, start_response):
        with manager.scope("inside the body") as inside:
            mine = manager.get()()
            manager.get().execute(text("INSERT INTO t VALUES (1)"))
            yield b"1"
            assert manager.get()() is mine
            manager.get().commit()
            yield b"2"
        assert inside.ended
        assert manager.get()() is not mine
        yield b"3"

    def app(environ, start_response):
        outer = manager.get()()
        body = request(lazy)
        assert next(body) == b"1"
        assert manager.get()() is outer
        assert gevent.spawn(next, body).get() == b"2"
        assert manager.get()() is outer
        assert list(body) == [b"3"]
        early = request(lazy)
        next(early)
        early.close()  # in the middle of the inner block
        assert manager.get()() is outer
        return [b""]

    request(app)
    with manager.scope():
        assert manager.get().scalar(text("SELECT COUNT(*) FROM t")) == 1
    assert in_use(manager) == 0


def test_scope_of_a_generator_collected_in_a_stranger_is_ended_aside(manager):
    def lines():
        with manager.scope("lines"):
            manager.get().execute(text("SELECT 1"))
            yield

    def start():
        generator = lines()
        next(generator)
        return generator

    generator = gevent.spawn(start).get()
    ended_in = []
    event.listen(manager.engine(), "rollback", lambda _: ended_in.append(gevent.getcurrent()))
    gevent.sleep(0)
    generator.close()
    assert not ended_in
    gevent.sleep(0)
    gevent.sleep(0)
    assert len(ended_in) == 1 and ended_in[0] is not gevent.getcurrent() and in_use(manager) == 0


def test_body_that_another_greenlet_reads_is_not_abandoned(manager):
    reading, go, read = gevent.event.Event(), gevent.event.Event(), []

    def app(environ, start_response):
        def lines():
            yield b"1"
            reading.set()
            go.wait()
            manager.get().execute(text("SELECT 1"))
            yield b"2"

        return lines()

    def serve():
        body = request(app)
        next(body)
        reader = gevent.spawn(lambda: read.extend(body) or body.close())
        reading.wait()
        request(lambda environ, start_response: [b""], "/next")
        go.set()
        reader.get(timeout=5)

    gevent.spawn(serve).get(timeout=5)
    assert read == [b"2"] and in_use(manager) == 0


def test_kill_in_the_teardown_of_a_complete_body_still_closes_the_body(manager, tmp_path):
    file = open(tmp_path / "a.db", "rb")  # noqa: SIM115 - the wrapper closes it

    def app(environ, start_response):
        manager.get().execute(text("SELECT 1"))
        fail_rollback(manager, gevent.GreenletExit())
        return environ["wsgi.file_wrapper"](file)

    with pytest.raises(gevent.GreenletExit):
        DBSessionMiddleware(app)({"wsgi.file_wrapper": FileWrapper}, None)
    assert file.closed and in_use(manager) == 0


def test_ended_scope_left_on_a_stack_does_not_stay(manager):
    stack = scopes.stack_here()
    left = scopes.OpenedScope("GET /cut short", kind="request")
    left.end()
    stack.append(left)
    request(lambda environ, start_response: [b""])
    assert left not in stack
    assert manager.get().scalar(text("SELECT 1")) == 1


def test_label_cannot_forge_a_log_line(manager):
    labels = []

    def app(environ, start_response):
        labels.append(environ["dbsession.scope"].label)
        return [b""]

    request(app, "/a\nWARNING forged")
    request(app, "/plain/path")
    assert "\n" not in labels[0] and "forged" in labels[0] and labels[1] == "GET /plain/path"
