"""The asyncio pool: first come, first served; no place and no cancellation lost, whatever happens to those who wait."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
import warnings
import weakref
from collections import OrderedDict

import pytest
from sqlalchemy import exc, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.util import await_, greenlet_spawn

from dbsession.aio import pool as pool_module
from dbsession.aio.pool import FairPool
from dbsession.errors import PoolTimeout
from support.drivers import Driver
from support.loops import LOOPS, in_loop


@pytest.fixture(params=LOOPS)
def run(request):
    return in_loop(request.param)


@pytest.fixture
def driver():
    return Driver()


@pytest.fixture
def url(tmp_path):
    return f"sqlite+aiosqlite:///{tmp_path}/a.db"


def make(driver, size=1, overflow=0, **more):
    return FairPool(driver.connect, pool_size=size, max_overflow=overflow, timeout=more.pop("timeout", 30.0), **more)


def take(pool):
    return greenlet_spawn(pool.connect)


def give(connection):
    """Goes on in the same step of the loop, as the driver of these tests has nothing to wait for."""
    return greenlet_spawn(connection.close)


def counts(pool):
    return pool.checkedout(), pool.checkedin(), pool.waiting()


async def in_line(pool, number):
    while pool.waiting() != number:
        await asyncio.sleep(0)


async def use(pool, order, name):
    connection = await take(pool)
    try:
        order.append(name)
        await asyncio.sleep(0)
    finally:
        await give(connection)


def drop(held):
    """As a garbage collection does, which may come at any line."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", exc.SAWarning)  # SQLAlchemy advises against dropping
        held.clear()


def drop_in_thread(held):
    thread = threading.Thread(target=drop, args=(held,))
    thread.start()
    thread.join(10)


def test_tasks_are_served_in_their_order_by_an_engine(run, url):
    async def main():
        engine = create_async_engine(url, poolclass=FairPool, pool_size=3, max_overflow=0)
        order = []

        async def one(name):
            async with engine.connect() as connection:
                order.append(name)
                assert await connection.scalar(text("SELECT :name"), {"name": name}) == name

        for connection in [await engine.connect() for _ in range(3)]:
            await connection.close()
        await asyncio.gather(*(one(n) for n in range(50)))
        assert order == list(range(50))
        assert counts(engine.pool) == (0, 3, 0) and engine.pool.held.stats.checkouts == 53
        await engine.dispose()

    run(main)


def test_thousand_tasks_are_served_in_their_order_by_two_connections(run, driver):
    async def main():
        pool, order = make(driver, 2), []
        await asyncio.gather(*(use(pool, order, n) for n in range(1000)))
        assert order == list(range(1000)) and counts(pool) == (0, 2, 0) and len(driver.opened) == 2

    run(main)


def test_newcomer_does_not_overtake_when_a_connection_comes_back_in_its_step(run, driver):
    async def main():
        pool, order = make(driver), []
        held = await take(pool)
        waiter = asyncio.create_task(use(pool, order, "waiter"))
        await in_line(pool, 1)
        await give(held)
        await use(pool, order, "newcomer")
        await waiter
        assert order == ["waiter", "newcomer"]

    run(main)


@pytest.mark.parametrize("when", ["waiting", "before the grant", "after the grant", "by wait_for", "holding"])
def test_cancelled_task_is_cancelled_and_the_next_one_served(run, driver, when):
    async def main():
        pool, order = make(driver), []
        held = await take(pool)
        holds = asyncio.Event()

        async def victim():
            connection = await take(pool)
            try:
                holds.set()
                await asyncio.Event().wait()
            finally:
                await give(connection)

        first = asyncio.create_task(asyncio.wait_for(victim(), 20) if when == "by wait_for" else victim())
        await in_line(pool, 1)
        second = asyncio.create_task(use(pool, order, "next"))
        await in_line(pool, 2)
        if when == "waiting":
            first.cancel()
            await asyncio.wait([first])
            assert counts(pool) == (1, 0, 1)
            await give(held)
        elif when == "before the grant":
            first.cancel()
            await give(held)
        else:
            await give(held)
            if when == "holding":
                await holds.wait()
            first.cancel()
        await asyncio.wait([first, second])
        # Before Python 3.12 wait_for() has a task inside, cancelled only when wait_for() wakes up: it has the
        # connection by then.
        has_held = when == "holding" or (when == "by wait_for" and sys.version_info < (3, 12))
        assert first.cancelled() and holds.is_set() == has_held
        assert order == ["next"] and counts(pool) == (0, 1, 0)
        assert len(driver.opened) == driver.open() == 1

    run(main)


