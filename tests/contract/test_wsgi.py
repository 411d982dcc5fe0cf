"""F3, F4, F5 and the letter of PEP 3333: DBSessionMiddleware between two validators."""

from __future__ import annotations

import gc
import threading
from wsgiref.util import FileWrapper, setup_testing_defaults
from wsgiref.validate import validator

import gevent
import pytest
from sqlalchemy import text

from dbsession import DBSessionMiddleware, ScopeEnded, SessionManager
from dbsession.green import scope as scopes
from support.waiting import wait_until


@pytest.fixture
def manager(tmp_path):
    manager = SessionManager(
        {"default": {"url": f"sqlite:///{tmp_path}/a.db", "options": {"pool_size": 2, "pool_timeout": 20}}}
    )
    with manager.scope():
        manager.get().execute(text("CREATE TABLE t (n INTEGER)"))
        manager.get().commit()
    yield manager
    manager.dispose()


def environ_of(method="GET", path="/orders/7", **more):
    environ = {"REQUEST_METHOD": method, "PATH_INFO": path, "SCRIPT_NAME": "", "QUERY_STRING": "secret=1"}
    setup_testing_defaults(environ)
    return environ | more


def call(app, environ=None):
    """The body, and what start_response and write() were given."""
    seen = {"written": []}

    def start_response(status, headers, exc_info=None):
        seen.update(status=status, headers=headers, exc_info=exc_info)
        return seen["written"].append

    return app(environ if environ is not None else environ_of(), start_response), seen


def in_use(manager):
    return manager.engine().pool.checkedout()


def no_request_left():
    """Nothing on this ident but, at most, its implicit scope."""
    return not any(scope.kind == "request" for scope in scopes.stack_here())


def plain(body):
    """An application that answers with `body()`."""

    def app(environ, start_response):
        start_response("200 OK", [("Content-Type", "text/plain")])
        return body()

    return app


def query(manager, n=1):
    return str(manager.get().scalar(text(f"SELECT {n}"))).encode()


def read(body):
    try:
        return b"".join(body)
    finally:
        if hasattr(body, "close"):
            body.close()


@pytest.mark.parametrize("kind", [list, tuple])
def test_list_or_tuple_is_complete_and_passed_on_as_it_is(manager, kind):
    made = []

    def body():
        made.append(kind([query(manager)]))
        return made[0]

    environ = environ_of()
    answer, _ = call(DBSessionMiddleware(plain(body)), environ)
    assert answer is made[0] and in_use(manager) == 0 and environ["dbsession.scope"].ended


def test_validators_on_both_sides_have_nothing_to_say(manager):
    def streamed(environ, start_response):
        start_response("200 OK", [("Content-Type", "text/plain")])
        return (query(manager, n) for n in range(3))

    def written(environ, start_response):
        write = start_response("200 OK", [("Content-Type", "text/plain")])
        write(query(manager))
        return [b"2"]

    def failing(environ, start_response):
        start_response("200 OK", [("Content-Type", "text/plain")])
        try:
            raise ValueError
        except ValueError:
            import sys

            start_response("500 Oops", [("Content-Type", "text/plain")], sys.exc_info())
        return iter([b"failed"])

    for app, expected in ((streamed, b"012"), (written, b"2"), (failing, b"failed")):
        body, seen = call(validator(DBSessionMiddleware(validator(app))))
        assert read(body) == expected
        assert in_use(manager) == 0
        if app is written:
            assert seen["written"] == [b"1"]
        if app is failing:
            assert seen["status"] == "500 Oops" and seen["exc_info"] is not None


def test_f03_streamed_body_keeps_its_scope_until_close(manager):
    environ = environ_of()
    body, _ = call(DBSessionMiddleware(plain(lambda: (query(manager, n) for n in range(3)))), environ)
    assert in_use(manager) == 0
    assert next(iter(body)) == b"0" and in_use(manager) == 1
    assert list(body) == [b"1", b"2"] and in_use(manager) == 1
    assert not environ["dbsession.scope"].ended
    body.close()
    assert in_use(manager) == 0 and environ["dbsession.scope"].ended
    body.close()


def test_f03_body_without_a_close_of_its_own_keeps_its_scope_too(manager):
    body, _ = call(DBSessionMiddleware(plain(lambda: iter([query(manager)]))))
    assert in_use(manager) == 1
    assert read(body) == b"1" and in_use(manager) == 0


