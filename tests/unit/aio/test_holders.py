"""Which task holds a connection, and where it is; what both halves have is in core/pool."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.util import await_, greenlet_spawn

from dbsession import aio
from dbsession.aio.holders import HeldByTasks
from dbsession.core.pool import callsites
from dbsession.core.sql import masked
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
def proxy(server):
    with Proxy(server.port) as proxy:
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


async def sleeps(manager):
    async with manager.engine().connect():
        await asyncio.sleep(DEADLINE_S)  # sleeps


async def waits_within_a_bound(manager):
    async with manager.engine().connect(), asyncio.timeout(DEADLINE_S):
        await asyncio.wait_for(asyncio.Event().wait(), DEADLINE_S)  # waits_within_a_bound


async def own_function(manager):
    async def inner():
        await asyncio.sleep(DEADLINE_S)  # own_function

    async with manager.scope("a job"):
        await manager.get().execute(text("SELECT 1"))
        await inner()


async def generator(manager):
    async def rows():
        async with manager.engine().connect():
            yield 1
            await asyncio.sleep(DEADLINE_S)  # generator

    async for _ in rows():
        pass


async def executes(manager):
    async with manager.engine().connect() as connection:
        raw = await connection.get_raw_connection()
        await raw.driver_connection.create_function("pause", 0, manager.paused.wait)
        manager.paused.begun = True
        await connection.execute(text("SELECT pause()"))  # executes


async def run_sync(manager):
    def work(session):
        session.execute(text("SELECT 1"))
        await_(asyncio.sleep(DEADLINE_S))  # run_sync

    async with AsyncSession(manager.engine()) as session:
        await session.run_sync(work)


async def middleware(manager):
    async def app(scope, receive, send):
        await manager.get().execute(text("SELECT 1"))
        await asyncio.sleep(DEADLINE_S)  # middleware

    await aio.DBSessionMiddleware(app)({"type": "http", "method": "GET", "path": "/orders/7"}, None, None)


WAITS = (sleeps, waits_within_a_bound, own_function, generator, executes, run_sync, middleware)


@pytest.mark.parametrize("use", WAITS, ids=lambda use: use.__name__)
def test_place_is_the_users_line_at_which_the_task_waits(run, managed, use):
    manager = managed()
    manager.paused = threading.Event()

    async def main():
        task = asyncio.create_task(use(manager))
        while not held(manager) or not held(manager)[0].place.startswith(line_of(use.__name__)):
            assert not task.done(), held(manager)
            await asyncio.sleep(0.001)  # SQLite answers in a thread
        (holder,) = held(manager)
        assert holder.stack[0] == holder.place and holder.stack[-1].endswith(f" in {use.__name__}")
        assert not any("/asyncio/" in site or "sqlalchemy" in site for site in holder.stack)
        manager.paused.set()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    run(main)


def test_place_of_a_task_that_runs_is_where_it_asks(run, managed):
    """In its own coroutines, and in a greenlet of SQLAlchemy's."""
    manager, found = managed(), []

    def ask():
        found.append(held(manager)[0])  # asks

    def work(_):
        ask()  # in a run_sync() function

    async def main():
        async with manager.scope():
            await manager.get().execute(text("SELECT 1"))
            ask()  # in a coroutine
            await manager.get()().run_sync(work)  # awaits the run_sync() function

    run(main)
    one, other = ([line_of(part) for part in parts] for parts in PARTS)
    for holder, lines in zip(found, (one, other), strict=True):
        assert len(holder.stack) == len(lines) + 2, "to the task's own coroutine, and not on to whoever runs the loop"
        assert all(site.startswith(line) for site, line in zip(holder.stack[1:], lines, strict=False)), holder.stack


PARTS = (("asks", "in a coroutine"), ("asks", "in a run_sync() function", "awaits the run_sync() function"))