def test_cancellation_at_any_step_costs_no_place(run):
    class Slow(Driver):
        def connect(self):
            await_(asyncio.sleep(0))
            connection = super().connect()
            connection.rollback = lambda: await_(asyncio.sleep(0))
            return connection

    async def cancelled_at(step, number):
        driver = Slow()
        pool, order = make(driver, 1, 1), []
        tasks = [asyncio.create_task(use(pool, order, n)) for n in range(8)]
        for _ in range(step):
            await asyncio.sleep(0)
        cancelled = tasks[number].cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(result) for result in results if result is not None] == [asyncio.CancelledError] * cancelled
        assert counts(pool) == (0, driver.open(), 0) and driver.open() <= 1
        assert sorted({*order, number}) == list(range(8))
        await use(pool, order, "afterwards")
        return cancelled

    async def main():
        cancelled = [await cancelled_at(step, number) for number in range(8) for step in range(30)]
        assert 60 < sum(cancelled) < len(cancelled)  # the last of these steps come after the end

    run(main)


def test_waiter_that_times_out_says_so_and_leaves_the_line(run, driver):
    async def main():
        pool = make(driver, timeout=0.02)
        pool.held.name = "reports"
        held = await take(pool)
        with pytest.raises(PoolTimeout) as raised:
            await take(pool)
        assert str(raised.value).startswith("Database 'reports': QueuePool limit of size 1 overflow 0 reached, ")
        assert "with 1 in use and 0 others waiting." in str(raised.value)
        assert isinstance(raised.value, exc.TimeoutError) and counts(pool) == (1, 0, 0)
        await give(held)
        assert counts(pool) == (0, 1, 0)

    run(main)


def test_connection_goes_to_the_next_one_when_it_comes_back_as_the_first_ones_time_is_up(run, driver, monkeypatch):
    """In the same step: the first one has not woken up yet, and is still in the line."""

    async def main():
        pool, order = make(driver, timeout=0.3), []  # long enough for `second` to come in time
        held = await take(pool)

        def expire(waiter):
            pool_module_expire(waiter)
            with pytest.raises(StopIteration):
                give(held).send(None)

        pool_module_expire = pool_module._expire
        monkeypatch.setattr(pool_module, "_expire", expire)
        first = asyncio.create_task(use(pool, order, "first"))
        await in_line(pool, 1)
        pool._timeout = None
        second = asyncio.create_task(use(pool, order, "second"))
        await asyncio.wait([first, second])
        assert isinstance(first.exception(), PoolTimeout)
        assert second.exception() is None and order == ["second"] and counts(pool) == (0, 1, 0)

    run(main)


def test_waiter_that_is_cancelled_as_its_time_is_up_is_cancelled(run, driver):
    async def main():
        pool, errors = make(driver, timeout=0), []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
        held = await take(pool)
        waiter = asyncio.create_task(use(pool, [], 1))
        await in_line(pool, 1)
        next(iter(pool._waiting)).cancel()  # the timer comes next, before the task wakes up
        await asyncio.wait([waiter])
        assert waiter.cancelled() and not errors
        await give(held)

    run(main)


def test_nothing_is_left_of_a_waiter_who_was_served(run, driver):
    async def main():
        pool = make(driver)
        held = await take(pool)
        task = asyncio.create_task(use(pool, [], 1))
        await in_line(pool, 1)
        waiter = weakref.ref(next(iter(pool._waiting)))
        await give(held)
        await task
        gc.collect()
        assert waiter() is None

    run(main)


