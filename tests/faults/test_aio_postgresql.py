"""PostgreSQL in asyncio, by psycopg and by asyncpg: nothing of one unit of work reaches the next, whatever ends it, and
nobody waits for ever."""

from __future__ import annotations

import asyncio
import socket
import struct
from contextlib import asynccontextmanager

import pytest
import uvloop
from sqlalchemy import event, exc, text
from sqlalchemy.engine import make_url

from dbsession import aio
from dbsession.core import teardown
from support.aio_sweep import until
from support.dialects import dialect_of
from support.proxy import Proxy
from support.waiting import wait_until

DEADLINE_S = 120  # of a whole test, far beyond every bound in it
SHORT_S = 0.5
UVLOOP = pytest.param(uvloop.new_event_loop, id="uvloop", marks=pytest.mark.slow)


@pytest.fixture(params=["psycopg", "asyncpg"])
def driver(request):
    return request.param


@pytest.fixture
def url(postgresql, postgresql_url, driver):
    with postgresql.root(make_url(postgresql_url).database) as cursor:
        cursor.execute("CREATE TABLE t (id INT PRIMARY KEY, n INT)")
        cursor.execute("INSERT INTO t VALUES (1, 1), (2, 2)")
    return postgresql_url.replace("psycopg", driver)


@pytest.fixture
def proxy(postgresql):
    with Proxy(postgresql.port) as proxy:
        yield proxy


@pytest.fixture
def through(url, postgresql, proxy):
    """The URL by way of the proxy."""
    return url.replace(f":{postgresql.port}/", f":{proxy.port}/")


@pytest.fixture(params=[pytest.param(asyncio.new_event_loop, id="asyncio"), UVLOOP])
def run(request):
    """Runs an async function."""

    def in_a_loop(work):
        async def within():
            async with asyncio.timeout(DEADLINE_S):
                await work()

        with asyncio.Runner(loop_factory=request.param) as runner:
            runner.run(within())

    return in_a_loop


def managed(url, **entry):
    options = {"pool_size": 1, "pool_timeout": 5, **entry.pop("options", {})}
    return aio.SessionManager({"default": {"url": url, "options": options, **entry}})


async def number_of(manager):
    """A unit of work; returns its connection's number at the server."""
    async with manager.scope():
        return await manager.get().scalar(text("SELECT pg_backend_pid()"))


async def rows_of(manager):
    async with manager.scope():
        return (await manager.get().scalars(text("SELECT n FROM t ORDER BY id"))).all()


async def raw_of(session):
    return (await (await session.connection()).get_raw_connection()).driver_connection


async def nothing_in_use(manager):
    await until(lambda: manager.engine().pool.checkedout() == 0, 20)


def running(server, what):
    """A pg_sleep() that has begun: while asyncpg prepares it the server shows it, too."""
    found = [each for each in server.processlist() if what in (each["info"] or "")]
    return [each["id"] for each in found if each["state"] == "sleeping" or "pg_sleep" not in what]


@asynccontextmanager
async def scope_of(manager):
    async with manager.scope():
        yield manager.get()


# -- a task is cancelled -----------------------------------------------------------------------------------


def test_statement_is_ended_at_the_server_and_its_lock_is_free_when_its_task_is_cancelled(run, url, postgresql):
    manager = managed(url, options={"pool_size": 2})

    async def work():
        async def holder():
            async with scope_of(manager) as session:
                await session.execute(text("UPDATE t SET n = 9 WHERE id = 1"))
                await session.execute(text("SELECT pg_sleep(60)"))

        task = asyncio.create_task(holder())
        await until(lambda: running(postgresql, "pg_sleep(60)"), 20)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await nothing_in_use(manager)
        async with scope_of(manager) as session:  # waits for the row's lock
            await session.execute(text("UPDATE t SET n = 7 WHERE id = 1"))
            await session.commit()
        assert not running(postgresql, "pg_sleep(60)")
        await until(lambda: manager.database("default").stats.kills == 1, 20)
        assert await rows_of(manager) == [7, 2]

    run(work)
    wait_until(lambda: not postgresql.processlist(), 20, "no connection is left")


