"""F7, F8: teardown sees to every session, whatever fails, and a kill goes on after the last one."""

from __future__ import annotations

import logging

import gevent
import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import InvalidRequestError

from dbsession import SessionManager
from dbsession.green import teardown
from support.processes import run_python

NAMES = ("a", "b", "c")


class Boom(Exception):
    """What gevent.Timeout(seconds, Boom) would raise."""


@pytest.fixture
def manager(tmp_path):
    manager = SessionManager({name: f"sqlite:///{tmp_path}/{name}.db" for name in NAMES})
    yield manager
    manager.dispose()


def fail_rollback(engine, error):
    """Make the next ROLLBACK on this engine end with `error`, once."""
    dialect = engine.dialect
    original = dialect.do_rollback

    def do_rollback(connection):
        dialect.do_rollback = original
        raise error

    dialect.do_rollback = do_rollback


def open_all(manager):
    for name in NAMES:
        manager.get(name).execute(text("SELECT 1"))
    assert [manager.engine(name).pool.checkedout() for name in NAMES] == [1, 1, 1]


def in_use(manager):
    return sum(manager.engine(name).pool.checkedout() for name in NAMES)


@pytest.mark.parametrize("failing", [("a",), ("b",), ("c",), NAMES])
def test_f07_failing_session_is_discarded_and_the_others_are_closed(manager, caplog, failing):
    with manager.scope("POST /orders"):
        before = [manager.get(name)() for name in NAMES]
        open_all(manager)
        for name in failing:
            fail_rollback(manager.engine(name), Boom("secret-value"))
        manager.clear()
        assert in_use(manager) == 0  # no garbage collection
        assert all(manager.get(name)() is not session for name, session in zip(NAMES, before, strict=True))
        open_all(manager)
    assert in_use(manager) == 0
    warnings = [record.getMessage() for record in caplog.records if record.name.startswith("dbsession")]
    assert len(warnings) == len(failing)
    assert all("POST /orders" in line and "Boom" in line and "secret" not in line for line in warnings)
    for session in before:
        with pytest.raises(InvalidRequestError):
            session.execute(text("SELECT 1"))


def test_f07_remove_of_a_failing_session_drops_it_first(manager, caplog):
    with manager.scope():
        open_all(manager)
        kept = manager.get("a")()
        fail_rollback(manager.engine("a"), Boom())
        manager.get("a").remove()
        assert manager.engine("a").pool.checkedout() == 0 and manager.get("a")() is not kept
    assert [record.levelno for record in caplog.records if record.name.startswith("dbsession")] == [logging.WARNING]


def test_f07_second_connection_of_a_session_is_given_back_too(manager):
    """SessionTransaction.close() stops at its first failing connection and has forgotten the others."""
    with manager.scope():
        session = manager.get("a")()
        for name in NAMES:
            session.execute(text("SELECT 1"), bind_arguments={"bind": manager.engine(name)})
        assert in_use(manager) == 3
        for name in NAMES:
            fail_rollback(manager.engine(name), Boom())
        manager.clear()
        assert in_use(manager) == 0


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


@pytest.mark.parametrize("kill", [gevent.GreenletExit(), gevent.Timeout(1), KeyboardInterrupt(), SystemExit(3)])
@pytest.mark.parametrize("at", NAMES)
def test_f08_kill_in_teardown_goes_on_after_the_last_session(manager, kill, at):
    with pytest.raises(type(kill)) as caught, manager.scope():
        open_all(manager)
        fail_rollback(manager.engine(at), kill)
    assert caught.value is kill
    assert in_use(manager) == 0


def test_f08_kill_goes_before_an_error(manager):
    kill = gevent.GreenletExit()
    with pytest.raises(gevent.GreenletExit) as caught, manager.scope():
        open_all(manager)
        for name, error in zip(NAMES, (Boom(), kill, Boom()), strict=True):
            fail_rollback(manager.engine(name), error)
    assert caught.value is kill and in_use(manager) == 0