def test_no_timeout_means_no_timer(run, driver):
    async def main():
        pool, order = make(driver, timeout=None), []
        held = await take(pool)
        waiter = asyncio.create_task(use(pool, order, 1))
        await in_line(pool, 1)
        await give(held)
        await waiter
        assert order == [1]

    run(main)


@pytest.mark.parametrize("ends", ["fails", "is cancelled"])
def test_right_to_open_is_passed_on_when_who_opens(run, driver, ends):
    async def main():
        go = asyncio.Event()

        def connect():
            await_(go.wait())
            return driver.connect()

        pool, order = FairPool(connect, pool_size=1, max_overflow=0), []
        tasks = [asyncio.create_task(use(pool, order, n)) for n in range(6)]
        await in_line(pool, 5)
        if ends == "fails":
            driver.down = True
            go.set()
        else:
            for n, task in enumerate(tasks):
                await in_line(pool, 5 - n)
                task.cancel()
                await asyncio.wait([task])
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(result) for result in results} == {OSError if ends == "fails" else asyncio.CancelledError}
        assert order == [] and counts(pool) == (0, 0, 0) and pool.overflow() == -1
        driver.down = False
        go.set()
        await use(pool, order, "afterwards")
        assert order == ["afterwards"] and pool.held.stats.unwaited() == 1

    run(main)


def test_invalidated_connection_gives_its_place_to_the_longest_waiter(run, driver):
    async def main():
        pool, order = make(driver), []
        held = await take(pool)
        tasks = [asyncio.create_task(use(pool, order, n)) for n in range(3)]
        await in_line(pool, 3)
        await greenlet_spawn(held.invalidate)
        await asyncio.gather(*tasks)
        assert order == [0, 1, 2] and [one.closed for one in driver.opened] == [1, 0]
        assert counts(pool) == (0, 1, 0)

    run(main)


def test_detached_connection_frees_its_place(run, driver):
    async def main():
        pool, order = make(driver), []
        held = await take(pool)
        waiter = asyncio.create_task(use(pool, order, 1))
        await in_line(pool, 1)
        held.detach()
        await waiter
        assert counts(pool) == (0, 1, 0) and driver.open() == 2

    run(main)


def test_overflow_connections_are_closed_and_the_others_kept(run, driver):
    async def main():
        pool = make(driver, 2, 2)
        for _ in range(3):
            held = [await take(pool) for _ in range(4)]
            assert (pool.size(), pool.overflow(), counts(pool)) == (2, 2, (4, 0, 0))
            assert "Current Overflow: 2 Current Checked out connections: 4" in pool.status()
            for connection in held:
                await give(connection)
            assert (pool.overflow(), counts(pool)) == (0, (0, 2, 0))
        assert driver.open() == 2 and len(driver.opened) == 8

    run(main)


@pytest.mark.parametrize("size, overflow, kept", [(0, 0, 50), (0, 7, 50), (2, -1, 2)])
def test_unlimited_sizes(run, driver, size, overflow, kept):
    async def main():
        pool = make(driver, size, overflow)
        held = [await take(pool) for _ in range(50)]
        assert counts(pool) == (50, 0, 0) and pool.overflow() == (48 if size else 0)
        for connection in held:
            await give(connection)
        assert counts(pool) == (0, kept, 0) and driver.open() == kept

    run(main)


@pytest.mark.parametrize("lifo, expected", [(False, [0, 1]), (True, [1, 0])])
def test_idle_connections_are_used_in_the_order_that_use_lifo_says(run, driver, lifo, expected):
    async def main():
        pool = make(driver, 2, use_lifo=lifo)
        for connection in [await take(pool), await take(pool)]:
            await give(connection)
        again = [await take(pool), await take(pool)]
        assert [driver.opened.index(connection.dbapi_connection) for connection in again] == expected
        for connection in again:
            await give(connection)

    run(main)