def test_statement_is_ended_at_the_server_when_the_loop_ends_with_its_task(run, url, postgresql):
    """asyncio.run() cancels at its end what runs, whatever asks the server to end it, too."""
    manager = managed(url)

    async def work():
        async def sleep():
            async with scope_of(manager) as session:
                await session.execute(text("SELECT pg_sleep(60)"))

        task = asyncio.create_task(sleep())
        await until(lambda: running(postgresql, "pg_sleep(60)"), 20)
        stats.append(manager.database("default").stats)
        task.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    stats = []
    run(work)
    assert stats[0].kills == 1  # and not only closed, which the server would see at the statement's end
    wait_until(lambda: not postgresql.processlist(), 20, "the statement has ended")


def test_cancellation_comes_out_at_once_when_the_server_is_silent(run, through, proxy, caplog):
    """And what asks for the end of its statement gives up within its bound, without the loop's exception handler."""
    manager, said = managed(through), []

    async def work():
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: said.append(context))
        ready = asyncio.Event()

        async def sleep():
            async with scope_of(manager) as session:
                await session.execute(text("SELECT 1"))
                proxy.stall()
                ready.set()
                await session.execute(text("SELECT 2"))

        task = asyncio.create_task(sleep())
        await ready.wait()
        await asyncio.sleep(0.05)
        began = loop.time()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert loop.time() - began < teardown.BOUND_S / 2
        await nothing_in_use(manager)
        await until(lambda: "could not be ended at the server" in caplog.text, 20)
        proxy.resume()
        assert await rows_of(manager) == [1, 2]

    run(work)
    assert not said


@pytest.mark.parametrize("how", ["in", "out"])
def test_next_user_finds_nothing_when_a_copy_was_cancelled_in_its_middle(run, url, driver, how, caplog):
    manager = managed(url)

    async def endless():
        number = 10
        while True:
            yield number, number
            number += 1
            await asyncio.sleep(0)

    async def copy_in(raw):
        if driver == "asyncpg":
            await raw.copy_records_to_table("t", records=endless())
            return
        async with raw.cursor() as cursor, cursor.copy("COPY t FROM STDIN") as copy:
            async for row in endless():
                await copy.write_row(row)

    async def copy_out(raw):
        query = "SELECT generate_series(1, 100000000)"
        if driver == "asyncpg":

            async def sink(data):
                await asyncio.sleep(0)

            await raw.copy_from_query(query, output=sink)
            return
        async with raw.cursor() as cursor, cursor.copy(f"COPY ({query}) TO STDOUT") as copy:
            async for _ in copy:
                await asyncio.sleep(0)

    async def work():
        await number_of(manager)

        async def copies():
            async with scope_of(manager) as session:
                raw = await raw_of(session)
                await session.execute(text("UPDATE t SET n = 9"))
                await (copy_in if how == "in" else copy_out)(raw)

        for pause in (0.02, 0.05, 0.1):
            task = asyncio.create_task(copies())
            await asyncio.sleep(pause)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await nothing_in_use(manager)
            assert await rows_of(manager) == [1, 2]

    run(work)
    assert not caplog.records


def test_cancellation_ends_an_executemany_whose_server_reads_nothing(run, through, proxy, driver):
    """asyncpg swallows one there, and waits for what will not come."""
    manager = managed(through)

    async def work():
        async def insert():
            async with scope_of(manager) as session:
                connection = await session.connection()
                await connection.exec_driver_sql(statement, [(8, 8), (9, 9)])  # it is prepared
                raws.append(await raw_of(session))
                proxy.stall()
                await connection.exec_driver_sql(statement, [(n, n) for n in range(10, 400_000)])

        statement = "INSERT INTO t VALUES ($1, $2)" if driver == "asyncpg" else "INSERT INTO t VALUES (%s, %s)"
        raws = []
        task = asyncio.create_task(insert())
        await until(lambda: raws, 20)
        if driver == "asyncpg":
            await until(lambda: raws[0].transport.get_write_buffer_size() > 0, 20)
        else:
            await asyncio.sleep(0.5)
        task.cancel()
        done, _ = await asyncio.wait([task], timeout=20)
        assert done
        with pytest.raises(asyncio.CancelledError):
            await task
        proxy.resume()
        await nothing_in_use(manager)
        assert await rows_of(manager) == [1, 2]

    run(work)


