"""Which task holds a connection: noted at its checkout, forgotten at its return, and told of in PoolTimeout."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from pathlib import Path

import pytest
from sqlalchemy import event, exc, pool, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.util import greenlet_spawn

from dbsession import aio
from dbsession.aio import holders
from dbsession.core.connection_info import CHECKOUT
from dbsession.core.pool import callsites
from dbsession.core.pool.holders import STACK_FRAMES, Holder
from dbsession.errors import PoolTimeout
from support.loops import LOOPS, in_loop
from support.proxy import Proxy

DEADLINE_S = 30


@pytest.fixture(params=LOOPS)
def run(request):
    return in_loop(request.param)


@pytest.fixture
def managed(tmp_path):
    """Makes managers of one SQLite database; `managed(**entry)`."""

    def make(**entry):
        options = {"pool_size": 2, "pool_timeout": 0.05, **entry.pop("options", {})}
        return aio.SessionManager({"default": {"url": f"sqlite:///{tmp_path}/a.db", "options": options, **entry}})

    return make


@pytest.fixture
def proxy(mariadb):
    with Proxy(mariadb.port) as proxy:
        yield proxy


def held(manager):
    return manager.database("default").held.holders()


def line_of(part):
    """`file:line` of the only line of this file that ends with the comment `# part`."""
    lines = Path(__file__).read_text().splitlines()
    (number,) = [number for number, line in enumerate(lines, 1) if line.endswith(f"# {part}")]
    return f"{__file__}:{number} in "


def nothing_left(manager):
    database = manager.database("default")
    assert not database.held.notes() and database.engine.pool.checkedout() == 0


# -- PoolTimeout -------------------------------------------------------------------------------------------------------


def test_pool_timeout_names_the_tasks_that_hold_the_connections(run, managed):
    manager = managed()
    ready, end = asyncio.Semaphore(0), asyncio.Event()

    async def labelled():
        async with manager.scope("import"):
            await manager.get().execute(text("SELECT :p, 'in the text'"), {"p": "a parameter"})  # labelled
            ready.release()
            await end.wait()

    async def unlabelled():
        await manager.get().execute(text("INSERT INTO t VALUES (4711)"))
        ready.release()
        await end.wait()

    async def main():
        async with manager.engine().begin() as connection:
            await connection.execute(text("CREATE TABLE t (n INTEGER)"))
        first = asyncio.create_task(labelled())
        await ready.acquire()
        second = asyncio.create_task(unlabelled(), name="the export")
        await ready.acquire()
        with pytest.raises(exc.TimeoutError) as caught:
            await manager.engine().connect()
        end.set()
        await asyncio.gather(first, second)
        return caught.value

    error = run(main)
    assert type(error) is PoolTimeout and [type(each) for each in error.holders] == [Holder] * 2
    said = str(error).splitlines()
    assert said[0].endswith("with 2 in use and 0 others waiting. Held, longest first:")
    assert said[1].startswith("  import (") and ".labelled in Task-" in said[1]
    assert "checked out at " + line_of("labelled") in said[1]
    assert "in full" not in said[1] and said[1].endswith("last statement: SELECT ?, ?")
    assert said[2].startswith("  test_pool_timeout_names_") and ".unlabelled in the export for " in said[2]
    assert "idle in transaction for " in said[2] and said[2].endswith("INSERT INTO t VALUES (?)")
    assert len(said) == 4 and "more being opened" not in str(error)
    assert "a parameter" not in repr(error) and "in the text" not in repr(error.holders) and "4711" not in str(error)


def test_pool_timeout_says_how_many_are_being_opened(run, managed):
    """They are in use, and nobody holds them yet."""
    manager = managed(options={"pool_size": 1})

    async def main():
        opening, go_on = asyncio.Event(), asyncio.Event()

        @event.listens_for(manager.engine().sync_engine, "do_connect")
        def slow(dialect, record, args, arguments):
            async def connect(*args, **arguments):
                opening.set()
                await go_on.wait()
                raise OSError("not at all")

            arguments["async_creator_fn"] = connect

        first = asyncio.create_task(manager.engine().connect().start())
        await opening.wait()
        with pytest.raises(PoolTimeout, match="1 more being opened") as caught:
            await manager.engine().connect()
        go_on.set()
        with pytest.raises(OSError):
            await first
        assert caught.value.in_use == 1 and caught.value.holders == ()
        nothing_left(manager)

    run(main)


# -- the place ---------------------------------------------------------------------------------------------------------


async def by_proxy(manager):
    await manager.get().execute(text("SELECT 1"))  # by_proxy


async def by_session(manager):
    await manager.get()().connection()  # by_session


async def by_own_function(manager):
    async def query():
        return await manager.get().scalar(text("SELECT 1"))  # by_own_function

    await query()


async def by_engine(manager):
    return await manager.engine().connect()  # by_engine


async def by_begin(manager):
    async with manager.engine().begin():  # by_begin
        return held(manager)[0]


async def by_raw_connection(manager):
    return await manager.engine().raw_connection()  # by_raw_connection


async def by_stream(manager):
    async for _ in await manager.get().stream(text("SELECT 1")):  # by_stream
        return held(manager)[0]


async def by_generator(manager):
    async def rows():
        yield await manager.get().scalar(text("SELECT 1"))  # by_generator

    async for _ in rows():
        return held(manager)[0]


async def by_timeout(manager):
    async with asyncio.timeout(10):
        await manager.get().execute(text("SELECT 1"))  # by_timeout


async def by_run_sync(manager):
    def work(session):
        session.execute(text("SELECT 1"))  # by_run_sync

    await manager.get()().run_sync(work)


async def by_listener(manager):
    session = manager.get()()
    found = []

    @event.listens_for(session.sync_session, "before_flush")
    def listener(sync_session, *_):
        sync_session.connection()  # by_listener
        found.append(held(manager)[0])

    session.sync_session.info["flush"] = True
    await session.run_sync(lambda sync_session: sync_session.dispatch.before_flush(sync_session, None, None))
    return found[0]


async def by_other_session(manager):
    session = AsyncSession(manager.engine())
    await session.execute(text("SELECT 1"))  # by_other_session
    return session


async def by_transaction(manager):
    found = []

    async def work(session):
        await session.execute(text("SELECT 1"))  # by_transaction
        found.append(held(manager)[0])

    await manager.run_in_transaction(work)
    return found[0]


async def by_middleware(manager):
    found = []

    async def app(scope, receive, send):
        await manager.get().execute(text("SELECT 1"))  # by_middleware
        found.append(held(manager)[0])

    await aio.DBSessionMiddleware(app)({"type": "http", "method": "GET", "path": "/orders/7"}, None, None)
    assert found[0].scope == "GET /orders/7"
    return found[0]


@pytest.mark.parametrize(
    "use",
    [
        *(by_proxy, by_session, by_own_function, by_engine, by_begin, by_raw_connection, by_stream, by_generator),
        *(by_timeout, by_run_sync, by_listener, by_other_session, by_transaction, by_middleware),
    ],
    ids=lambda use: use.__name__,
)
@pytest.mark.parametrize("poolclass", [None, pool.NullPool, pool.StaticPool])
def test_place_is_the_line_outside_sqlalchemy_and_dbsession(run, managed, use, poolclass):
    """Also the second time, when what is between is known."""
    manager = managed(options={"poolclass": poolclass, "pool_size": 2, "pool_timeout": 1} if poolclass is None else {})
    if poolclass is not None:
        manager = managed_with(manager, poolclass)

    async def main():
        for _ in range(2):
            async with manager.scope():
                given = await use(manager)
                holder = given if isinstance(given, Holder) else held(manager)[0]
                assert holder.place.startswith(line_of(use.__name__)), holder
                assert holder.stack[0] == holder.place and 1 <= len(holder.stack) <= STACK_FRAMES
                assert all("/asyncio/" not in place for place in holder.stack), "the loop's own"
                if given is not holder and given is not None:
                    closed = given.close()
                    if closed is not None:
                        await closed
        nothing = manager.database("default").held.notes()
        assert not nothing or poolclass is pool.StaticPool

    run(main)


def managed_with(manager, poolclass):
    url = str(manager.present().lookup("default").url)
    return aio.SessionManager({"default": {"url": url, "options": {"poolclass": poolclass}}})


def test_place_is_unknown_where_the_task_is_sqlalchemys_alone(run, managed):
    """As `asyncio.create_task(connection.start())`: who made the task, nobody can tell; the lines of whoever runs the
    loop are not those of the checkout."""
    manager = managed()

    async def main():
        connection = await asyncio.create_task(manager.engine().connect().start())
        (holder,) = held(manager)
        assert holder.stack == ("an unknown place",) and holder.scope.startswith("AsyncConnection.start in Task-")
        await connection.close()

    run(main)


def test_whole_stack_ends_with_the_task(run, managed):
    manager = managed()

    async def outer():
        return await inner()

    async def inner():
        return await manager.engine().connect()

    async def main():
        manager.database("default").held.note_whole_stacks()
        connection = await asyncio.create_task(outer())
        (holder,) = held(manager)
        assert [place.rpartition(".")[2] for place in holder.stack] == ["inner", "outer"]
        await connection.close()

    run(main)


def test_place_of_a_listeners_checkout_is_the_line_that_awaits_until_whole_stacks_are_noted(run, managed):
    """The frames inside SQLAlchemy's greenlet would cost each checkout as much as all of the note."""
    manager = managed()

    async def main():
        engine, found = manager.engine(), []

        @event.listens_for(engine.sync_engine, "engine_connect")
        def listener(connection):
            if not found:
                found.append(None)
                with engine.sync_engine.connect():  # nested
                    found.append(held(manager)[1])

        async with engine.connect():  # awaits
            pass
        assert found[1].place.startswith(line_of("awaits"))
        manager.database("default").held.note_whole_stacks()
        found.clear()
        async with engine.connect():
            pass
        assert found[1].place.startswith(line_of("nested"))

    run(main)