def test_waiters_are_served_by_the_old_pool_when_its_engine_is_disposed(run, url):
    async def main():
        engine = create_async_engine(url, poolclass=FairPool, pool_size=2, max_overflow=0)
        old, order, drivers = engine.pool, [], []
        held, idle = await engine.connect(), await engine.connect()

        async def one(name):
            async with engine.connect() as connection:
                order.append(name)
                drivers.append((await connection.get_raw_connection()).driver_connection)

        first = (await held.get_raw_connection()).driver_connection
        tasks = [asyncio.create_task(one(n)) for n in range(3)]
        await in_line(old, 3)
        await engine.dispose()
        assert counts(old) == (2, 0, 3)
        await held.close()
        await asyncio.gather(*tasks)
        assert order == [0, 1, 2] and drivers == [first] * 3 and counts(old) == (1, 0, 0)
        await idle.close()
        assert counts(old) == (0, 0, 0) and old.overflow() == -2
        assert engine.pool is not old and counts(engine.pool) == (0, 0, 0) and engine.pool.held.stats is old.held.stats
        await one("new")
        assert counts(engine.pool) == (0, 1, 0) and drivers[-1] is not first
        await engine.dispose()

    run(main)


def test_dispose_closes_all_idle_ones_also_when_it_is_cancelled(run):
    class Slow(Driver):
        def connect(self):
            connection = super().connect()
            close = connection.close

            def slowly():
                close()
                await_(asyncio.sleep(0))

            connection.close = slowly
            return connection

    async def main():
        driver = Slow()
        pool = make(driver, 3)
        for connection in [await take(pool) for _ in range(3)]:
            await give(connection)
        disposing = asyncio.create_task(greenlet_spawn(pool.dispose))
        await asyncio.sleep(0)
        assert driver.open() == 2
        disposing.cancel()
        await asyncio.wait([disposing])
        assert disposing.cancelled() and driver.open() == 0 and pool.overflow() == -3

    run(main)


def test_recreated_pool_has_the_same_settings_and_no_connection(driver):
    driver.down = True
    more = {"recycle": 30, "use_lifo": True, "reset_on_return": None, "pre_ping": True, "logging_name": "a"}
    pool = make(driver, 2, 3, timeout=7, **more)
    pool.held.name = "reports"
    pool.dispose()
    again = pool.recreate()
    assert type(again) is FairPool and again is not pool
    for name in ("_creator", "_recycle", "_reset_on_return", "_pre_ping", "logging_name", "held"):
        assert getattr(again, name) == getattr(pool, name), name
    assert (again.size(), again.timeout(), again._lifo, again._limit, again._max_idle) == (2, 7, True, 5, 2)


@pytest.mark.parametrize("where", ["same thread", "other thread"])
def test_dropped_connection_gives_its_place_to_a_waiter(run, driver, monkeypatch, where):
    async def main():
        pool, order, served_by = make(driver), [], set()
        held = [await take(pool)]
        waiter = asyncio.create_task(use(pool, order, 1))
        await in_line(pool, 1)
        serve = pool._serve
        monkeypatch.setattr(FairPool, "_serve", lambda _: (served_by.add(threading.get_ident()), serve()))
        if where == "same thread":
            drop(held)
        else:
            drop_in_thread(held)
        await waiter
        assert order == [1] and counts(pool) == (0, 1, 0)
        assert served_by == {threading.get_ident()}  # the waiter's future may be touched by its loop's thread alone

    run(main)


def test_connection_dropped_in_another_thread_is_counted_when_nobody_has_waited(run, driver):
    async def main():
        pool = make(driver, 2)
        held = [await take(pool), await take(pool)]
        drop_in_thread(held)
        assert counts(pool) == (0, 0, 0)
        for connection in [await take(pool), await take(pool)]:
            await give(connection)
        assert counts(pool) == (0, 2, 0)

    run(main)


def test_connection_dropped_in_another_thread_after_the_loop_is_counted(run, driver, caplog):
    pool, held = make(driver), []

    async def main():
        held.append(await take(pool))
        waiter = asyncio.create_task(use(pool, [], 1))
        await in_line(pool, 1)
        waiter.cancel()
        await asyncio.wait([waiter])

    run(main)
    drop_in_thread(held)
    assert counts(pool) == (0, 0, 0) and "Exception during reset" not in caplog.text
    pool.dispose()
    assert pool.overflow() == -1