def test_cancellation_comes_out_of_a_small_executemany(run, url, postgresql):
    """psycopg waits for its answers where it leaves its pipeline."""
    manager = managed(url)

    async def work():
        async def insert():
            async with scope_of(manager) as session:
                await session.execute(text("SELECT 1"))
                await session.execute(
                    text("UPDATE t SET n = 9 WHERE id = :id AND pg_sleep(60) IS NOT NULL"), [{"id": 1}, {"id": 2}]
                )

        task = asyncio.create_task(insert())
        await until(lambda: running(postgresql, "pg_sleep(60)"), 20)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await nothing_in_use(manager)
        await until(lambda: not running(postgresql, "pg_sleep(60)"), 20)
        assert await rows_of(manager) == [1, 2]

    run(work)


# -- silence -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["statement", "commit", "rollback", "stream", "many"])
def test_wait_ends_with_an_error_when_the_server_stops(run, url, postgresql, what, driver):
    manager = managed(url, read_timeout_s=SHORT_S)

    async def work():
        async with manager.scope() as scope:
            session = manager.get()
            await session.execute(text("UPDATE t SET n = 9"))
            rows = await session.stream(text("SELECT generate_series(1, 100000)")) if what == "stream" else None
            postgresql.pause()
            try:
                if what == "commit":
                    with pytest.raises(aio.CommitOutcomeUnknown):
                        await session.commit()
                    assert scope.outcome == "unknown"
                else:
                    with pytest.raises(exc.OperationalError, match=r"no answer from the server within 0\.5 s"):
                        if rows is not None:
                            await rows.all()
                        elif what == "rollback":
                            await session.rollback()
                        elif what == "many":
                            await session.execute(text("UPDATE t SET n = :n"), [{"n": 1}, {"n": 2}])
                        else:
                            await session.execute(text("SELECT 1"))
            finally:
                postgresql.resume()
        await nothing_in_use(manager)
        if what != "commit":
            assert await rows_of(manager) == [1, 2]

    run(work)


def test_scope_has_its_own_bound_for_a_statement(run, url):
    async def work():
        manager = managed(url, read_timeout_s=SHORT_S)
        async with manager.scope(read_timeout_s=20):
            await manager.get().execute(text("SELECT pg_sleep(1)"))
        manager = managed(url)
        async with manager.scope(read_timeout_s=SHORT_S):
            with pytest.raises(exc.OperationalError, match=r"within 0\.5 s"):
                await manager.get().execute(text("SELECT pg_sleep(20)"))
        await nothing_in_use(manager)
        assert await rows_of(manager) == [1, 2]

    run(work)


def test_statement_that_takes_too_long_is_ended_at_the_server(run, url, postgresql):
    async def work():
        manager = managed(url, read_timeout_s=SHORT_S)
        async with manager.scope():
            with pytest.raises(exc.OperationalError):
                await manager.get().execute(text("SELECT pg_sleep(60)"))
        await until(lambda: not running(postgresql, "pg_sleep(60)"), 20)

    run(work)


@pytest.mark.parametrize("there", ["mute", "closed"])
def test_connecting_ends_with_an_error_when_nobody_answers(run, driver, there):
    async def work():
        port = mute.getsockname()[1]
        if there == "closed":
            mute.close()
        manager = managed(f"postgresql+{driver}://u:p@127.0.0.1:{port}/x", connect_timeout_s=SHORT_S)
        with pytest.raises(exc.OperationalError):
            await number_of(manager)
        await nothing_in_use(manager)

    with socket.create_server(("127.0.0.1", 0)) as mute:
        run(work)


