"""The server of an asyncio program restarts, dies, goes silent or refuses: tasks end, the loop goes on, and the pool
heals. With both drivers."""

from __future__ import annotations

import asyncio
import gc
import socket
from contextlib import asynccontextmanager, contextmanager

import pytest
from sqlalchemy import event, exc, text

from dbsession import aio
from dbsession.core import session as sessions
from dbsession.core import teardown
from support.aio_sweep import until
from support.proxy import Proxy

DEADLINE_S = 120  # of a whole test, far beyond every bound in it
SHORT_S = 1.0
TICK_S = 0.01
MANY_ROWS = text("SELECT seq, REPEAT('x', 200) FROM seq_1_to_5000000")


@pytest.fixture(params=["asyncmy", "aiomysql"])
def driver(request):
    return request.param


@pytest.fixture
def url(mariadb_url, driver):
    return mariadb_url.replace("pymysql", driver)


@pytest.fixture
def proxy(mariadb):
    with Proxy(mariadb.port) as proxy:
        yield proxy


@pytest.fixture
def through(url, mariadb, proxy):
    """The URL by way of the proxy."""
    return url.replace(f":{mariadb.port}/", f":{proxy.port}/")


def managed(url, **entry):
    options = {"pool_size": 1, "pool_timeout": 5, **entry.pop("options", {})}
    return aio.SessionManager({"default": {"url": url, "options": options, **entry}})


def run(work):
    async def within():
        async with asyncio.timeout(DEADLINE_S):
            await work()

    asyncio.run(within())


@asynccontextmanager
async def loop_goes_on():
    """Another task runs while the block waits."""
    ticks = 0

    async def tick():
        nonlocal ticks
        while True:
            await asyncio.sleep(TICK_S)
            ticks += 1

    ticker = asyncio.create_task(tick())
    try:
        yield
    finally:
        ticker.cancel()
    assert ticks >= SHORT_S / TICK_S / 10


@contextmanager
def fails(*numbers):
    """The block fails with an error of the driver of one of these numbers."""
    with pytest.raises(exc.OperationalError) as caught:
        yield
    assert caught.value.orig.args[0] in numbers, caught.value


async def one(manager):
    """A unit of work; returns its connection's number at the server."""
    async with manager.scope():
        session = manager.get()
        token = f"token-{id(asyncio.current_task())}"
        assert await session.scalar(text("SELECT :token"), {"token": token}) == token
        return await session.scalar(text("SELECT CONNECTION_ID()"))


async def nothing_in_use(manager):
    await until(lambda: manager.engine().pool.checkedout() == 0, 20)


# -- silence -----------------------------------------------------------------------------------------------


def test_connecting_ends_with_an_error_when_nobody_greets(driver):
    async def work():
        manager = managed(f"mysql+{driver}://u:p@127.0.0.1:{mute.getsockname()[1]}/x", connect_timeout_s=SHORT_S)
        async with loop_goes_on():
            with fails(2003):
                await one(manager)
        await nothing_in_use(manager)

    with socket.create_server(("127.0.0.1", 0)) as mute:
        run(work)


@pytest.mark.slow
@pytest.mark.parametrize("first", [True, False])
def test_connecting_ends_with_an_error_when_the_server_is_silent_after_the_handshake(first, through, proxy):
    """SQLAlchemy asks the first connection what its server can, and we ask each who it is."""

    async def work():
        manager = managed(through, connect_timeout_s=3)
        if not first:
            await one(manager)
            await manager.dispose()
        event.listen(manager.engine().sync_engine, "connect", lambda *_: proxy.stall(), insert=True)
        async with loop_goes_on():
            with fails(2013):
                await one(manager)
        await nothing_in_use(manager)

    run(work)


def test_setting_a_level_ends_with_an_error_when_the_server_is_silent(through, proxy):
    async def work():
        manager = managed(through, read_timeout_s=SHORT_S)
        await one(manager)
        event.listen(manager.engine().sync_engine, "set_connection_execution_options", lambda *_: proxy.stall())
        async with loop_goes_on(), manager.scope():
            with pytest.raises(Exception, match="2013"):  # the driver's own, which SQLAlchemy does not wrap here
                await manager.get().connection(execution_options={"isolation_level": "READ COMMITTED"})
        proxy.resume()
        await nothing_in_use(manager)

    run(work)


