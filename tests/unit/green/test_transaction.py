"""What run_in_transaction does in greenlets beyond the common contract (tests/contract/test_both_halves.py)."""

from __future__ import annotations

import sqlite3

import gevent
import pytest
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from dbsession import SessionManager


@pytest.fixture
def manager(tmp_path):
    manager = SessionManager({name: f"sqlite:///{tmp_path}/{name}.db" for name in ("default", "other")})
    for name in ("default", "other"):
        with manager.engine(name).begin() as connection:
            connection.execute(text("CREATE TABLE t (n INT)"))
    yield manager
    manager.clear()
    manager.dispose()


def insert(manager, n, name="default"):
    manager.get(name).execute(text("INSERT INTO t VALUES (:n)"), {"n": n})


def rows(manager, name="default"):
    with manager.engine(name).connect() as connection:
        return sorted(connection.scalars(text("SELECT n FROM t")))


def busy():
    error = sqlite3.OperationalError("database is locked")
    error.sqlite_errorcode = sqlite3.SQLITE_BUSY
    return OperationalError(None, None, error)


def test_kill_in_the_pause_ends_it(manager):
    calls = []

    def work():
        calls.append(1)
        raise busy()

    victim = gevent.spawn(manager.run_in_transaction, work, backoff_s=2.0, attempts=1000)
    while not calls:
        gevent.sleep(0)
    victim.kill(timeout=5)
    assert isinstance(victim.value, gevent.GreenletExit)