def test_next_host_is_connected_to_when_the_first_one_is_silent(run, url, driver):
    async def work():
        port = make_url(url).port
        both = (
            make_url(url)
            .set(host=None, port=None)
            .update_query_dict({"host": [f"127.0.0.1:{mute.getsockname()[1]}", f"127.0.0.1:{port}"]})
        )
        manager = managed(both.render_as_string(hide_password=False), connect_timeout_s=2.0)
        assert await rows_of(manager) == [1, 2]

    with socket.create_server(("127.0.0.1", 0)) as mute:
        run(work)


def test_dispose_ends_when_the_server_is_silent(run, through, proxy):
    async def work():
        manager = managed(through, options={"pool_size": 3})
        together = asyncio.Barrier(3)

        async def hold():
            async with scope_of(manager) as session:
                await session.execute(text("SELECT 1"))
                await together.wait()

        await asyncio.gather(*(hold() for _ in range(3)))
        proxy.stall()
        async with asyncio.timeout(5):
            await manager.dispose()

    run(work)


# -- round trips -------------------------------------------------------------------------------------------


def round_trips(sent):
    """How often a client has waited for the server: of its messages each Query, Sync and Flush."""
    found = 0
    while len(sent) >= 5:
        (length,) = struct.unpack("!i", sent[1:5])
        found += sent[:1] in b"QSH"
        sent = sent[1 + length :]
    return found


@pytest.mark.parametrize(
    ("what", "readonly", "expected"),
    [
        ("read", False, {"psycopg": 2, "asyncpg": 3}),
        ("write", False, {"psycopg": 2, "asyncpg": 3}),
        ("read", True, {"psycopg": 1, "asyncpg": 1}),
    ],
)
def test_unit_of_work_costs_its_statement_and_one_end(run, through, proxy, driver, what, readonly, expected):
    """And the BEGIN, which asyncpg cannot send with a statement."""
    manager = managed(through, readonly=readonly)

    async def unit():
        async with scope_of(manager) as session:
            if what == "read":
                await session.execute(text("SELECT n FROM t WHERE id = :id"), {"id": 1})
            else:
                await session.execute(text("UPDATE t SET n = n WHERE id = :id"), {"id": 1})
                await session.commit()

    async def work():
        for _ in range(8):  # until it is prepared
            await unit()
        before = proxy.bytes_sent()[0]
        for _ in range(5):
            await unit()
        assert round_trips(proxy.sent(0)[before:]) == 5 * expected[driver]

    run(work)


@pytest.mark.parametrize(("ping_idle_s", "expected"), [(60, 0), (0, 1)])
def test_busy_connection_is_not_pinged_and_an_idle_one_is(run, through, proxy, ping_idle_s, expected):
    manager = managed(through, ping_idle_s=ping_idle_s, readonly=True)

    async def work():
        for _ in range(8):
            await rows_of(manager)
        before = proxy.bytes_sent()[0]
        for _ in range(5):
            await rows_of(manager)
        assert round_trips(proxy.sent(0)[before:]) == 5 * (1 + expected)

    run(work)


# -- what a session was given ------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["SQLAlchemy", "driver"])
def test_nothing_that_was_set_reaches_the_next_user(run, url, way, driver):
    words = dialect_of(url)

    async def work():
        manager = managed(url)
        async with scope_of(manager) as session:
            before = await session.scalar(text(words.state))
        for statement in words.dirt:
            async with scope_of(manager) as session:
                if way == "SQLAlchemy":
                    await session.execute(text(statement))
                else:
                    await (await raw_of(session)).execute(statement)
                await session.commit()
            async with scope_of(manager) as session:
                assert await session.scalar(text(words.state)) == before, statement
                assert await session.scalar(text("SELECT to_regclass('pg_temp.private') IS NULL"))

    dirt = [each for each in words.dirt if not each.startswith("INSERT INTO private")]
    words.dirt = tuple(dirt)
    run(work)


