"""What is PostgreSQL's own: a COMMIT that is none, and a driver that was imported too early."""

from __future__ import annotations

import contextlib
import importlib

import pytest
from sqlalchemy import exc, text

from dbsession import RollbackRequired, SessionManager
from support.processes import run_python

DRIVERS = ["psycopg", "psycopg2"]


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("seen", ["by SQLAlchemy", "by nobody"])
def test_f44_commit_that_the_server_makes_a_rollback_is_an_error(postgresql_url, driver, seen):
    """After an error in a transaction PostgreSQL answers COMMIT with ROLLBACK, and with no error."""
    manager = SessionManager({"default": postgresql_url.replace("psycopg", driver)})
    with manager.scope():
        session = manager.get()
        session.execute(text("CREATE TABLE t (n int)"))
        session.commit()
    with manager.scope() as scope:
        session.execute(text("INSERT INTO t VALUES (1)"))
        if seen == "by SQLAlchemy":
            with pytest.raises(exc.DataError):
                session.execute(text("SELECT 1 / 0"))
        else:
            raw = session.connection().connection.cursor()
            with contextlib.closing(raw), pytest.raises(Exception, match="division by zero"):
                raw.execute("SELECT 1 / 0")
        with pytest.raises(RollbackRequired):
            session.commit()
    assert scope.outcome != "committed"
    with manager.scope():
        assert session.scalar(text("SELECT count(*) FROM t")) == 0
    manager.dispose()


@pytest.mark.parametrize("driver", DRIVERS)
def test_f44_savepoint_that_is_rolled_back_to_leaves_the_rest_to_be_committed(postgresql_url, driver):
    manager = SessionManager({"default": postgresql_url.replace("psycopg", driver)})
    with manager.scope() as scope:
        session = manager.get()
        session.execute(text("CREATE TABLE t (n int)"))
        with pytest.raises(exc.DataError), session.begin_nested():
            session.execute(text("SELECT 1 / 0"))
        session.execute(text("INSERT INTO t VALUES (1)"))
        session.commit()
    assert scope.outcome == "committed"
    with manager.scope():
        assert session.scalar(text("SELECT count(*) FROM t")) == 1
    manager.dispose()


@pytest.mark.parametrize("driver", DRIVERS)
def test_f46_greenlets_run_while_a_driver_waits_that_was_imported_before_the_patch(postgresql_url, driver):
    """psycopg decides at its import how it waits, and psycopg2 waits for ever unless somebody tells it otherwise."""
    run_python(
        f"""
        import {driver}
        from gevent import monkey
        monkey.patch_all()
        import gevent
        from sqlalchemy import text
        import dbsession

        dbsession.configure({{"default": {postgresql_url.replace("psycopg", driver)!r}}})
        told = gevent.event.Event()

        def wait_for_lock():
            with dbsession.session_scope():
                told.set()
                dbsession.get_dbsession().execute(text("SELECT pg_advisory_xact_lock(1)"))

        with dbsession.session_scope():
            session = dbsession.get_dbsession()
            session.execute(text("SELECT pg_advisory_xact_lock(1)"))
            waiting = gevent.spawn(wait_for_lock)
            assert told.wait(20)
            # If it stopped the loop, nobody would ever give the lock back.
            while not session.scalar(text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted")):
                gevent.sleep(0.01)
            assert not waiting.dead
            session.rollback()
        waiting.get(timeout=20)
        dbsession.dispose()
        """
    )


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("prepared", [False, True], ids=["begun", "prepared"])
def test_two_phase_transaction_that_was_left_reaches_nobody_else(postgresql, postgresql_url, driver, prepared):
    url = postgresql_url.replace("psycopg", driver)
    manager = SessionManager({"default": {"url": url, "options": {"pool_size": 1, "pool_timeout": 20}}})
    with manager.scope():
        session = manager.get()
        session.execute(text("CREATE TABLE t (n int)"))
        session.commit()
        raw = session.connection().connection.dbapi_connection
        raw.tpc_begin(raw.xid(1, "left", postgresql_url.rpartition("/")[2]))
        if prepared:
            raw.tpc_prepare()
    with manager.scope() as scope:
        session.execute(text("INSERT INTO t VALUES (1)"))
        session.commit()
    assert scope.outcome == "committed"
    with manager.scope():
        assert session.scalar(text("SELECT count(*) FROM t")) == 1
        gids = session.scalars(text("SELECT gid FROM pg_prepared_xacts WHERE database = current_database()")).all()
        assert len(gids) == prepared
        session.rollback()
        raw = session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
        for gid in gids:  # it would keep the database from being dropped
            raw.exec_driver_sql(f"ROLLBACK PREPARED '{gid}'")
    manager.dispose()


@pytest.mark.parametrize("driver", DRIVERS)
def test_stock_connection_of_a_creator_is_pinged_as_the_dialect_does(postgresql_url, driver, caplog):
    module = importlib.import_module(driver)
    dsn = postgresql_url.replace("+psycopg", "")
    entry = {"url": postgresql_url.replace("psycopg", driver), "options": {"creator": lambda: module.connect(dsn)}}
    manager = SessionManager({"default": entry})
    numbers = set()
    for _ in range(3):
        with manager.scope():
            numbers.add(manager.get().scalar(text("SELECT pg_backend_pid()")))
    assert len(numbers) == 1 and "`creator`" in caplog.text
    manager.dispose()