def test_f08_session_that_fails_after_a_kill_is_given_up_as_well(manager, caplog):
    class Held:  # fails in its close() before that has thrown anything away
        def __init__(self, error):
            self.error, self.invalidated = error, False

        def in_transaction(self):
            return False

        def close(self):
            raise self.error

        def invalidate(self):
            self.invalidated = True

    kill = gevent.GreenletExit()
    databases = [manager.database(name) for name in NAMES]
    # Closed from the last one on.
    sessions = [Held(error) for error in (Boom(), SystemExit(), kill)]
    with pytest.raises(gevent.GreenletExit) as caught:
        teardown.close_all(dict(zip(databases, sessions, strict=True)), "a job")
    assert caught.value is kill
    assert all(session.invalidated for session in sessions)
    assert [database.stats.teardown_failures for database in databases] == [1, 1, 1]
    assert len([record for record in caplog.records if record.name == "dbsession.teardown"]) == 3


def test_f08_real_kill_at_each_switch_of_a_teardown(mariadb_url):
    """At the k-th switch to the Hub, for each k: three ROLLBACKs on a real server, in a patched process."""
    run_python(
        """
        from gevent import monkey; monkey.patch_all()
        import itertools, socket, sys
        import gevent, greenlet, dbsession
        from sqlalchemy import text
        received = socket.socket.recv_into
        def recv_into(self, *args):
            gevent.sleep(0.0001)                  # by a timer: else the answer may be there before the kill is
            return received(self, *args)
        socket.socket.recv_into = recv_into
        dbsession.configure({name: sys.argv[1] for name in "abc"})
        engines = [dbsession.get_engine(name) for name in "abc"]
        with engines[0].begin() as connection:    # without a table there is no transaction, and so no ROLLBACK
            connection.execute(text("CREATE TABLE t (n INT) ENGINE=InnoDB"))
        hub = gevent.get_hub()

        def teardown_killed_at(nth, kill):
            state = {"armed": False, "switches": 0}
            def run():
                try:
                    with dbsession.session_scope("victim"):
                        for name in "abc":
                            dbsession.get_dbsession(name).execute(text("SELECT * FROM t"))
                        state["armed"] = True
                except BaseException as error:
                    return error
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
            return state["switches"] >= nth, victim.value

        for kill in (gevent.GreenletExit(), gevent.Timeout(1)):
            for nth in itertools.count(1):
                reached, raised = teardown_killed_at(nth, kill)
                assert raised is (kill if reached else None), (nth, raised)
                assert [engine.pool.checkedout() for engine in engines] == [0, 0, 0], nth
                for name in "abc":
                    assert dbsession.get_dbsession(name).scalar(text("SELECT 2")) == 2
                dbsession.clear_dbsession()
                if not reached:
                    break
            assert nth > 3, nth                   # each session's teardown switched at least once
        """,
        mariadb_url,
    )


def test_f08_kill_in_the_log_handler_does_not_stop_teardown(tmp_path):
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


def test_clear_is_idempotent_and_needs_no_scope(manager):
    manager.clear()
    manager.get("a").execute(text("SELECT 1"))
    manager.clear()
    manager.clear()
    assert in_use(manager) == 0


def test_session_closed_by_the_user_is_dropped_from_its_scope(manager):
    with manager.scope() as scope:
        for end in ("close", "invalidate"):
            session = manager.get("a")()
            session.execute(text("SELECT 1"))
            getattr(session, end)()
            assert not scope.sessions
            assert manager.get("a").scalar(text("SELECT 1")) == 1


def test_listener_of_the_user_that_fails_at_the_end_costs_no_slot(manager):
    @event.listens_for(manager.database("a").factory, "after_transaction_end")
    def fail(session, transaction):
        raise Boom

    with manager.scope():
        open_all(manager)
    assert in_use(manager) == 0