def test_what_no_text_tells_reaches_nobody_when_the_reset_is_of_the_connection(run, url, postgresql):
    with postgresql.root(make_url(url).database) as cursor:
        cursor.execute(
            "CREATE FUNCTION become() RETURNS int LANGUAGE plpgsql AS "
            "$$ BEGIN PERFORM set_config('app.who', 'alice', false); RETURN 1; END $$"
        )

    async def work():
        manager = managed(url, reset="connection")
        for _ in range(2):
            async with scope_of(manager) as session:
                assert (await session.scalar(text("SELECT current_setting('app.who', true)"))) in (None, "")
                await session.execute(text("SELECT become()"))
                await session.commit()
        assert manager.database("default").stats.connects == 1

    run(work)


def test_what_a_connect_listener_has_set_stays(run, url):
    async def work():
        manager = managed(url)

        @event.listens_for(manager.engine().sync_engine, "connect")
        def set_it(connection, _):
            cursor = connection.cursor()
            cursor.execute("SET timezone = '+07'")
            cursor.close()
            connection.commit()

        for _ in range(2):
            async with scope_of(manager) as session:
                assert await session.scalar(text("SHOW timezone")) == "<+07>-07"
                await session.execute(text("SET timezone = '+05'"))
                await session.commit()
        assert manager.database("default").stats.connects == 1

    run(work)


def test_listener_of_notifications_is_gone_for_the_next_user(run, url, postgresql, driver):
    heard = []

    async def work():
        manager = managed(url)
        async with scope_of(manager) as session:
            raw = await raw_of(session)
            if driver == "asyncpg":
                await raw.add_listener("news", lambda *told: heard.append(told))
            else:
                raw.add_notify_handler(heard.append)
                await raw.execute("LISTEN news")
            await session.commit()
        async with scope_of(manager) as session:
            with postgresql.root(make_url(url).database) as cursor:
                cursor.execute("NOTIFY news")
            assert await session.scalar(text("SELECT count(*) FROM pg_listening_channels()")) == 0
        assert not heard

    run(work)


# -- what a COMMIT says ------------------------------------------------------------------------------------


def test_commit_fails_when_a_statement_of_the_drivers_had_failed(run, url):
    """Nobody but the server knows; it answers COMMIT with ROLLBACK, without an error."""

    async def work():
        manager = managed(url)
        async with manager.scope() as scope:
            session = manager.get()
            await session.execute(text("UPDATE t SET n = 9"))
            try:
                await (await raw_of(session)).execute("INSERT INTO t VALUES (1, 1)")
            except Exception as error:
                assert "duplicate" in str(error)
            with pytest.raises(aio.RollbackRequired, match="nothing was committed"):
                await session.commit()
            assert scope.outcome != "committed"
        assert await rows_of(manager) == [1, 2]

    run(work)


def test_transaction_goes_on_after_a_savepoint_and_not_without_one(run, url):
    async def work():
        manager = managed(url)
        twice = text("INSERT INTO t VALUES (1, 1)")
        async with scope_of(manager) as session:
            await session.execute(text("UPDATE t SET n = 9"))
            with pytest.raises(exc.IntegrityError):
                async with session.begin_nested():
                    await session.execute(twice)
            await session.commit()
        assert await rows_of(manager) == [9, 9]
        async with scope_of(manager) as session:
            await session.execute(text("UPDATE t SET n = 8"))
            with pytest.raises(exc.IntegrityError):
                await session.execute(twice)
            with pytest.raises(aio.RollbackRequired):
                await session.execute(text("SELECT 1"))
            with pytest.raises(aio.RollbackRequired):
                await session.commit()
        assert await rows_of(manager) == [9, 9]

    run(work)


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_stream_says_that_it_was_cut_when_its_transaction_has_ended(run, url, end):
    async def work():
        manager = managed(url)
        async with scope_of(manager) as session:
            rows = await session.stream(text("SELECT generate_series(1, 100000)"))
            assert (await rows.fetchone())[0] == 1
            await getattr(session, end)()
            with pytest.raises(aio.ResultCut, match="committed or rolled back"):
                async for _ in rows:
                    pass
        assert await rows_of(manager) == [1, 2]
        assert manager.database("default").stats.connects == 1

    run(work)


