"""Faults that a review found, each once reproduced against the code before its fix."""

from __future__ import annotations

import gc
import logging
import os
from wsgiref.util import FileWrapper

import gevent
import gevent.event
import greenlet
import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.orm import Session
from sqlalchemy.pool import StaticPool

from dbsession import ConfigError, DBSessionMiddleware, SessionManager, UnknownDatabase
from dbsession.core import session as sessions
from dbsession.core import sql
from dbsession.green import block, hub
from dbsession.green import scope as scopes
from support.processes import run_python


class Boom(Exception):
    pass


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


@pytest.mark.parametrize("how", ["close", "reset", "with"])
def test_users_own_close_that_fails_costs_no_slot(manager, how):
    with manager.scope():
        session = manager.get()()
        session.execute(text("SELECT 1"))
        fail_rollback(manager, Boom())
        with pytest.raises(Boom):
            if how == "with":
                with session:
                    pass
            else:
                getattr(session, how)()
        assert in_use(manager) == 0
    assert in_use(manager) == 0 and not sessions._pinned


def test_collector_never_rolls_back_in_a_stranger(manager):
    """A raw greenlet in a reference cycle: SQLAlchemy's finalizer would come before our own."""
    gevent.sleep(0)
    rolled_back_in = []
    event.listen(manager.engine(), "checkin", lambda *_: rolled_back_in.append(gevent.getcurrent()))

    def use():
        manager.get().execute(text("SELECT 1"))

    raw = greenlet.greenlet(use)
    raw.itself = raw
    raw.switch()
    del raw
    assert in_use(manager) == 1
    gc.collect()
    assert not rolled_back_in
    gevent.sleep(0)
    gevent.sleep(0)
    assert len(rolled_back_in) == 1 and rolled_back_in[0] is not gevent.getcurrent()
    assert in_use(manager) == 0 and not sessions._pinned


def test_nothing_stays_pinned_after_commit_rollback_savepoint_or_release(manager):
    session = manager.get()
    for end in (session.commit, session.rollback, manager.release, manager.clear):
        session.execute(text("SELECT 1"))
        with session.begin_nested():
            session.execute(text("SELECT 2"))
        assert len(sessions._pinned) == 1
        end()
        assert not sessions._pinned and in_use(manager) == 0


def test_fork_after_configure_leaves_the_old_engines_transaction_alone(mariadb_url):
    run_python(
        """
        import os, sys
        import dbsession
        from sqlalchemy import text
        dbsession.configure({"default": sys.argv[1]})
        session = dbsession.get_dbsession()
        session.execute(text("CREATE TABLE t (n INTEGER)"))
        session.commit()
        session.execute(text("INSERT INTO t VALUES (1)"))
        dbsession.configure({"default": sys.argv[1]})
        pid = os.fork()
        if pid == 0:
            dbsession.clear_dbsession()
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        session.commit()
        assert session.scalar(text("SELECT COUNT(*) FROM t")) == 1
        """,
        mariadb_url,
    )