# -- who ---------------------------------------------------------------------------------------------------------------


def test_scope_is_that_of_the_session_or_else_of_the_checkout(run, managed):
    manager = managed()

    async def main():
        async with manager.scope("outer"):
            session = manager.get()()
            async with manager.scope("inner"):
                await session.execute(text("SELECT 1"))  # the outer one's
                async with manager.engine().connect():
                    assert [each.scope for each in held(manager)] == ["outer", "inner"]
            await session.commit()
            async with manager.engine().connect():
                assert held(manager)[0].scope == "outer"
        async with manager.engine().connect():  # the same connection: no session of an earlier one's is said of it
            (holder,) = held(manager)
            assert holder.scope == holder.greenlet and ".bounded in Task-" in holder.scope

    run(main)


def test_connection_that_another_task_uses_is_said_of_who_took_it(run, managed):
    manager = managed()

    async def main():
        async def take():
            async with manager.scope("the taker"):
                return await manager.engine().connect()

        taker = asyncio.create_task(take(), name="taker")
        connection = await taker

        async def use():
            async with manager.scope("the user"):
                await connection.execute(text("SELECT 'x'"))

        await asyncio.create_task(use())
        (holder,) = held(manager)
        assert holder.scope == "the taker" and holder.greenlet.endswith("take in taker")
        assert holder.statement == "SELECT ?"
        await connection.close()
        nothing_left(manager)

    run(main)


