"""F31: COMMIT on a connection that the server has closed before is no unknown outcome: nothing was carried out."""

from __future__ import annotations

import errno

import pytest
from sqlalchemy import make_url, text
from sqlalchemy.exc import DBAPIError

from dbsession import CommitOutcomeUnknown, SessionManager
from support.drivers import EVERY_DRIVER
from support.halves import done, entered
from support.proxy import Proxy
from support.waiting import wait_until


@pytest.fixture
def stored(drivers_server, drivers_url):
    """What others see in the table `t`."""
    with drivers_server.root(make_url(drivers_url).database) as cursor:
        cursor.execute("CREATE TABLE t (n INT)")

        def read():
            cursor.execute("SELECT n FROM t ORDER BY n")
            return [row["n"] for row in cursor.fetchall()]

        yield read


@EVERY_DRIVER
@pytest.mark.parametrize("how", ["killed", "reset"])
@pytest.mark.parametrize("seen_by_the_loop", [pytest.param(True, marks=pytest.mark.slow), False])
def test_f31_commit_on_a_connection_closed_before_is_no_unknown_outcome(
    half, how, seen_by_the_loop, drivers_server, drivers_url, stored
):
    words = drivers_server.dialect

    async def main():
        with Proxy(drivers_server.port) as proxy:
            url = drivers_url
            if how == "reset":
                url = url.replace(f":{drivers_server.port}/", f":{proxy.port}/")
            manager = half.verbs.SessionManager({"default": {"url": url, "options": {"pool_size": 1}}})
            async with entered(manager.scope()) as scope:
                session = manager.get()
                number = await done(session.scalar(text(f"SELECT {words.who}")))
                await done(session.execute(text("INSERT INTO t VALUES (1)")))
                if how == "reset":
                    proxy.cut()
                else:
                    drivers_server.kill_connection(number)

                def closed(number=number):
                    return number not in [row["id"] for row in drivers_server.processlist()]

                await half.until(closed) if seen_by_the_loop else wait_until(closed, 20)
                with pytest.raises(DBAPIError) as raised:
                    await done(session.commit())
                assert not isinstance(raised.value, CommitOutcomeUnknown) and raised.value.connection_invalidated
                assert words.is_lost(raised.value)
            assert (stored(), scope.outcome) == ([], "rolled back")
            assert manager.engine().pool.checkedout() == 0
            async with entered(manager.scope()) as scope:
                await done(manager.get().execute(text("INSERT INTO t VALUES (2)")))
                await done(manager.get().commit())
            assert (stored(), scope.outcome) == ([2], "committed")
            await done(manager.dispose())

    half.run(main)


@pytest.mark.parametrize("driver", ["pymysql"], indirect=True)  # whose way of sending is replaced
@pytest.mark.parametrize(
    ("error", "unknown"),
    [
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), False),
        (TimeoutError("timed out"), False),
        (Exception("mine"), True),
    ],
    ids=["refused", "not taken in time", "another's"],
)
def test_f31_commit_that_the_socket_has_refused_is_no_unknown_outcome(mariadb_url, stored, error, unknown, monkeypatch):
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