def in_child(check):
    """Run check() in a forked child; whether it returned a true value."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            status = 0 if check() else 1
        finally:
            os._exit(status)
    return os.waitpid(pid, 0)[1] == 0


def test_session_listeners_and_settings_survive_a_fork(manager):
    seen = []
    event.listen(manager.get(), "after_begin", lambda *_: seen.append(1))
    manager.get().configure(info={"set": "before"})

    def check():
        with manager.scope():
            manager.get().execute(text("SELECT 1"))
            return seen and manager.get().info == {"set": "before"}

    assert in_child(check)


def test_fork_leaves_an_in_memory_database_of_the_parent_alone():
    manager = SessionManager({"default": {"url": "sqlite://", "options": {"poolclass": StaticPool}}})
    with manager.scope():
        manager.get().execute(text("CREATE TABLE t (n INTEGER)"))
        manager.get().commit()
    assert in_child(lambda: True)
    with manager.scope():
        assert manager.get().scalar(text("SELECT COUNT(*) FROM t")) == 0
    manager.dispose()


def test_fork_without_a_free_descriptor_still_abandons(mariadb_url):
    run_python(
        """
        import os, resource, sys
        import dbsession
        from sqlalchemy import text
        dbsession.configure({"default": sys.argv[1]})
        session = dbsession.get_dbsession()
        thread = session.scalar(text("SELECT CONNECTION_ID()"))
        opened = []
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        while True:
            try:
                opened.append(os.open("/dev/null", os.O_RDONLY))
            except OSError:
                break
        pid = os.fork()
        if pid == 0:
            for descriptor in opened:
                os.close(descriptor)
            os._exit(0 if session.scalar(text("SELECT CONNECTION_ID()")) != thread else 1)
        assert os.waitpid(pid, 0)[1] == 0
        assert session.scalar(text("SELECT CONNECTION_ID()")) == thread
        """,
        mariadb_url,
    )


def test_writer_that_waits_for_sqlites_lock_does_not_write_in_a_child(tmp_path):
    run_python(
        """
        from gevent import monkey; monkey.patch_all()
        import os, sqlite3, sys
        import gevent, dbsession
        from sqlalchemy import text
        path = f"{sys.argv[1]}/a.db"
        dbsession.configure({"default": {"url": f"sqlite:///{path}", "busy_timeout_s": 60}})
        session = dbsession.get_dbsession()
        with dbsession.session_scope():
            session.execute(text("CREATE TABLE t (n INTEGER)"))
            session.commit()
        holder = sqlite3.connect(path)
        holder.execute("BEGIN IMMEDIATE")
        failures = []
        def write():
            with dbsession.session_scope():
                try:
                    session.execute(text("INSERT INTO t VALUES (1)"))
                    session.commit()
                except BaseException as error:
                    failures.append(error)
                    raise
        job = gevent.spawn(write)
        gevent.sleep(0.01)
        pid = os.fork()
        if pid == 0:
            job.join(20)
            os._exit(0 if failures and "fork" in str(failures[0]) else 1)
        assert os.waitpid(pid, 0)[1] == 0
        holder.rollback()
        job.join(20)
        assert not failures and session.scalar(text("SELECT COUNT(*) FROM t")) == 1
        """,
        tmp_path,
    )


def test_dispose_with_waiters_does_not_multiply_connections(tmp_path):
    run_python(
        """
        from gevent import monkey; monkey.patch_all()
        import sys
        import gevent, gevent.event, dbsession
        from sqlalchemy import event, text
        from support.waiting import wait_until
        dbsession.configure({"default": {"url": f"sqlite:///{sys.argv[1]}/a.db", "options": {"pool_size": 2}}})
        engine, opened = dbsession.get_engine(), set()
        event.listen(engine, "connect", lambda connection, _: opened.add(connection))
        event.listen(engine, "close", lambda connection, _: opened.discard(connection))
        def use():
            with dbsession.session_scope():
                dbsession.get_dbsession().execute(text("SELECT 1"))
                go_on.wait(20)
        for _ in range(3):
            go_on = gevent.event.Event()
            jobs = [gevent.spawn(use) for _ in range(6)]
            wait_until(lambda: engine.pool.waiting() == 4, 20)
            dbsession.dispose()
            go_on.set()
            gevent.joinall(jobs, timeout=20, raise_error=True)
        assert len(opened) <= 2, opened
        dbsession.dispose()
        assert not opened
        """,
        tmp_path,
    )


def test_release_on_a_lost_connection_rolls_back(manager):
    session = manager.get()
    session.execute(text("SELECT 1"))
    session.connection().invalidate()
    manager.release()
    assert in_use(manager) == 0 and session.scalar(text("SELECT 1")) == 1


def test_session_whose_close_only_resets_stays_in_its_scope(tmp_path):
    manager = SessionManager({"default": {"url": f"sqlite:///{tmp_path}/a.db", "session": {"close_resets_only": True}}})
    with manager.scope():
        session = manager.get()()
        session.close()
        session.execute(text("SELECT 1"))
        assert manager.get()() is session and in_use(manager) == 1
    assert in_use(manager) == 0
    manager.dispose()


def test_engine_built_during_a_configure_is_the_new_one_and_the_old_is_closed(tmp_path):
    building, go = gevent.event.Event(), gevent.event.Event()

    def find(name):
        building.set()
        go.wait()
        return f"sqlite:///{tmp_path}/old.db"

    manager = SessionManager(find)
    job = gevent.spawn(manager.engine)
    building.wait()
    manager.configure({"default": f"sqlite:///{tmp_path}/new.db"})
    go.set()
    assert job.get(timeout=5) is manager.engine()


def test_kill_in_the_log_handler_does_not_stop_teardown(tmp_path):
    manager = SessionManager({name: f"sqlite:///{tmp_path}/{name}.db" for name in "abc"})
    kill = gevent.GreenletExit()

    class Handler(logging.Handler):
        def emit(self, record):
            raise kill

    handler = Handler()
    logging.getLogger("dbsession.teardown").addHandler(handler)
    try:
        with pytest.raises(gevent.GreenletExit), manager.scope():
            for name in "abc":
                manager.get(name).execute(text("SELECT 1"))
            dialect = manager.engine("c").dialect

            def do_rollback(connection):
                del dialect.do_rollback
                raise Boom

            dialect.do_rollback = do_rollback
    finally:
        logging.getLogger("dbsession.teardown").removeHandler(handler)
    assert [manager.engine(name).pool.checkedout() for name in "abc"] == [0, 0, 0]
    manager.dispose()


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


def test_label_cannot_forge_a_log_line(manager):
    labels = []

    def app(environ, start_response):
        labels.append(environ["dbsession.scope"].label)
        return [b""]

    request(app, "/a\nWARNING forged")
    request(app, "/plain/path")
    assert "\n" not in labels[0] and "forged" in labels[0] and labels[1] == "GET /plain/path"


def test_statement_of_many_comments_is_classified_at_once():
    assert sql._reading_verb("/**/" * 48 + "INSERT") == ""
    assert sql._reading_verb("/**/" * 40 + "SELECT 1") == "select"


def test_read_only_file_can_be_opened(tmp_path):
    path = tmp_path / "a.db"
    writable = SessionManager({"default": f"sqlite:///{path}"})
    with writable.scope():
        writable.get().execute(text("CREATE TABLE t (n INTEGER)"))
        writable.get().execute(text("PRAGMA journal_mode=DELETE"))
    writable.dispose()
    manager = SessionManager({"default": f"sqlite:///file:{path}?mode=ro&uri=true"})
    with manager.scope():
        assert manager.get().scalar(text("SELECT COUNT(*) FROM t")) == 0
    manager.dispose()


def test_registry_set_closes_what_it_replaces(manager):
    registry = manager.get().registry
    manager.get().execute(text("SELECT 1"))
    replacement = manager.get().session_factory()
    registry.set(replacement)
    assert in_use(manager) == 0 and manager.get()() is replacement


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
    left = scopes.Scope("GET /cut short", kind="request")
    left.end()
    stack.append(left)
    request(lambda environ, start_response: [b""])
    assert left not in stack
    assert manager.get().scalar(text("SELECT 1")) == 1


def test_write_under_autocommit_is_no_unsaved_work(tmp_path):
    manager = SessionManager(
        {"default": {"url": f"sqlite:///{tmp_path}/a.db", "options": {"isolation_level": "AUTOCOMMIT"}}}
    )
    with manager.scope():
        manager.get().execute(text("CREATE TABLE t (n INTEGER)"))
        manager.release()
        manager.get().execute(text("INSERT INTO t VALUES (1)"))
        manager.release()
        assert manager.get().scalar(text("SELECT COUNT(*) FROM t")) == 1
    manager.dispose()


def test_waiter_whose_hub_is_gone_stops_no_other_waiter():
    import threading

    made = []

    def in_thread():
        gevent.sleep(0)
        made.append(hub.Waiter())
        gevent.get_hub().destroy(destroy_loop=True)

    thread = threading.Thread(target=in_thread)
    thread.start()
    thread.join()
    made[0].wake()


def test_reconfiguring_a_name_away_lets_its_transaction_finish(tmp_path):
    urls = {name: f"sqlite:///{tmp_path}/{name}.db" for name in ("default", "other")}
    manager = SessionManager(urls)
    session = manager.get("other")
    session.execute(text("CREATE TABLE t (n INTEGER)"))
    session.execute(text("INSERT INTO t VALUES (1)"))
    manager.configure({"default": urls["default"]})
    session.execute(text("INSERT INTO t VALUES (2)"))
    session.commit()
    with pytest.raises(UnknownDatabase):
        session.execute(text("SELECT 1"))
    manager.clear()
    manager.configure(urls)
    assert session.scalar(text("SELECT COUNT(*) FROM t")) == 2
    manager.clear()
    manager.dispose()


def test_foreign_session_set_in_the_registry_is_closed_like_any_other(manager):
    with manager.scope():
        manager.get().registry.set(Session(manager.engine()))
        manager.get().execute(text("SELECT 1"))
        manager.get().remove()
        manager.get().registry.set(Session(manager.engine()))
        manager.get().execute(text("SELECT 1"))
    assert in_use(manager) == 0


def test_secret_in_the_wrong_place_of_a_configuration_is_not_shown():
    url = "mysql+pymysql://u:s3cret@h/db"
    for databases in (
        {url: "orders"},
        {"orders": {url: "x"}},
        {"orders": {"url": "sqlite:///a.db", "options": {"echo": "s3cret"}}},
        {"orders": {"url": "sqlite:///a.db", "options": {url: 1}}},
        {"orders": "my@s3cret://h/db"},
    ):
        with pytest.raises(ConfigError) as caught:
            SessionManager(databases)
        assert "s3cret" not in str(caught.value), caught.value


def test_session_scope_refuses_to_decorate_a_generator():
    for make in ("def f(): yield", "async def f(): pass"):
        names = {}
        exec(make, names)
        with pytest.raises(TypeError, match="session_scope"):
            block.session_scope()(names["f"])


def test_close_that_somebody_put_in_place_of_ours_costs_no_slot(manager):
    def fail():
        raise Boom

    with manager.scope():
        session = manager.get()()
        session.execute(text("SELECT 1"))
        session.close = fail
    assert in_use(manager) == 0
    with pytest.raises(InvalidRequestError):
        session.execute(text("SELECT 1"))
