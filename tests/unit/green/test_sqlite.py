"""SQLite: WAL, and waiting for the write lock without stopping the hub."""

from __future__ import annotations

import sqlite3

import gevent
import gevent.event
import pytest
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from dbsession import SessionManager


@pytest.fixture
def manager(tmp_path):
    manager = SessionManager({"default": {"url": f"sqlite:///{tmp_path}/a.db", "busy_timeout_s": 60}})
    with manager.scope():
        manager.get().execute(text("CREATE TABLE t (n INTEGER)"))
        manager.get().commit()
    yield manager
    manager.dispose()


def test_file_is_in_wal_mode(manager):
    with manager.scope():
        assert manager.get().scalar(text("PRAGMA journal_mode")) == "wal"
        assert manager.get().scalar(text("PRAGMA busy_timeout")) == 0


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


def test_writer_waits_for_the_lock_while_other_greenlets_run(manager):
    locked, ticks = gevent.event.Event(), []

    def hold():
        with manager.scope():
            manager.get().execute(text("INSERT INTO t VALUES (1)"))
            locked.set()
            while len(ticks) < 20:
                gevent.sleep(0.001)
            manager.get().commit()

    def write():
        locked.wait()
        with manager.scope():
            manager.get().execute(text("INSERT INTO t VALUES (2)"))
            manager.get().commit()
            return len(ticks)

    def tick():
        while len(ticks) < 100:
            ticks.append(1)
            gevent.sleep(0.001)

    jobs = [gevent.spawn(job) for job in (hold, write, tick)]
    gevent.joinall(jobs, timeout=60, raise_error=True)
    assert jobs[1].value >= 20


def test_many_writers_all_get_their_turn(manager):
    def write(n):
        with manager.scope():
            manager.get().execute(text("INSERT INTO t VALUES (:n)"), [{"n": n}, {"n": n}])
            gevent.sleep(0)
            manager.get().commit()

    for _ in range(5):
        jobs = [gevent.spawn(write, n) for n in range(20)]  # the pool's size: unpatched, waiting there stops the hub
        gevent.joinall(jobs, timeout=60, raise_error=True)
    with manager.scope():
        assert manager.get().scalar(text("SELECT COUNT(*) FROM t")) == 200


def test_statement_gives_up_after_busy_timeout(tmp_path):
    manager = SessionManager({"default": {"url": f"sqlite:///{tmp_path}/a.db", "busy_timeout_s": 0.05}})
    with manager.scope():
        manager.get().execute(text("CREATE TABLE t (n INTEGER)"))
        manager.get().execute(text("INSERT INTO t VALUES (1)"))
        with manager.scope(), pytest.raises(OperationalError, match="locked"):
            manager.get().execute(text("INSERT INTO t VALUES (2)"))
        manager.get().commit()
    with manager.scope():
        assert manager.get().scalars(text("SELECT n FROM t")).all() == [1]
    manager.dispose()


def test_stale_snapshot_is_not_retried(manager):
    """SQLITE_BUSY_SNAPSHOT: what the transaction read is no longer true, and waiting cannot make it so."""
    with manager.scope():
        first = manager.get().connection().connection.dbapi_connection
        first.execute("BEGIN")
        assert first.execute("SELECT COUNT(*) FROM t").fetchone() == (0,)
        with manager.scope():
            manager.get().execute(text("INSERT INTO t VALUES (1)"))
            manager.get().commit()
        with pytest.raises(sqlite3.OperationalError) as caught:
            first.cursor().execute("INSERT INTO t VALUES (2)")
        assert caught.value.sqlite_errorcode == sqlite3.SQLITE_BUSY_SNAPSHOT


def test_users_own_connect_args_come_first(tmp_path):
    manager = SessionManager(
        {"default": {"url": f"sqlite:///{tmp_path}/a.db", "options": {"connect_args": {"timeout": 1.5}}}}
    )
    with manager.scope():
        assert manager.get().scalar(text("PRAGMA busy_timeout")) == 1500
    manager.dispose()


def test_writers_stand_in_line_and_nobody_overtakes(manager):
    """The lock is held while they queue up; a newcomer that comes as it is released goes to the end."""
    got, locked = [], gevent.event.Event()

    def hold():
        with manager.scope():
            manager.get().execute(text("INSERT INTO t VALUES (0)"))
            locked.set()
            while len(manager.database("default")._connections.backend.queue) < 10:
                gevent.sleep(0.001)
            manager.get().commit()

    def write(n):
        locked.wait()
        with manager.scope():
            manager.get().execute(text("INSERT INTO t VALUES (:n)"), {"n": n})
            got.append(n)
            gevent.spawn(late, n)
            gevent.sleep(0)
            manager.get().commit()

    def late(n):
        with manager.scope():
            manager.get().execute(text("INSERT INTO t VALUES (:n)"), {"n": 100 + n})
            got.append(100 + n)
            manager.get().commit()
            finished.append(n)

    finished = []
    jobs = [gevent.spawn(hold)] + [gevent.spawn(write, n) for n in range(10)]
    gevent.joinall(jobs, timeout=60, raise_error=True)
    while len(finished) < 10:
        gevent.sleep(0.001)
    assert got[:10] == list(range(10))
    assert not manager.database("default")._connections.backend.queue


def test_killed_writer_leaves_the_line(manager):
    with manager.scope():
        manager.get().execute(text("INSERT INTO t VALUES (1)"))

        def write():
            with manager.scope():
                manager.get().execute(text("INSERT INTO t VALUES (2)"))

        jobs = [gevent.spawn(write) for _ in range(5)]
        with gevent.Timeout(20):
            while len(manager.database("default")._connections.backend.queue) < 5:
                gevent.sleep(0.001)
        gevent.killall(jobs, timeout=5)
        assert not manager.database("default")._connections.backend.queue
        manager.get().commit()


def test_read_only_database_refuses_a_write_and_holds_no_lock(tmp_path):
    url = f"sqlite:///{tmp_path}/a.db"
    manager = SessionManager({"default": url, "replica": {"url": url, "readonly": True}})
    with manager.engine().begin() as connection:
        connection.execute(text("CREATE TABLE t (n INT)"))
    with manager.scope():
        assert manager.get("replica").scalar(text("SELECT count(*) FROM t")) == 0
        with manager.engine().begin() as connection:
            connection.execute(text("INSERT INTO t VALUES (1)"))
        assert manager.get("replica").scalar(text("SELECT count(*) FROM t")) == 1  # no snapshot is kept
        with pytest.raises(OperationalError, match="readonly"):
            manager.get("replica").execute(text("INSERT INTO t VALUES (2)"))
    manager.dispose()