def test_task_that_is_gone_is_said_so_and_not_kept(run, managed):
    manager = managed()

    async def main():
        async def take():
            return await manager.engine().connect()

        task = asyncio.create_task(take())
        connection = await task
        gone = weakref.ref(task)
        del task
        await asyncio.sleep(0)
        gc.collect()
        assert gone() is None
        assert held(manager)[0].greenlet == "a task that is gone"
        await connection.close()
        nothing_left(manager)

    run(main)


def test_checkout_in_a_callback_is_held_by_no_task(run, managed):
    """Somebody steps through a coroutine by hand."""
    manager = managed(options={"pool_pre_ping": False})

    async def main():
        engine = manager.engine()
        await (await engine.connect()).close()  # so that nothing is left to wait for
        stepped = asyncio.get_running_loop().create_future()
        pool = engine.sync_engine.pool

        def step():
            coroutine = greenlet_spawn(pool.connect)
            try:
                coroutine.send(None)
            except StopIteration as end:
                stepped.set_result(end.value)

        asyncio.get_running_loop().call_soon(step)
        connection = await stepped
        (holder,) = held(manager)
        assert holder.scope == holder.greenlet == "no task" and holder.place.endswith("step")
        await greenlet_spawn(connection.close)
        nothing_left(manager)

    run(main)


def test_name_of_a_task_cannot_forge_a_line(run, managed):
    manager = managed()

    async def main():
        connection = await asyncio.create_task(manager.engine().connect().start(), name="a\nERROR forged")
        assert held(manager)[0].greenlet.isprintable() and "ERROR forged" in held(manager)[0].greenlet
        await connection.close()

    run(main)


# -- the state ---------------------------------------------------------------------------------------------------------


def test_state_follows_the_statements(run, managed):
    manager = managed()
    inside, go_on = threading.Event(), threading.Event()

    def wait():
        inside.set()
        assert go_on.wait(DEADLINE_S)

    async def main():
        loop = asyncio.get_running_loop()
        async with manager.engine().connect() as connection:
            assert held(manager)[0].state == "idle"
            raw = await connection.get_raw_connection()
            await raw.driver_connection.create_function("wait", 0, wait)
            running = asyncio.create_task(connection.execute(text("SELECT wait()")))
            await loop.run_in_executor(None, inside.wait, DEADLINE_S)
            (holder,) = held(manager)
            assert (holder.state, holder.statement) == ("executing", "SELECT wait()")
            go_on.set()
            await running
            assert held(manager)[0].state == "idle in transaction"  # SQLAlchemy's
            await connection.rollback()
            assert held(manager)[0].state == "idle"
            await connection.execute(text("CREATE TABLE t (n INTEGER)"))
            await connection.execute(text("INSERT INTO t VALUES (1)"))
            assert held(manager)[0].state == "idle in transaction"
            await connection.commit()
            assert held(manager)[0].state == "idle"
            with pytest.raises(exc.OperationalError):
                await connection.execute(text("SELECT nothing FROM nowhere"))
            assert held(manager)[0].state != "executing"
        nothing_left(manager)

    run(main)


