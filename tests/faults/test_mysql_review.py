"""What an independent reading of the MySQL half found, each reproduced before it was put right."""

from __future__ import annotations

import contextlib
import gc
import warnings
import weakref

import pymysql
import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import OperationalError

from dbsession import CommitOutcomeUnknown, RollbackRequired, SessionManager
from dbsession.core.connection_info import COMMITTING
from support.processes import run_python
from support.proxy import Proxy
from support.waiting import wait_until

DEADLOCK = "SIGNAL SQLSTATE '40001' SET MYSQL_ERRNO = 1213, MESSAGE_TEXT = 'Deadlock found'"


@pytest.fixture
def managed(managed):
    """The same, with a table and a procedure that ends in a deadlock."""
    with managed().engine().begin() as connection:
        connection.execute(text("CREATE TABLE t (n INT) ENGINE=InnoDB"))
        connection.execute(text(f"CREATE PROCEDURE deadlock() {DEADLOCK}"))
    return managed


def insert(manager):
    manager.get().execute(text("INSERT INTO t VALUES (1)"))


def rows(manager):
    with manager.engine().connect() as connection:
        return connection.scalar(text("SELECT count(*) FROM t"))


@pytest.mark.slow
def test_f18_xa_commit_without_an_answer_is_an_outcome_unknown(mariadb, mariadb_url, managed):
    managed()
    with Proxy(mariadb.port) as proxy:
        url = mariadb_url.replace(f":{mariadb.port}/", f":{proxy.port}/")
        manager = SessionManager({"default": {"url": url, "session": {"twophase": True}, "read_timeout_s": 3}})
        with manager.scope() as scope:
            insert(manager)
            manager.get()().prepare()
            proxy.stall("to_client")
            with pytest.raises(CommitOutcomeUnknown):
                manager.get().commit()
            proxy.resume()
        assert scope.outcome == "unknown"
        manager.dispose()
    direct = managed()
    wait_until(lambda: rows(direct) == 1, 20)


def test_unit_that_committed_by_itself_is_not_run_again(managed):
    manager = managed()
    runs = []

    def work():
        runs.append(1)
        insert(manager)
        manager.get().commit()
        manager.get().execute(text("CALL deadlock()"))

    with pytest.raises(OperationalError):
        manager.run_in_transaction(work, attempts=3, backoff_s=0.001)
    assert len(runs) == 1 and rows(manager) == 1


def test_generator_function_is_refused_by_the_function_too(managed):
    def work():
        yield

    with pytest.raises(TypeError, match="after its call"):
        managed().run_in_transaction(work)


def test_f16_refused_commit_keeps_nothing_alive_and_rolls_back(managed, mariadb):
    manager = managed()
    with manager.scope():
        insert(manager)
        with pytest.raises(OperationalError):
            manager.get().execute(text("CALL deadlock()"))
        with pytest.raises(RollbackRequired):
            manager.get().commit()
        session = weakref.ref(manager.get()())
    gc.collect()
    assert session() is None and rows(manager) == 0
    with manager.engine().connect() as connection:
        mine = connection.scalar(text("SELECT CONNECTION_ID()"))
        connection.rollback()
        insert_ = text("INSERT INTO t VALUES (1)")
        connection.execute(insert_)
        with pytest.raises(OperationalError):
            connection.execute(text("CALL deadlock()"))
        with pytest.raises(RollbackRequired):
            connection.commit()
        with mariadb.root() as cursor:
            cursor.execute("SELECT 1 FROM information_schema.innodb_trx WHERE trx_mysql_thread_id = %s", (mine,))
            assert cursor.fetchall() == ()
        connection.rollback()
        connection.execute(insert_)
        connection.commit()
    assert rows(manager) == 1


def test_f16_error_in_a_savepoint_arrives_as_it_is(managed):
    manager = managed()
    with manager.scope():
        insert(manager)
        with pytest.raises(OperationalError, match="1213"), manager.get().begin_nested():
            manager.get().execute(text("CALL deadlock()"))
        with pytest.raises(RollbackRequired):
            manager.get().execute(text("SELECT 1"))