@pytest.mark.slow
def test_use_ends_with_an_error_when_the_server_is_silent_at_the_liveness_check(through, proxy):
    async def work():
        manager = managed(through, connect_timeout_s=3, ping_idle_s=0)
        await one(manager)
        proxy.stall()
        async with loop_goes_on():
            with fails(2003):
                await one(manager)
        await nothing_in_use(manager)
        proxy.resume()
        await one(manager)

    run(work)


@pytest.mark.parametrize("direction", ["to_client", "to_server"])
def test_statement_ends_with_an_error_when_the_server_is_silent(direction, through, proxy):
    async def work():
        manager = managed(through, read_timeout_s=SHORT_S, connect_timeout_s=5)
        async with manager.scope():
            session = manager.get()
            await session.execute(text("SELECT 1"))
            proxy.stall(direction)
            async with loop_goes_on():
                with fails(2013):
                    await session.execute(text("SELECT 2"))
        await nothing_in_use(manager)
        proxy.resume()
        await one(manager)

    run(work)


def test_statement_ends_with_an_error_when_the_server_stops_reading_it(through, proxy):
    """It cannot be sent: what has not been sent yet must not be waited for, neither by the statement nor by what
    closes its connection."""

    async def work():
        # The time in which the text is put together counts, too, and the loop stands still in it.
        manager = managed(through, read_timeout_s=3 * SHORT_S, connect_timeout_s=5)
        async with manager.scope():
            session = manager.get()
            await session.execute(text("SELECT 1"))
            proxy.stall("to_server")
            async with loop_goes_on():
                with fails(2013):
                    await session.execute(text("SELECT LENGTH(:much)"), {"much": "x" * 14_000_000})
        await nothing_in_use(manager)
        proxy.resume()
        await one(manager)

    run(work)


def test_cancelled_statement_ends_at_once_when_the_server_stops_reading_it(through, proxy):
    async def work():
        manager = managed(through)
        begun = asyncio.Event()

        async def send():
            async with manager.scope():
                session = manager.get()
                await session.execute(text("SELECT 1"))
                proxy.stall("to_server")
                asyncio.get_running_loop().call_later(0.05, begun.set)
                await session.execute(text("SELECT LENGTH(:much)"), {"much": "x" * 14_000_000})

        task = asyncio.create_task(send())
        await begun.wait()
        task.cancel()
        await asyncio.wait([task], timeout=15)
        assert task.cancelled()
        await nothing_in_use(manager)
        proxy.resume()
        await one(manager)

    run(work)


def test_fetch_of_a_stream_ends_with_an_error_when_the_server_is_silent(through, proxy):
    async def work():
        manager = managed(through, read_timeout_s=SHORT_S)
        async with manager.scope():
            rows = await manager.get().stream(MANY_ROWS)
            assert (await rows.fetchone())[0] == 1
            proxy.stall()
            async with loop_goes_on():
                with fails(2013):
                    await rows.all()
        proxy.resume()
        await nothing_in_use(manager)
        await one(manager)

    run(work)


@pytest.mark.parametrize("end", ["scope", "rollback", "release"])
def test_rest_of_a_stream_is_not_read_when_it_ends_in_the_middle(end, url, caplog, recwarn):
    """The server would have to send all of it first, and the teardown to give up after its bound."""
    manager = managed(url)

    async def work():
        async with manager.scope():
            session = manager.get()
            number = await session.scalar(text("SELECT CONNECTION_ID()"))
            async for row in await session.stream(MANY_ROWS):
                assert row[0] == 1
                break
            if end != "scope":
                await (session.rollback() if end == "rollback" else manager.release())
                assert await session.scalar(text("SELECT 7")) == 7
        await nothing_in_use(manager)
        assert await one(manager) != number
        assert manager.database("default").stats.teardown_failures == 0

    run(work)
    assert not caplog.records and not recwarn.list


