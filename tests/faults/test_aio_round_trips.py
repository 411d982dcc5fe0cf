"""What dbsession.aio leaves out of what SQLAlchemy sends, and what it must not leave out. With both drivers, on both
loops."""

from __future__ import annotations

import asyncio

import aiosqlite
import pytest
import uvloop
from sqlalchemy import exc, text

from dbsession import aio
from dbsession.aio.mysql.connection import transport_of
from support.aio_sweep import until
from support.proxy import Proxy
from support.waiting import wait_until

PINGS = "Com_admin_commands"  # COM_PINGs: they are no questions
ROWS = text("SELECT n FROM t ORDER BY id")


@pytest.fixture(params=["asyncmy", "aiomysql"])
def url(mariadb_url, mariadb, request):
    with mariadb.root() as cursor:
        table = f"`{mariadb_url.rpartition('/')[2]}`.t"
        cursor.execute(f"CREATE TABLE {table} (id INT PRIMARY KEY, n INT) ENGINE=InnoDB")
        cursor.execute(f"INSERT INTO {table} VALUES (1, 1), (2, 2)")
    return mariadb_url.replace("pymysql", request.param)


UVLOOP = pytest.param(uvloop.new_event_loop, id="uvloop", marks=pytest.mark.slow)


@pytest.fixture(params=[pytest.param(asyncio.new_event_loop, id="asyncio"), UVLOOP])
def run(request):
    """Runs an async function, and ends its engines."""

    def in_a_loop(work):
        async def within():
            async with asyncio.timeout(60):
                try:
                    await work()
                finally:
                    await aio.dispose()

        with asyncio.Runner(loop_factory=request.param) as runner:
            runner.run(within())

    return in_a_loop


def managed(url, **entry):
    return aio.SessionManager({"default": {"url": url, "options": {"pool_size": 1, "pool_timeout": 5}, **entry}})


async def number_of(manager):
    async with manager.scope():
        return await manager.get().scalar(text("SELECT CONNECTION_ID()"))


async def read(manager):
    async with manager.scope():
        return (await manager.get().scalars(ROWS)).all()


async def write(manager):
    async with manager.scope():
        await manager.get().execute(text("UPDATE t SET n = n"))
        await manager.get().commit()


async def write_and_throw_away(manager):
    async with manager.scope():
        await manager.get().execute(text("UPDATE t SET n = 0"))
        await manager.get().rollback()


@pytest.mark.parametrize(
    ("work", "readonly", "expected"),
    [(read, False, 2), (write, False, 2), (write_and_throw_away, False, 2), (read, True, 1)],
)
def test_unit_of_work_costs_its_statement_and_one_end(run, url, counter, work, readonly, expected):
    async def main():
        manager = managed(url, readonly=readonly)
        await work(manager)
        before = counter("Questions")
        for _ in range(5):
            await work(manager)
        assert counter("Questions") - before - 1 == 5 * expected
        await manager.dispose()

    run(main)


@pytest.mark.parametrize(("ping_idle_s", "expected"), [(60, 0), (0, 5)])
def test_busy_connection_is_not_pinged_and_an_idle_one_is(run, url, counter, ping_idle_s, expected):
    async def main():
        manager = managed(url, ping_idle_s=ping_idle_s)
        await read(manager)
        before = counter(PINGS)
        for _ in range(5):
            await read(manager)
        assert counter(PINGS) - before == expected
        await manager.dispose()

    run(main)


def test_connection_is_pinged_when_its_last_answer_is_old_and_its_end_asked_nothing(run, url, counter):
    """In AUTOCOMMIT there is no ROLLBACK."""

    async def main():
        manager, other = managed(url, readonly=True, ping_idle_s=0.2), managed(url)
        await read(manager)
        async with manager.scope():
            await manager.get().execute(ROWS)
            before = counter(PINGS)
            async with other.scope():
                await other.get().execute(text("SELECT SLEEP(0.5)"))
        await read(manager)
        assert counter(PINGS) - before == 1
        await manager.dispose()
        await other.dispose()

    run(main)


@pytest.mark.parametrize("loop_sees_it", [True, False])
def test_connection_killed_at_the_server_a_moment_ago_never_fails_the_next_unit_of_work(
    run, url, mariadb, loop_sees_it
):
    async def main():
        manager = managed(url, ping_idle_s=3600)
        for _ in range(10):
            killed = await number_of(manager)
            with mariadb.root() as cursor:
                cursor.execute("KILL %s", (killed,))

            def gone(killed=killed):
                return killed not in [row["id"] for row in mariadb.processlist()]

            if loop_sees_it:
                await until(gone, 20)
            else:
                wait_until(gone, 20)
            assert await number_of(manager) != killed
        await manager.dispose()

    run(main)


@pytest.mark.parametrize("ping_idle_s", [0, 3600])
def test_connection_that_the_loop_saw_reset_never_fails_the_next_unit_of_work(run, url, mariadb, ping_idle_s):
    """uvloop refuses what is written to it by a RuntimeError, which aiomysql passes on."""

    async def main():
        with Proxy(mariadb.port) as proxy:
            manager = managed(url.replace(f":{mariadb.port}/", f":{proxy.port}/"), ping_idle_s=ping_idle_s)
            async with manager.engine().connect() as connection:
                transport = transport_of((await connection.get_raw_connection()).driver_connection)
                await connection.execute(ROWS)
            proxy.cut()
            await until(transport.is_closing, 20)
            assert await read(manager) == [1, 2]
            await manager.dispose()

    run(main)