def test_listener_of_do_connect_may_change_the_arguments(managed):
    """The recipe for passwords that rotate."""
    manager = managed()

    @event.listens_for(manager.engine(), "do_connect")
    def changed(dialect, record, args, arguments):
        arguments["init_command"] = "SET @w = 7"

    with manager.scope():
        assert manager.get().scalar(text("SELECT @w")) == 7


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_set_transaction_does_not_reach_the_next_user(managed, end):
    manager = managed()
    with manager.scope():
        manager.get().execute(text("SET TRANSACTION READ ONLY"))
        getattr(manager.get(), end)()
    with manager.scope():
        insert(manager)
        manager.get().commit()
    assert rows(manager) == 1


def test_stream_that_another_statement_cuts_short_is_warned_about(managed):
    manager = managed()
    with manager.scope():
        stream = manager.get().execute(
            text("SELECT seq FROM seq_1_to_5000"), execution_options={"stream_results": True, "max_row_buffer": 1}
        )
        stream.fetchone()
        with pytest.warns(UserWarning, match="left incomplete"):
            manager.get().execute(text("SELECT 1"))
    with manager.scope(), warnings.catch_warnings():
        warnings.simplefilter("error")
        stream = manager.get().execute(text("SELECT seq FROM seq_1_to_9"), execution_options={"stream_results": True})
        stream.close()
        manager.get().execute(text("SELECT 1"))


def test_core_connection_goes_on_after_the_rollback_of_an_unread_stream(managed):
    manager = managed()
    with manager.engine().connect() as connection:
        stream = connection.execution_options(stream_results=True).execute(text("SELECT seq FROM seq_1_to_1000000"))
        stream.fetchone()
        connection.rollback()
        assert connection.scalar(text("SELECT 7")) == 7


def test_read_timeout_of_a_scope_leaves_the_users_own_connection_as_it_was(managed):
    manager = managed()
    with manager.engine().connect() as connection, manager.scope(read_timeout_s=300):
        session = manager.get()()
        session.bind = connection
        for _ in range(2):
            session.execute(text("SELECT 1"))
            session.commit()
        driver = connection.connection.dbapi_connection
        session.close()
        assert driver._read_timeout == 60


@pytest.mark.slow
def test_threadpool_jobs_do_not_wedge_the_pool_or_the_killing(mariadb_url):
    """A job's hub does not run on when the job is over: nothing of ours may wait in it."""
    run_python(
        """
        from gevent import monkey; monkey.patch_all()
        import sys, gevent, gevent.threadpool, dbsession
        from sqlalchemy import text
        from support.waiting import wait_until
        dbsession.configure({"default": {"url": sys.argv[1], "reset": "connection", "options":
            {"pool_size": 2, "pool_timeout": 10}}})
        session, engine = dbsession.get_dbsession(), dbsession.get_engine()
        def job(n):
            with dbsession.session_scope():
                return session.scalar(text("SELECT :n"), {"n": n})
        def abandoned():
            with dbsession.session_scope():
                session.execute(text("SELECT SLEEP(30)"))
        def killed_job():
            try:
                with gevent.Timeout(0.3):
                    abandoned()
            except gevent.Timeout:
                return "ended"
        pool = gevent.threadpool.ThreadPool(1)
        assert [pool.spawn(job, n).get() for n in range(5)] == list(range(5))
        assert gevent.spawn(job, 6).get() == 6
        assert pool.spawn(killed_job).get() == "ended"
        assert gevent.spawn(job, 7).get() == 7
        victim = gevent.spawn(abandoned)
        running = "SELECT count(*) FROM information_schema.processlist WHERE info LIKE 'SELECT SLEEP%'"
        def sleeping():
            with dbsession.session_scope():
                return session.scalar(text(running))
        wait_until(lambda: gevent.spawn(sleeping).get() == 1, 20)
        victim.kill()
        wait_until(lambda: gevent.spawn(sleeping).get() == 0, 10)
        wait_until(lambda: engine.pool.checkedout() == 0 and not engine.pool._being_cleaned, 10)

        # The threads of ours that end the statements leave none of their hubs' descriptors behind.
        import os
        from dbsession.green.mysql import kill
        def open_files():
            kill.finish(10)
            return len(os.listdir("/proc/self/fd"))
        before = open_files()
        for _ in range(10):
            assert pool.spawn(killed_job).get() == "ended"
        wait_until(lambda: open_files() <= before + 3, 10)
        """,
        mariadb_url,
    )


def test_session_scope_object_cannot_be_open_twice(managed):
    block = managed().scope()
    with block, pytest.raises(RuntimeError, match="open already"):
        block.__enter__()
    with block:
        pass