def test_connection_stays_when_a_stream_was_read_or_closed(url):
    async def work():
        manager = managed(url)
        numbers = set()
        for way in ("all", "close", "commit"):
            async with manager.scope():
                session = manager.get()
                rows = await session.stream(text("SELECT seq FROM seq_1_to_100"))
                assert (await rows.fetchone())[0] == 1
                if way == "all":
                    assert len(await rows.all()) == 99
                else:
                    await rows.close()
                if way == "commit":
                    await session.commit()
                numbers.add(await session.scalar(text("SELECT CONNECTION_ID()")))
        assert len(numbers) == 1

    run(work)


def test_late_statement_leaves_the_other_connections_alone(url):
    async def work():
        manager = managed(url, options={"pool_size": 2})
        async with manager.scope():
            kept = await manager.get().scalar(text("SELECT CONNECTION_ID()"))
            with fails(2013):
                await asyncio.create_task(_sleep(manager))
            assert await manager.get().scalar(text("SELECT CONNECTION_ID()")) == kept
        assert await one(manager) == kept  # not closed when it came back, and not when it is taken out again
        assert await one(manager) == kept

    run(work)


async def _sleep(manager):
    async with manager.scope(read_timeout_s=SHORT_S):
        await manager.get().scalar(text("SELECT SLEEP(20)"))


@pytest.mark.slow
def test_session_scope_has_its_own_bound_for_a_statement(url):
    async def work():
        manager = managed(url, read_timeout_s=SHORT_S)
        async with manager.scope(read_timeout_s=20):
            assert await manager.get().scalar(text("SELECT SLEEP(2)")) == 0
        manager = managed(url)
        async with manager.scope(read_timeout_s=SHORT_S):
            with fails(2013):
                await manager.get().scalar(text("SELECT SLEEP(20)"))

    run(work)


@pytest.mark.parametrize("kind", ["block", "task"])
def test_teardown_is_bounded_when_the_server_is_silent(kind, through, proxy, monkeypatch, caplog):
    """Not by read_timeout_s, which is for statements."""
    monkeypatch.setattr(teardown, "BOUND_S", SHORT_S)

    async def work():
        manager = managed(through, options={"pool_size": 2})
        await one(manager)

        async def begin():
            await manager.get().execute(text("SELECT 1"))
            proxy.stall()

        async def in_a_block():
            async with manager.scope():
                await begin()

        async with loop_goes_on():
            await asyncio.create_task(begin() if kind == "task" else in_a_block())
            await nothing_in_use(manager)
        assert "failed to close with TimeoutError" in caplog.text
        proxy.resume()
        await one(manager)

    run(work)


def test_connections_are_cut_off_when_the_server_is_silent_at_the_loops_end(through, proxy, caplog, recwarn):
    manager = managed(through)
    ready, tasks = asyncio.Event(), []

    async def in_transaction():
        await manager.get().scalar(text("SELECT 1"))
        proxy.stall()
        ready.set()
        await asyncio.Event().wait()

    async def work():
        tasks.append(asyncio.create_task(in_transaction()))
        await ready.wait()

    run(work)
    tasks.clear()
    gc.collect()
    assert [str(each.message) for each in recwarn] == []  # such as: unclosed transport
    assert "exits failed" not in caplog.text
    assert not sessions._pinned


def test_dispose_ends_when_tasks_never_stop_ending(url):
    manager = managed(url, options={"pool_size": 10})

    async def work():
        ended = 0

        async def one():
            nonlocal ended
            await manager.get().execute(text("SELECT 1"))  # its transaction is ended by a closing task
            ended += 1

        async def busy():
            while True:
                await asyncio.create_task(one())

        load = [asyncio.create_task(busy()) for _ in range(5)]
        await until(lambda: ended > 20, 40)
        async with asyncio.timeout(teardown.BOUND_S + 20):
            await manager.dispose()
        for task in load:
            task.cancel()

    run(work)


def test_dispose_ends_when_the_server_is_silent(through, proxy):
    async def work():
        manager = managed(through, options={"pool_size": 3})
        together = asyncio.Barrier(3)

        async def hold():
            async with manager.scope():
                await manager.get().execute(text("SELECT 1"))
                await together.wait()

        await asyncio.gather(*(hold() for _ in range(3)))
        proxy.stall()
        await manager.dispose()

    run(work)