def test_f03_own_close_of_the_body_runs_inside_the_scope_once(manager):
    class Body:
        closed = 0

        def __iter__(self):
            return iter([b"x"])

        def close(self):
            self.closed += 1
            query(manager)
            assert in_use(manager) == 1

    made = Body()
    body, _ = call(DBSessionMiddleware(plain(lambda: made)))
    assert read(body) == b"x" and made.closed == 1 and in_use(manager) == 0
    body.close()
    assert made.closed == 1


def test_f03_error_before_the_return_ends_the_scope(manager):
    class Error(BaseException):
        pass

    def app(environ, start_response):
        query(manager)
        raise Error

    environ = environ_of()
    with pytest.raises(Error):
        call(DBSessionMiddleware(app), environ)
    assert in_use(manager) == 0 and environ["dbsession.scope"].ended and no_request_left()


def test_f03_error_in_the_middle_and_in_close_end_the_scope(manager):
    class Body:
        def __iter__(self):
            yield query(manager)
            raise ValueError("in the middle")

        def close(self):
            raise KeyError("in close")

    body, _ = call(DBSessionMiddleware(plain(Body)))
    with pytest.raises(ValueError, match="in the middle"):
        list(body)
    assert in_use(manager) == 1
    with pytest.raises(KeyError):
        body.close()
    assert in_use(manager) == 0


def test_f03_body_never_started_is_closed(manager):
    def app(environ, start_response):
        start_response("200 OK", [])
        query(manager)
        return (query(manager, n) for n in range(3))

    body, _ = call(DBSessionMiddleware(app))
    assert in_use(manager) == 1
    body.close()
    assert in_use(manager) == 0


def test_f03_body_that_is_dropped_is_closed_by_a_greenlet_of_ours(manager):
    closed_in = []

    def lines():
        try:
            yield query(manager)
            yield b"never"
        finally:
            closed_in.append((gevent.getcurrent(), query(manager)))

    gc.disable()
    try:
        body, _ = call(DBSessionMiddleware(plain(lines)))
        assert next(iter(body)) == b"1"
        gevent.sleep(0)  # there is a hub
        del body
        assert in_use(manager) == 1 and not closed_in  # not here: this might be the Hub
        gevent.sleep(0)
        gevent.sleep(0)
    finally:
        gc.enable()
    assert in_use(manager) == 0
    assert len(closed_in) == 1 and closed_in[0][0] is not gevent.getcurrent()


@pytest.mark.parametrize("run", [lambda f: gevent.spawn(f).join(), lambda f: run_thread(f)], ids=["greenlet", "thread"])
def test_scope_is_current_wherever_the_body_is_read_and_closed(manager, run):
    seen = []

    def lines():
        for _ in range(4):
            seen.append(manager.get()())
            yield b"x"

    body, _ = call(DBSessionMiddleware(plain(lines)))
    next(body)
    run(lambda: next(body))
    next(body)
    run(body.close)
    assert len(set(map(id, seen))) == 1 and len(seen) == 3
    assert no_request_left() and in_use(manager) == 0


def run_thread(function):
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


def test_f03_death_of_the_greenlet_that_called_the_app_does_not_end_the_request(manager):
    bodies = []
    app = DBSessionMiddleware(plain(lambda: (query(manager, n) for n in range(3))))

    def serve():
        body, _ = call(app)
        next(body)
        bodies.append(body)

    gevent.spawn(serve).join()
    gevent.sleep(0)
    assert in_use(manager) == 1 and list(bodies[0]) == [b"1", b"2"]
    bodies[0].close()
    assert in_use(manager) == 0


def test_f04_file_wrapper_is_passed_through_and_its_scope_ended_first(manager, tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"file")

    def app(environ, start_response):
        start_response("200 OK", [])
        query(manager)
        return environ["wsgi.file_wrapper"](path.open("rb"))

    environ = environ_of(**{"wsgi.file_wrapper": FileWrapper})
    body, _ = call(DBSessionMiddleware(app), environ)
    assert type(body) is FileWrapper and in_use(manager) == 0 and environ["dbsession.scope"].ended
    assert read(body) == b"file"


def test_gunicorns_already_handled_is_passed_through(manager):
    from gunicorn.workers.base_async import ALREADY_HANDLED

    def app(environ, start_response):
        query(manager)
        return ALREADY_HANDLED

    body, _ = call(DBSessionMiddleware(app))
    assert body is ALREADY_HANDLED and in_use(manager) == 0


