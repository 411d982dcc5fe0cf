"""F31: COMMIT on a connection that the server has closed before is no unknown outcome: nothing was carried out."""

from __future__ import annotations

import errno

import pytest
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from dbsession import CommitOutcomeUnknown, SessionManager
from support.halves import HALVES, done, entered
from support.proxy import Proxy
from support.waiting import wait_until

DRIVERS = {"pymysql": "gevent", "asyncmy": "aio", "aiomysql": "aio"}


@pytest.fixture
def table(mariadb, mariadb_url):
    with mariadb.root() as cursor:
        cursor.execute(f"USE `{mariadb_url.rpartition('/')[2]}`")
        cursor.execute("CREATE TABLE t (n INT) ENGINE=InnoDB")
        cursor.execute("SET autocommit = 1")
        yield cursor


def stored(cursor):
    cursor.execute("SELECT n FROM t ORDER BY n")
    return [row["n"] for row in cursor.fetchall()]


@pytest.mark.parametrize("driver", ["pymysql", "asyncmy", pytest.param("aiomysql", marks=pytest.mark.slow)])
@pytest.mark.parametrize("how", ["killed", "reset"])
@pytest.mark.parametrize("seen_by_the_loop", [pytest.param(True, marks=pytest.mark.slow), False])
def test_f31_commit_on_a_connection_closed_before_is_no_unknown_outcome(
    driver, how, seen_by_the_loop, mariadb, mariadb_url, table
):
    half = HALVES[DRIVERS[driver]]

    async def main():
        with Proxy(mariadb.port) as proxy:
            url = mariadb_url.replace("pymysql", driver)
            if how == "reset":
                url = url.replace(f":{mariadb.port}/", f":{proxy.port}/")
            manager = half.verbs.SessionManager({"default": {"url": url, "options": {"pool_size": 1}}})
            async with entered(manager.scope()) as scope:
                session = manager.get()
                number = await done(session.scalar(text("SELECT CONNECTION_ID()")))
                await done(session.execute(text("INSERT INTO t VALUES (1)")))
                if how == "reset":
                    proxy.cut()
                else:
                    table.execute(f"KILL {number}")

                def closed(number=number):
                    return number not in [row["id"] for row in mariadb.processlist()]

                await half.until(closed) if seen_by_the_loop else wait_until(closed, 20)
                with pytest.raises(OperationalError) as raised:
                    await done(session.commit())
                assert not isinstance(raised.value, CommitOutcomeUnknown) and raised.value.connection_invalidated
                assert raised.value.orig.args[0] == 2006
            assert (stored(table), scope.outcome) == ([], "rolled back")
            assert manager.engine().pool.checkedout() == 0
            async with entered(manager.scope()) as scope:
                await done(manager.get().execute(text("INSERT INTO t VALUES (2)")))
                await done(manager.get().commit())
            assert (stored(table), scope.outcome) == ([2], "committed")
            await done(manager.dispose())

    half.run(main)


@pytest.mark.parametrize(
    ("error", "unknown"),
    [
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), False),
        (TimeoutError("timed out"), False),
        (Exception("mine"), True),
    ],
    ids=["refused", "not taken in time", "another's"],
)
def test_f31_commit_that_the_socket_has_refused_is_no_unknown_outcome(mariadb_url, table, error, unknown, monkeypatch):
    manager = SessionManager({"default": mariadb_url})
    with manager.scope() as scope:
        session = manager.get()
        session.execute(text("INSERT INTO t VALUES (1)"))

        def refuse(data):
            raise error

        monkeypatch.setattr(session.connection().connection.dbapi_connection, "_send", refuse)
        with pytest.raises(Exception) as raised:
            session.commit()
        assert not isinstance(raised.value, CommitOutcomeUnknown)
    assert scope.outcome == ("unknown" if unknown else "rolled back")
    manager.dispose()