@pytest.mark.parametrize("driver", ["asyncmy", "aiomysql"])
def test_state_on_mariadb(run, mariadb, mariadb_url, proxy, driver):
    url = mariadb_url.replace("pymysql", driver).replace(f":{mariadb.port}/", f":{proxy.port}/")
    manager = aio.SessionManager({"default": {"url": url, "ping_idle_s": 0}})
    states = []

    async def until(state):
        while held(manager)[0].state != state:
            await asyncio.sleep(0.001)
        states.append(state)

    async def main():
        async with manager.engine().connect() as connection:
            await until("idle")
            proxy.stall()
            try:
                running = asyncio.create_task(connection.execute(text("SELECT 1")))
                await until("executing")
            finally:
                proxy.resume()
            await running
            await connection.rollback()
            await connection.execute(text("CREATE TABLE t (n INTEGER) ENGINE=InnoDB"))
            await connection.execute(text("INSERT INTO t VALUES (4711)"))
            await until("idle in transaction")
            proxy.stall()
            try:
                running = asyncio.create_task(connection.commit())
                await until("committing")
            finally:
                proxy.resume()
            await running
            await until("idle")
            result = await connection.stream(text("SELECT seq FROM seq_1_to_50000"))
            await result.fetchone()
            await until("streaming")
            await result.close()
            assert held(manager)[0].state != "streaming"
            assert held(manager)[0].statement == "SELECT seq FROM seq_1_to_50000"
        proxy.stall()
        try:
            running = asyncio.create_task(manager.engine().connect().start())
            while not held(manager):
                await asyncio.sleep(0.001)
            await until("pinging")
        finally:
            proxy.resume()
        await (await running).close()
        nothing_left(manager)
        await manager.dispose()

    run(main)
    assert states == ["idle", "executing", "idle in transaction", "committing", "idle", "streaming", "pinging"]


# -- the note goes with the checkout -----------------------------------------------------------------------------------


async def detach(connection):
    await greenlet_spawn(connection.sync_connection.detach)
    await connection.close()


async def invalidate(connection):
    await connection.invalidate()
    await connection.close()


async def invalidate_and_reconnect(connection):
    await connection.execute(text("SELECT 1"))
    await connection.rollback()
    await connection.invalidate()
    await connection.execute(text("SELECT 1"))
    await connection.close()


async def dispose_first(connection):
    await connection.engine.dispose()
    await connection.close()


@pytest.mark.parametrize("end", [detach, invalidate, invalidate_and_reconnect, dispose_first])
@pytest.mark.parametrize("poolclass", [None, pool.NullPool])
def test_note_ends_with_the_checkout(run, managed, end, poolclass):
    manager = managed() if poolclass is None else managed_with(managed(), poolclass)

    async def main():
        connection = await manager.engine().connect()
        assert len(held(manager)) == 1
        await end(connection)
        assert held(manager) == ()
        stats = manager.database("default").stats
        assert sum(stats.holds.counts) == stats.checkouts >= 1

    run(main)


def test_place_in_the_pool_is_kept_when_the_note_fails(run, managed, monkeypatch):
    """A signal, or the stack's end."""
    manager = managed(options={"pool_size": 1})

    async def main():
        await (await manager.engine().connect()).close()

        def fail(*_):
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(callsites, "noted", fail)
            patched.setattr(holders, "_noted", fail)
            with pytest.raises(KeyboardInterrupt):
                await manager.engine().connect()
        nothing_left(manager)
        async with manager.engine().connect():
            assert len(held(manager)) == 1

    run(main)


def test_note_keeps_no_frame(run, managed):
    """Nor anything that one uses, whether the way to the pool is known or not."""
    manager = managed()

    class Used:
        pass

    async def main():
        for _ in range(2):
            used = Used()
            gone = weakref.ref(used)
            connection = await manager.engine().connect()
            gc.disable()
            try:
                del used
                assert gone() is None
                fairy = weakref.ref(await connection.get_raw_connection())
                await connection.close()
                del connection
                assert fairy() is None
            finally:
                gc.enable()

    run(main)


def test_statement_is_not_kept_after_the_return(run, managed):
    manager = managed(options={"pool_size": 1})

    async def main():
        async with manager.engine().connect() as connection:
            await connection.execute(text("SELECT 1"))
            record = (await connection.get_raw_connection())._connection_record
            note = record.record_info[CHECKOUT]
            assert note.statement == "SELECT 1"
        assert note.statement is None and not note.in_use
        async with manager.engine().connect():
            assert held(manager)[0].statement is None

    run(main)