def test_f05_nested_call_leaves_the_outer_transaction_alone(manager):
    inner = DBSessionMiddleware(plain(lambda: [query(manager)]))
    lazy = DBSessionMiddleware(plain(lambda: iter([query(manager)])))

    def app(environ, start_response):
        outer = manager.get()()
        outer.execute(text("INSERT INTO t VALUES (1)"))
        call(inner)
        body, _ = call(lazy)
        assert manager.get()() is outer
        assert read(body) == b"1"
        outer.execute(text("INSERT INTO t VALUES (2)"))
        outer.commit()
        start_response("200 OK", [])
        return [b""]

    call(DBSessionMiddleware(app))
    with manager.scope():
        assert manager.get().scalars(text("SELECT n FROM t ORDER BY n")).all() == [1, 2]


def test_body_complete_gives_the_connection_back_before_a_slow_reader_reads(manager):
    def app(environ, start_response):
        start_response("200 OK", [])
        body = iter([query(manager)])
        environ["dbsession.body_complete"] = True
        return body

    slow = [call(DBSessionMiddleware(app))[0] for _ in range(5)]  # over a pool of two
    assert in_use(manager) == 0
    assert [read(body) for body in slow] == [b"1"] * 5


class Finished:
    """What a framework makes of a finished body; its callbacks run in close()."""

    def __init__(self, manager):
        self.manager, self.scopes, self.closed = manager, [], 0

    def __iter__(self):
        for chunk in (b"1", b"2"):
            self.scopes.append(scopes.current())
            yield chunk

    def close(self):
        self.closed += 1
        query(self.manager)


@pytest.mark.parametrize("flag", [Finished, True])
def test_scope_is_current_while_a_complete_body_is_read_unless_its_very_class_is_named(manager, flag):
    bodies = []

    def app(environ, start_response):
        start_response("200 OK", [])
        query(manager)
        bodies.append(Finished(manager))
        environ["dbsession.body_complete"] = flag
        return bodies[-1]

    environ = environ_of()
    body, _ = call(DBSessionMiddleware(app), environ)
    assert in_use(manager) == 0
    assert list(body) == [b"1", b"2"]
    seen = [found is environ["dbsession.scope"] for found in bodies[0].scopes]
    assert seen == [flag is True] * 2
    body.close()
    body.close()
    assert bodies[0].closed == 1 and in_use(manager) == 0 and environ["dbsession.scope"].ended
    assert no_request_left()
    dropped, _ = call(DBSessionMiddleware(app), environ_of(path="/dropped"))
    del dropped
    gevent.sleep(0)
    assert bodies[1].closed == 1 and in_use(manager) == 0


def test_abandoned_request_is_ended_when_the_next_one_starts(manager, caplog):
    streaming = DBSessionMiddleware(plain(lambda: (query(manager, n) for n in range(3))))
    abandoned, _ = call(streaming)
    next(abandoned)
    assert in_use(manager) == 1
    body, _ = call(streaming, environ_of(path="/next"))
    assert in_use(manager) == 0
    warning = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warning) == 1 and "GET /orders/7" in warning[0] and "secret" not in warning[0]
    with pytest.raises(ScopeEnded):
        next(abandoned)
    abandoned.close()
    assert read(body) == b"012" and in_use(manager) == 0


def test_teardown_that_fails_changes_no_response(manager, caplog):
    engine = manager.engine()

    def do_rollback(connection):
        del engine.dialect.do_rollback
        raise RuntimeError("down")

    def app(environ, start_response):
        start_response("200 OK", [])
        query(manager)
        engine.dialect.do_rollback = do_rollback
        return [b"fine"]

    body, seen = call(DBSessionMiddleware(app))
    assert body == [b"fine"] and seen["status"] == "200 OK" and in_use(manager) == 0
    assert [record.levelname for record in caplog.records if "discarded" in record.getMessage()] == ["WARNING"]


def test_request_that_uses_no_database_checks_nothing_out(manager):
    body, _ = call(DBSessionMiddleware(plain(lambda: iter([b"x"]))))
    assert read(body) == b"x"
    assert manager.engine().pool.checkedin() <= 1 and in_use(manager) == 0


def test_streaming_leaves_nothing_on_the_ident(manager):
    app = DBSessionMiddleware(plain(lambda: iter([b"x"])))
    for _ in range(50):
        read(call(app)[0])
    current = gevent.getcurrent()
    assert no_request_left() and not getattr(current, "_dbsession_parked", [])


def test_body_dropped_without_a_hub_is_closed_by_a_thread(manager):
    def use():
        body, _ = call(DBSessionMiddleware(plain(lambda: iter([query(manager)]))))
        assert in_use(manager) == 1
        del body

    run_thread(use)
    wait_until(lambda: in_use(manager) == 0, 30)