@pytest.mark.parametrize("then", ["execute", "commit"])
def test_unit_of_work_gets_the_error_of_a_lost_connection_when_the_loop_saw_it_reset(run, url, mariadb, then):
    async def main():
        with Proxy(mariadb.port) as proxy:
            manager = managed(url.replace(f":{mariadb.port}/", f":{proxy.port}/"))
            async with manager.scope():
                session = manager.get()
                raw = await (await session.connection()).get_raw_connection()
                transport = transport_of(raw.driver_connection)
                await session.execute(text("UPDATE t SET n = 99"))
                proxy.cut()
                await until(transport.is_closing, 20)
                with pytest.raises(exc.OperationalError, match=r"2006|2013"):
                    await (session.commit() if then == "commit" else session.execute(ROWS))
            assert await read(manager) == [1, 2]
            await manager.dispose()

    run(main)


@pytest.mark.parametrize("end", ["commit", "rollback"])
@pytest.mark.parametrize("left", ["SELECT * FROM t", "UPDATE t SET n = 99", "INSERT INTO t VALUES (1, 1)", "BEGIN"])
def test_what_the_driver_itself_began_after_the_end_is_rolled_back(run, url, mariadb, end, left):
    """A failed INSERT as the first statement holds a row lock, and the last status the server sent says nothing."""

    async def main():
        manager = managed(url)
        async with manager.engine().connect() as connection:
            number = await connection.scalar(text("SELECT CONNECTION_ID()"))
            await connection.execute(ROWS)
            await getattr(connection, end)()
            driver = (await connection.get_raw_connection()).driver_connection
            try:
                async with driver.cursor() as cursor:
                    await cursor.execute(left)
            except Exception as error:
                assert "1062" in str(error)
        with mariadb.root() as cursor:
            cursor.execute("SELECT 1 FROM information_schema.innodb_trx WHERE trx_mysql_thread_id = %s", (number,))
            assert cursor.fetchall() == ()
        assert await number_of(manager) == number
        assert await read(manager) == [1, 2]
        await manager.dispose()

    run(main)


def test_transaction_after_the_end_is_rolled_back(run, url):
    async def main():
        manager = managed(url)
        async with manager.scope():
            session = manager.get()
            await session.execute(ROWS)
            await session.commit()
            await session.execute(text("UPDATE t SET n = 99"))
        assert await read(manager) == [1, 2]
        async with manager.engine().connect() as connection:
            await connection.execute(ROWS)
            await connection.rollback()
            await connection.execute(text("UPDATE t SET n = 99"))
            with pytest.raises(exc.IntegrityError):
                await connection.execute(text("INSERT INTO t VALUES (1, 1)"))
        assert await read(manager) == [1, 2]
        await manager.dispose()

    run(main)


def test_detached_connection_is_used_to_its_end(run, url, mariadb):
    """It is no pool's any more, and its reads are bounded all the same."""

    async def main():
        manager = managed(url, read_timeout_s=1)
        async with manager.engine().connect() as connection:
            raw = await connection.get_raw_connection()
            number = await connection.scalar(text("SELECT CONNECTION_ID()"))
            raw.detach()
            assert (await connection.scalars(ROWS)).all() == [1, 2]
            await connection.rollback()
            with pytest.raises(exc.OperationalError, match="2013"):
                await connection.execute(text("SELECT SLEEP(30)"))
        await until(lambda: number not in [row["id"] for row in mariadb.processlist()], 20)
        assert await read(manager) == [1, 2]
        await manager.dispose()

    run(main)


def test_detached_connection_is_closed_when_rows_of_a_server_side_cursor_are_unread(run, url, mariadb):
    async def main():
        manager = managed(url)
        async with manager.engine().connect() as connection:
            raw = await connection.get_raw_connection()
            number = await connection.scalar(text("SELECT CONNECTION_ID()"))
            raw.detach()
            rows = await connection.stream(ROWS)
            assert await rows.fetchone() == (1,)
        await until(lambda: number not in [row["id"] for row in mariadb.processlist()], 20)
        assert await read(manager) == [1, 2]
        await manager.dispose()

    run(main)


def test_sqlite_rolls_back_once(run, tmp_path, monkeypatch):
    calls = []
    roll_back = aiosqlite.Connection.rollback

    async def counted(self):
        calls.append(self)
        await roll_back(self)

    monkeypatch.setattr(aiosqlite.Connection, "rollback", counted)

    async def main():
        manager = aio.SessionManager({"default": f"sqlite:///{tmp_path}/x.db"})
        await read_one(manager)
        del calls[:]
        await read_one(manager)
        assert len(calls) == 1
        await manager.dispose()

    async def read_one(manager):
        async with manager.scope():
            await manager.get().scalar(text("SELECT 1"))

    run(main)


def test_sqlite_is_looked_at_and_not_asked_whether_it_lives(run, tmp_path):
    async def main():
        manager = aio.SessionManager({"default": {"url": f"sqlite:///{tmp_path}/x.db", "options": {"pool_size": 1}}})
        statements = []
        async with manager.scope():
            raw = await (await manager.get().connection()).get_raw_connection()
            await raw.driver_connection.set_trace_callback(statements.append)
        async with manager.scope():
            assert await manager.get().scalar(text("SELECT 7")) == 7
        assert statements == ["SELECT 7"]
        await manager.dispose()

    run(main)


def test_sqlite_connection_that_was_closed_by_hand_never_fails_the_next_unit_of_work(run, tmp_path):
    async def main():
        manager = aio.SessionManager({"default": {"url": f"sqlite:///{tmp_path}/x.db", "options": {"pool_size": 1}}})
        async with manager.engine().connect() as connection:
            driver = (await connection.get_raw_connection()).driver_connection
        await driver.close()
        async with manager.scope():
            assert await manager.get().scalar(text("SELECT 7")) == 7
        await manager.dispose()

    run(main)