# -- restarts and kills --------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["restart", "kill"])
def test_no_task_fails_when_the_server_restarts_between_them(way, mariadb, url):
    async def work():
        manager = managed(url, options={"pool_size": 3})
        await asyncio.gather(*(one(manager) for _ in range(9)))
        getattr(mariadb, way)()
        mariadb.ensure_running()
        await asyncio.gather(*(one(manager) for _ in range(9)))
        await nothing_in_use(manager)

    run(work)


def test_transaction_fails_and_refuses_work_when_the_server_restarts(mariadb, url):
    async def work():
        manager = managed(url)
        async with manager.scope():
            session = manager.get()
            await session.execute(text("CREATE TABLE t (n INT)"))
            await session.execute(text("INSERT INTO t VALUES (1)"))
            mariadb.restart()
            with fails(1927, 2006, 2013):
                await session.execute(text("INSERT INTO t VALUES (2)"))
            with pytest.raises(exc.PendingRollbackError):
                await session.execute(text("INSERT INTO t VALUES (2)"))
            await session.rollback()
            await session.execute(text("INSERT INTO t VALUES (3)"))
            await session.commit()
            assert list(await session.scalars(text("SELECT n FROM t"))) == [3]
        await nothing_in_use(manager)

    run(work)


@pytest.mark.parametrize(("verb", "numbers"), [("QUERY", (1317,)), ("CONNECTION", (1927, 2013))])
def test_statement_fails_once_when_it_is_killed(verb, numbers, mariadb, url):
    async def work():
        manager = managed(url)

        async def sleep():
            async with manager.scope():
                await manager.get().scalar(text("SELECT SLEEP(20)"))

        def sleeping():
            return [each["id"] for each in mariadb.processlist() if "SLEEP(20)" in (each["info"] or "")]

        task = asyncio.create_task(sleep())
        await until(sleeping, 15)
        with mariadb.root() as cursor:
            cursor.execute(f"KILL {verb} {sleeping()[0]}")
        with fails(*numbers):
            await task
        await nothing_in_use(manager)
        await one(manager)

    run(work)


def test_connection_with_a_level_of_its_own_costs_no_place_when_it_is_lost_on_its_return(mariadb, url):
    manager = managed(url)

    async def work():
        async with manager.scope():
            session = manager.get()
            await session.connection(execution_options={"isolation_level": "READ COMMITTED"})
            number = await session.scalar(text("SELECT CONNECTION_ID()"))

            dialect = manager.engine().sync_engine.dialect
            roll_back = dialect.do_rollback

            def then_kill(proxied):
                roll_back(proxied)
                with mariadb.root() as cursor:
                    cursor.execute(f"KILL {number}")

            dialect.do_rollback = then_kill  # after which the level is taken back
            await session.commit()
        await nothing_in_use(manager)
        await one(manager)

    run(work)


def test_idle_connection_that_was_killed_costs_no_error(mariadb, url):
    async def work():
        manager = managed(url)
        killed = await one(manager)
        with mariadb.root() as cursor:
            cursor.execute("KILL %s", (killed,))
        await until(lambda: killed not in [each["id"] for each in mariadb.processlist()], 20)
        assert await one(manager) != killed

    run(work)


# -- deadlocks and lock waits --------------------------------------------------------------------------------


def _two_rows(mariadb, url):
    with mariadb.root() as cursor:
        database = url.rpartition("/")[2]
        cursor.execute(f"CREATE TABLE `{database}`.t (id INT PRIMARY KEY, n INT)")
        cursor.execute(f"INSERT INTO `{database}`.t VALUES (1, 0), (2, 0)")


ADD = text("UPDATE t SET n = n + 1 WHERE id = :id")