def test_f07_kill_while_an_isolation_level_is_taken_back_costs_no_place(mariadb_url):
    """SQLAlchemy does that in the middle of a connection's return, and forgets the place if it fails."""
    run_python(
        """
        from gevent import monkey; monkey.patch_all()
        import itertools, socket, sys
        import gevent, greenlet, dbsession
        from sqlalchemy import text
        from support.waiting import wait_until
        received = socket.socket.recv_into
        def recv_into(self, *args):
            gevent.sleep(0.0001)                  # by a timer: else the answer may be there before the kill is
            return received(self, *args)
        socket.socket.recv_into = recv_into
        dbsession.configure({"default": sys.argv[1]})
        session, engine, hub = dbsession.get_dbsession(), dbsession.get_engine(), gevent.get_hub()
        levels = set()

        def teardown_killed_at(nth, kill):
            state = {"armed": False, "switches": 0}
            def run():
                try:
                    with dbsession.session_scope("victim"):
                        options = {"isolation_level": "SERIALIZABLE"}
                        session.connection(execution_options=options).execute(text("CREATE TEMPORARY TABLE t (n INT)"))
                        state["armed"] = True
                except BaseException as error:
                    return repr(error)
                finally:
                    state["armed"] = False
            def trace(_, switch):
                if state["armed"] and switch == (victim, hub):
                    state["switches"] += 1
                    if state["switches"] == nth:
                        hub.loop.run_callback(victim.throw, kill)
            victim = gevent.spawn(run)
            greenlet.settrace(trace)
            victim.join(20)
            greenlet.settrace(None)
            assert victim.dead
            return state["switches"] >= nth

        for kill in (gevent.GreenletExit(), gevent.Timeout(1), ValueError("own")):
            for nth in itertools.count(1):
                reached = teardown_killed_at(nth, kill)
                wait_until(lambda: engine.pool.checkedout() == 0, 20)
                wait_until(lambda: not engine.pool._being_cleaned, 20)
                with dbsession.session_scope():
                    assert session.scalar(text("SELECT @@tx_isolation")) == "REPEATABLE-READ", nth
                    session.execute(text("DROP TEMPORARY TABLE IF EXISTS t"))
                if not reached:
                    break
        """,
        mariadb_url,
    )


def test_stock_connection_of_a_do_connect_listener_is_rolled_back_before_the_next_user(managed):
    manager = managed()
    manager.dispose()
    event.listen(manager.engine(), "do_connect", lambda d, r, args, arguments: pymysql.connect(*args, **arguments))
    raw = manager.engine().raw_connection()
    raw.cursor().execute("INSERT INTO t VALUES (1)")
    raw.close()
    with manager.scope():
        assert manager.get().scalar(text("SELECT count(*) FROM t")) == 0


def test_f16_every_way_to_execute_on_every_engine_of_the_dialect_is_refused(managed):
    manager = managed()
    with manager.engine().execution_options(logging_token="copy").connect() as connection:
        connection.exec_driver_sql("CREATE TABLE w (n INT)")
        with pytest.raises(OperationalError, match="1213"):
            connection.execute(text(DEADLOCK))
        plain = connection.execution_options(no_parameters=True)
        for refused in (
            lambda: connection.execute(text("SELECT 1")),
            lambda: connection.execute(text("INSERT INTO w VALUES (:n)"), [{"n": 1}, {"n": 2}]),
            lambda: plain.exec_driver_sql("SELECT '%'"),
            connection.commit,
        ):
            with pytest.raises(RollbackRequired):
                refused()
        connection.rollback()
        assert connection.scalar(text("SELECT COUNT(*) FROM w")) == 0
        connection.exec_driver_sql("INSERT INTO w VALUES (1)")
        connection.commit()


@pytest.mark.parametrize("answer", ["DO 0", "SIGNAL SQLSTATE '45000'"])
def test_f18_commit_is_under_way_until_its_answer_is_judged_and_no_longer(managed, monkeypatch, answer):
    """Else an error in the next transaction on that Connection, of a fetch say, would leave a commit in doubt."""
    with managed().engine().connect() as connection:
        connection.execute(text("SELECT 1"))
        driver = connection.connection.dbapi_connection
        monkeypatch.setattr(driver, "commit", lambda: driver.query(answer))
        with contextlib.suppress(OperationalError):
            connection.commit()
        assert connection.info and COMMITTING not in connection.info