# -- a server that goes, or refuses ------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["restart", "kill"])
def test_no_task_fails_when_the_server_restarts_between_them(run, url, postgresql, way):
    async def work():
        manager = managed(url, options={"pool_size": 3})
        await asyncio.gather(*(rows_of(manager) for _ in range(9)))
        getattr(postgresql, way)()
        postgresql.ensure_running()
        await asyncio.gather(*(rows_of(manager) for _ in range(9)))
        await nothing_in_use(manager)

    run(work)


def test_one_idle_connection_that_was_ended_takes_no_other_with_it_a_moment_later(run, url, postgresql):
    async def work():
        manager = managed(url, options={"pool_size": 3})
        together = asyncio.Barrier(3)

        async def hold():
            async with scope_of(manager) as session:
                number = await session.scalar(text("SELECT pg_backend_pid()"))
                await together.wait()
                return number

        numbers = await asyncio.gather(*(hold() for _ in range(3)))
        manager.database("default").connections.backend.discards.due()  # as if another had gone just now
        postgresql.kill_connection(numbers[0])
        await until(lambda: numbers[0] not in [each["id"] for each in postgresql.processlist()], 20)
        found = await asyncio.gather(*(hold() for _ in range(3)))
        assert len(set(found) & set(numbers)) == 2

    run(work)


def test_statement_fails_once_when_its_connection_is_ended(run, url, postgresql):
    async def work():
        manager = managed(url)

        async def sleep():
            async with scope_of(manager) as session:
                await session.execute(text("SELECT pg_sleep(60)"))

        task = asyncio.create_task(sleep())
        await until(lambda: running(postgresql, "pg_sleep(60)"), 20)
        postgresql.kill_connection(running(postgresql, "pg_sleep(60)")[0])
        with pytest.raises(exc.DBAPIError) as caught:
            await task
        assert caught.value.connection_invalidated
        assert await rows_of(manager) == [1, 2]

    run(work)


def test_commit_says_that_nothing_was_committed_when_the_connection_was_gone_before(run, url, postgresql):
    async def work():
        manager = managed(url)
        async with manager.scope() as scope:
            session = manager.get()
            number = await session.scalar(text("SELECT pg_backend_pid()"))
            await session.execute(text("UPDATE t SET n = 9"))
            postgresql.kill_connection(number)
            wait_until(lambda: number not in [each["id"] for each in postgresql.processlist()], 20)
            with pytest.raises(exc.DBAPIError, match="nothing was committed") as caught:
                await session.commit()
            assert not isinstance(caught.value, aio.CommitOutcomeUnknown)
            assert scope.outcome != "unknown"
        assert await rows_of(manager) == [1, 2]

    run(work)


def test_write_connects_anew_when_the_server_takes_none(run, url, postgresql):
    async def work():
        manager = managed(url, options={"pool_size": 2})
        await rows_of(manager)
        postgresql.refuse_writes(True)
        try:
            async with scope_of(manager) as session:
                with pytest.raises(exc.DBAPIError) as caught:
                    await session.execute(text("UPDATE t SET n = 9"))
                assert caught.value.orig.sqlstate == "25006"
                assert caught.value.connection_invalidated
        finally:
            postgresql.refuse_writes(False)
        async with scope_of(manager) as session:
            await session.execute(text("UPDATE t SET n = 9"))
            await session.commit()
        assert await rows_of(manager) == [9, 9]

    run(work)


def test_readonly_refuses_a_write_and_the_connection_stays(run, url):
    async def work():
        manager = managed(url, readonly=True)
        number = await number_of(manager)
        async with scope_of(manager) as session:
            with pytest.raises(exc.DBAPIError) as caught:
                await session.execute(text("UPDATE t SET n = 9"))
            assert caught.value.orig.sqlstate == "25006"
        assert await number_of(manager) == number

    run(work)