def test_transaction_refuses_work_when_a_deadlock_has_undone_a_part(mariadb, url):
    async def work():
        _two_rows(mariadb, url)
        manager = managed(url, options={"pool_size": 2})
        together = asyncio.Barrier(2)

        async def cross(first, second):
            async with manager.scope():
                session = manager.get()
                await session.execute(ADD, {"id": first})
                await together.wait()
                try:
                    await session.execute(ADD, {"id": second})
                except exc.OperationalError as error:
                    assert error.orig.args[0] == 1213
                    with pytest.raises(aio.RollbackRequired):
                        await session.execute(ADD, {"id": second})
                    with pytest.raises(aio.RollbackRequired):
                        await session.commit()
                    return "deadlock"
                await session.commit()
                return "done"

        assert sorted(await asyncio.gather(cross(1, 2), cross(2, 1))) == ["deadlock", "done"]
        async with manager.scope():
            assert list(await manager.get().scalars(text("SELECT n FROM t ORDER BY id"))) == [1, 1]
        await nothing_in_use(manager)

    run(work)


def test_unit_of_work_is_run_again_when_it_was_deadlocked(mariadb, url):
    async def work():
        _two_rows(mariadb, url)
        manager = managed(url, options={"pool_size": 2})
        together, runs = asyncio.Barrier(2), []

        def cross(first, second):
            async def unit(session):
                runs.append(first)
                await session.execute(ADD, {"id": first})
                if runs.count(first) == 1:
                    await together.wait()
                await session.execute(ADD, {"id": second})

            return manager.run_in_transaction(unit)

        await asyncio.gather(cross(1, 2), cross(2, 1))
        assert len(runs) == 3
        async with manager.scope():
            assert list(await manager.get().scalars(text("SELECT n FROM t ORDER BY id"))) == [2, 2]
        await nothing_in_use(manager)

    run(work)


def test_unit_of_work_is_run_again_when_it_waited_too_long_for_a_lock(mariadb, url):
    async def work():
        _two_rows(mariadb, url)
        manager = managed(url, options={"pool_size": 2})
        runs, release = 0, asyncio.Event()

        async def unit(session):
            nonlocal runs
            runs += 1
            if runs == 2:
                release.set()
                await holder
            await session.execute(text("SET innodb_lock_wait_timeout = 1"))
            await session.execute(ADD, {"id": 2})
            await session.execute(ADD, {"id": 1})

        async def hold(held):
            async with manager.scope():
                await manager.get().execute(ADD, {"id": 1})
                held.set()
                await release.wait()

        held = asyncio.Event()
        holder = asyncio.create_task(hold(held))
        await held.wait()
        await manager.run_in_transaction(unit)
        assert runs == 2
        async with manager.scope():
            assert list(await manager.get().scalars(text("SELECT n FROM t ORDER BY id"))) == [1, 1]

    run(work)


# -- COMMIT --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["silence", "cut", "cancel"])
def test_commit_has_an_unknown_outcome_when_its_answer_does_not_come(end, mariadb, url, through, proxy):
    """Here it was carried out each time: the proxy lets COMMIT through, and holds the answer back. It is not run
    again."""

    async def work():
        _two_rows(mariadb, url)
        manager = managed(through, read_timeout_s=SHORT_S if end == "silence" else 300)
        direct, runs, scopes = managed(url), 0, []

        async def unit(session):
            nonlocal runs
            runs += 1
            scopes.append(aio.scope.current())
            await session.execute(ADD, {"id": 1})
            proxy.stall("to_client")

        async def committed():
            async with direct.scope():
                return await direct.get().scalar(text("SELECT n FROM t WHERE id = 1"))

        task = asyncio.create_task(manager.run_in_transaction(unit))
        while not await committed():
            await asyncio.sleep(TICK_S)
        if end == "cut":
            proxy.cut()
        elif end == "cancel":
            task.cancel()
        await asyncio.wait([task])
        if end == "cancel":
            with pytest.raises(asyncio.CancelledError) as caught:
                await task
            assert "may have been committed" in str(caught.value.__notes__)
        else:
            with pytest.raises(aio.CommitOutcomeUnknown, match="DBS-COMMIT-UNKNOWN"):
                await task
        assert runs == 1
        assert scopes[0].outcome == "unknown"
        await nothing_in_use(manager)
        proxy.resume()
        await one(manager)
        assert await committed() == 1

    run(work)