@pytest.mark.parametrize("waiters", [1, 2])
def test_connection_dropped_while_another_is_handed_on_is_not_forgotten(run, driver, waiters):
    async def main():
        pool, order = make(driver, 2), []
        held, dropped = await take(pool), [await take(pool)]
        tasks = [asyncio.create_task(use(pool, order, n)) for n in range(waiters)]
        await in_line(pool, waiters)

        class Line(OrderedDict):
            def popitem(self, last=True):
                drop(dropped)
                return super().popitem(last)

        pool._waiting = Line(pool._waiting)
        await give(held)
        assert counts(pool) == (waiters, 0, 0) and pool.overflow() == waiters - 2
        await asyncio.gather(*tasks)
        assert order == list(range(waiters)) and counts(pool) == (0, waiters, 0)

    run(main)


def test_connection_dropped_just_before_somebody_waits_for_it_is_theirs(run, driver, monkeypatch):
    async def main():
        pool = make(driver)
        dropped = [await take(pool)]

        def monotonic():
            drop(dropped)
            return 0.0

        monkeypatch.setattr(pool_module, "monotonic", monotonic)
        await give(await take(pool))
        assert counts(pool) == (0, 1, 0)

    run(main)


def test_waiter_is_passed_over_when_its_loop_was_closed_under_it(driver):
    pool, order = make(driver), []
    loop = asyncio.new_event_loop()
    held = loop.run_until_complete(take(pool))
    left = loop.create_task(use(pool, order, "left behind"))
    loop.run_until_complete(in_line(pool, 1))
    loop.close()

    async def main():
        await give(held)
        await use(pool, order, "next")

    asyncio.run(main())
    assert order == ["next"] and counts(pool) == (0, 1, 0) and not left.done()
    left._log_destroy_pending = False


def test_connection_is_cut_off_when_the_pool_is_disposed_where_nothing_can_be_awaited(run, url, caplog):
    before = set(threading.enumerate())

    async def main():
        engine = create_async_engine(url, poolclass=FairPool)
        await (await engine.connect()).close()
        engine.sync_engine.dispose()
        while not set(threading.enumerate()) <= before:  # aiosqlite has a thread for each that is open
            await asyncio.sleep(0)

    run(main)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_asking_where_nothing_can_be_awaited_is_an_error(run, driver):
    async def main():
        pool = make(driver)
        with pytest.raises(exc.MissingGreenlet, match="asked for where nothing can be awaited"):
            pool.connect()
        assert counts(pool) == (0, 0, 0)

    run(main)


def test_checkouts_waits_timeouts_and_holds_are_counted(run, driver):
    async def main():
        pool = make(driver, timeout=0.02)
        stats = pool.held.stats
        held = await take(pool)
        with pytest.raises(PoolTimeout):
            await take(pool)
        pool._timeout = 30.0
        waiter = asyncio.create_task(use(pool, [], 1))
        await in_line(pool, 1)
        await give(held)
        await waiter
        assert (stats.checkouts, stats.timeouts, sum(stats.waits.counts), sum(stats.holds.counts)) == (2, 1, 2, 2)
        assert stats.unwaited() == 1 and stats.holds.sum_s > 0

    run(main)


def test_cancellation_counts_when_the_driver_raises_its_own_error_for_it(driver, run):
    """As asyncio.wait_for() did before Python 3.12. Else its task would wait for the others' connections."""
    connecting, connect = [], driver.connect

    def hanging():
        if not connecting:
            connecting.append(None)
            return connect()
        connecting.append(None)
        try:
            await_(asyncio.sleep(60))
        except asyncio.CancelledError:
            raise ConnectionRefusedError("full") from None

    async def main():
        pool = FairPool(hanging, pool_size=2, timeout=30.0)
        pool.is_full = lambda error: isinstance(error, ConnectionRefusedError)
        first = await take(pool)
        task = asyncio.create_task(take(pool))
        while len(connecting) < 2:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert counts(pool) == (1, 0, 0)
        await give(first)
        pool.dispose()

    run(main)