# -- a pooler ---------------------------------------------------------------------------------------------


def test_pooler_is_recognised_and_no_statement_stays_prepared(run, pgbouncer_url, driver):
    async def work():
        manager = managed(pgbouncer_url.replace("psycopg", driver), options={"pool_size": 4})

        async def unit(number):
            async with scope_of(manager) as session:
                for _ in range(3):
                    assert await session.scalar(text("SELECT CAST(:n AS int)"), {"n": number}) == number

        for _ in range(10):
            await asyncio.gather(*(unit(number) for number in range(8)))
        assert manager.database("default").connections.backend.pooled is True

    run(work)


# -- psycopg's own -----------------------------------------------------------------------------------------


def test_statement_is_ended_where_libpq_can_only_ask_and_wait(postgresql, postgresql_url, monkeypatch):
    """Before libpq 17, as in Debian 12."""
    monkeypatch.setattr("psycopg.capabilities.has_cancel_safe", lambda *_, **__: False)
    manager = managed(postgresql_url)

    async def work():
        async def sleep():
            async with scope_of(manager) as session:
                await session.execute(text("SELECT pg_sleep(60)"))

        task = asyncio.create_task(sleep())
        await until(lambda: running(postgresql, "pg_sleep(60)"), 20)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: not running(postgresql, "pg_sleep(60)"), 20)
        await until(lambda: manager.database("default").stats.kills == 1, 20)

    asyncio.run(work())


def test_nothing_is_ended_at_the_server_when_kill_abandoned_is_off(postgresql, postgresql_url):
    manager = managed(postgresql_url, kill_abandoned=False)

    async def work():
        async def sleep():
            async with scope_of(manager) as session:
                await session.execute(text("SELECT pg_sleep(1)"))

        task = asyncio.create_task(sleep())
        await until(lambda: running(postgresql, "pg_sleep(1)"), 20)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert running(postgresql, "pg_sleep(1)")
        await until(lambda: not running(postgresql, "pg_sleep(1)"), 20)
        assert manager.database("default").stats.kills == 0

    asyncio.run(work())


def test_rest_of_a_result_that_is_read_piece_by_piece_is_not_waited_for(postgresql, postgresql_url, caplog):
    """psycopg would ask for its end, and read on for seconds."""
    manager = managed(postgresql_url)

    async def work():
        number = await number_of(manager)
        async with scope_of(manager) as session:
            raw = await raw_of(session)
            stream = raw.cursor().stream("SELECT generate_series(1, 100000000)")
            async for row in stream:
                assert row == (1,)
                break
            await stream.aclose()
        await nothing_in_use(manager)
        assert await number_of(manager) != number
        await until(lambda: not running(postgresql, "generate_series"), 20)

    asyncio.run(work())
    assert not caplog.records


@pytest.mark.parametrize("driver", ["psycopg"], indirect=True)  # asyncpg's own close() waits for it
@pytest.mark.parametrize("kill_abandoned", [True, False])
def test_waiting_task_gets_an_error_at_once_when_another_closes_the_connection(run, url, kill_abandoned):
    """And its descriptor's number may be another one's at once."""
    held = []

    async def use(manager):
        async with scope_of(manager) as session:
            held.append(await raw_of(session))
            await session.execute(text("SELECT pg_sleep(60)"))

    async def work():
        manager = managed(url, kill_abandoned=kill_abandoned)
        task = asyncio.create_task(use(manager))
        await wait_for(lambda: held and held[0].unread)
        await held[0].close()
        assert await manager_answers(manager)
        with pytest.raises(exc.OperationalError):
            async with asyncio.timeout(20):
                await task

    async def wait_for(condition):
        async with asyncio.timeout(20):
            while not condition():
                await asyncio.sleep(0)

    async def manager_answers(manager):
        async with asyncio.timeout(20):
            async with scope_of(manager) as session:
                return await session.scalar(text("SELECT 1")) == 1

    run(work)