@pytest.mark.parametrize("where", ["in a coroutine", "in a greenlet of SQLAlchemy's"])
def test_place_of_a_task_that_blocks_its_loop_is_told_from_another_thread(run, managed, where):
    manager, found = managed(), []

    def block(database):
        seen = threading.Event()

        def look():
            while not found or not found[-1].place.startswith(line_of("blocks")):  # start() waits, too
                found[:] = database.held.holders()
            seen.set()

        threading.Thread(target=look).start()
        assert seen.wait(DEADLINE_S)  # blocks

    async def main():
        await asyncio.create_task(blocks())

    async def blocks():
        async with manager.scope():
            await manager.get().execute(text("SELECT 1"))
            database = manager.database("default")
            if where == "in a coroutine":
                block(database)
            else:
                await manager.get()().run_sync(lambda _: block(database))

    run(main)
    (holder,) = found
    assert holder.stack[-1].endswith(".blocks")


def test_task_that_stops_while_its_thread_is_looked_at_is_not_taken_for_the_one_that_runs_there():
    async def waits():
        await asyncio.sleep(0)  # where it waits

    waiting = waits()
    waiting.send(None)
    runs = [True, False]  # when it is asked

    class Task:
        def done(self):
            return False

        def get_coro(self):
            return Coroutine()

    class Coroutine:
        cr_frame, cr_await = waiting.cr_frame, waiting.cr_await

        @property
        def cr_running(self):
            return runs.pop(0)

    task = Task()
    note = SimpleNamespace(taker=lambda: task, thread=threading.main_thread().ident)
    found = []
    thread = threading.Thread(target=lambda: found.extend(callsites.written(HeldByTasks().stack_of(note))))
    thread.start()
    thread.join(DEADLINE_S)
    assert [site.startswith(line_of("where it waits")) for site in found] == [True] and not runs
    waiting.close()


def test_stack_ends_though_what_is_awaited_refers_to_who_awaits_it(run, managed):
    class Gate:
        def __init__(self):
            self.future = asyncio.get_running_loop().create_future()

        def __await__(self):
            return self

        def __next__(self):  # as a Future's own iterator, once
            self.future._asyncio_future_blocking = not self.future.done()
            if self.future.done():
                raise StopIteration
            return self.future

    manager = managed()

    async def main():
        gate = Gate()

        async def holds():
            await manager.get().execute(text("SELECT 1"))
            await gate  # at the gate

        gate.waiting = holds()
        task = asyncio.create_task(gate.waiting)
        while task.get_coro().cr_await is not gate:
            await asyncio.sleep(0)
        (holder,) = held(manager)
        assert [site.startswith(line_of("at the gate")) for site in holder.stack] == [True]
        gate.future.set_result(None)
        await task

    run(main)


def test_call_site_is_unknown_where_the_task_is_sqlalchemys_alone(run, managed):
    """As `asyncio.create_task(connection.start())`: who made the task, nobody can tell; the lines of whoever runs the
    loop are not those of the checkout."""
    manager = managed()

    async def main():
        manager.get()
        manager.database("default").held.recording = True
        connection = await asyncio.create_task(manager.engine().connect().start())
        (holder,) = held(manager)
        assert holder.taken_at == () and holder.scope.startswith("AsyncConnection.start in Task-")
        await connection.close()

    run(main)


# -- who ---------------------------------------------------------------------------------------------------------------


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
        assert holder.scope == holder.greenlet == "no task" and holder.place == "an unknown place"
        await greenlet_spawn(connection.close)
        nothing_left(manager)

    run(main)


# -- the state ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("server", "driver"),
    [
        pytest.param("mariadb", "asyncmy", marks=pytest.mark.mariadb),
        pytest.param("mariadb", "aiomysql", marks=pytest.mark.mariadb),
        pytest.param("postgresql", "psycopg", marks=pytest.mark.postgresql),
        pytest.param("postgresql", "asyncpg", marks=pytest.mark.postgresql),
    ],
    indirect=["server"],
)
def test_state_on_a_server(run, server, server_url, proxy, driver):
    url = server.url(urlsplit(server_url).path[1:], port=proxy.port, driver=driver)
    streamed = "SELECT seq FROM seq_1_to_50000" if "mysql" in url else "SELECT generate_series(1, 50000)"
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
            await connection.execute(text("CREATE TABLE t (n INTEGER)"))
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
            result = await connection.stream(text(streamed))
            await result.fetchone()
            await until("streaming")
            await result.close()
            assert held(manager)[0].state != "streaming"
            assert held(manager)[0].statement == masked(streamed, manager.engine().dialect.name)
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
