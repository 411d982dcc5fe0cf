"""A statement whose task was cancelled is ended at the server, and nobody else's ever is."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import event, text
from sqlalchemy.engine import make_url

from dbsession import aio
from dbsession.core.backends.mysql_kill import Thread
from support.waiting import wait_until

DRIVERS = ("asyncmy", "aiomysql")


async def until(predicate, deadline_s=30.0):
    async with asyncio.timeout(deadline_s):
        while not predicate():
            await asyncio.sleep(0.01)


async def execute(manager, statement):
    """In a task of its own, its session is its own."""
    await manager.get("default").execute(text(statement))


@pytest.mark.parametrize("driver", DRIVERS)
def test_statement_is_ended_at_the_server_when_its_task_is_cancelled(driver, mariadb, mariadb_url):
    manager = aio.SessionManager({"default": mariadb_url.replace("pymysql", driver)})

    def running():
        return [each for each in mariadb.processlist() if "SLEEP(60" in (each["info"] or "")]

    async def main():
        task = asyncio.create_task(execute(manager, "SELECT SLEEP(60)"))
        await until(running)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: not running())
        await until(lambda: manager.database("default").stats.kills == 1)
        assert await manager.get("default").scalar(text("SELECT 7")) == 7

    asyncio.run(main())
    wait_until(lambda: not mariadb.processlist(), 20, "no connection is left")


@pytest.mark.parametrize("driver", DRIVERS)
def test_statement_is_ended_at_the_server_when_the_loop_ends_with_its_task(driver, mariadb, mariadb_url):
    """asyncio.run() cancels at its end what runs, the task that says KILL, too. It waits for a row lock, for 50 s: a
    SLEEP would end by itself after 5 s, when it sees that its client has gone."""
    manager = aio.SessionManager({"default": mariadb_url.replace("pymysql", driver)})
    table = f"`{make_url(mariadb_url).database}`.t"

    def running():
        return [each for each in mariadb.processlist() if "UPDATE t" in (each["info"] or "")]

    async def main():
        async with asyncio.timeout(30) as limit:
            task = asyncio.create_task(execute(manager, "UPDATE t SET n = 2"))
            await until(running)
            limit.reschedule(0)
            await task

    with mariadb.root() as cursor:
        for statement in (f"CREATE TABLE {table} (n INT)", f"INSERT INTO {table} VALUES (1)", "BEGIN"):
            cursor.execute(statement)
        cursor.execute(f"SELECT n FROM {table} FOR UPDATE")
        with pytest.raises(TimeoutError):
            asyncio.run(main())
        wait_until(lambda: not running(), 20, "the statement has ended")


@pytest.mark.parametrize("driver", DRIVERS)
def test_another_client_is_left_alone_when_it_has_the_thread_id(driver, mariadb, mariadb_url):
    """As behind a load balancer that led the side connection to another server."""
    manager = aio.SessionManager({"default": mariadb_url.replace("pymysql", driver)})

    async def main():
        session = manager.get("default")
        other = await session.scalar(text("SELECT CONNECTION_ID()"))
        killer = manager.database("default").connections.backend._killer
        await killer._kill(manager.engine("default").sync_engine.pool, Thread(other, "10.0.0.1:4711"))
        assert await session.scalar(text("SELECT CONNECTION_ID()")) == other
        assert manager.database("default").stats.kills == 0

    asyncio.run(main())


def test_statement_is_ended_when_the_password_comes_from_a_listener(mariadb, mariadb_url, caplog):
    """As the tokens of cloud databases do, which are made for each connection."""
    url = make_url(mariadb_url.replace("pymysql", "asyncmy"))
    manager = aio.SessionManager({"default": url.set(password="another")})

    async def main():
        @event.listens_for(manager.engine().sync_engine, "do_connect")
        def give_password(dialect, record, args, arguments):
            arguments["password"] = url.password

        task = asyncio.create_task(execute(manager, "SELECT SLEEP(60)"))
        await until(lambda: any("SLEEP(60" in (each["info"] or "") for each in mariadb.processlist()))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: manager.database("default").stats.kills == 1 or caplog.records)

    asyncio.run(main())
    assert not caplog.records


def test_nothing_is_killed_when_kill_abandoned_is_off(mariadb, mariadb_url):
    url = mariadb_url.replace("pymysql", "asyncmy")
    manager = aio.SessionManager({"default": {"url": url, "kill_abandoned": False}})

    async def main():
        task = asyncio.create_task(execute(manager, "SELECT SLEEP(1)"))
        await until(lambda: any("SLEEP(1)" in (each["info"] or "") for each in mariadb.processlist()))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: not any("SLEEP(1)" in (each["info"] or "") for each in mariadb.processlist()))
        assert manager.database("default").stats.kills == 0

    asyncio.run(main())


@pytest.mark.parametrize("driver", DRIVERS)
def test_server_without_a_processlist_is_connected_to(driver, mariadb_url, monkeypatch):
    """It answers with 1109, of which the drivers make one error or another."""
    monkeypatch.setattr("dbsession.aio.mysql.kill.OWN_THREAD", "SELECT ID, HOST FROM information_schema.NO_SUCH_TABLE")
    manager = aio.SessionManager({"default": mariadb_url.replace("pymysql", driver)})

    async def main():
        assert await manager.get("default").scalar(text("SELECT 7")) == 7

    asyncio.run(main())
