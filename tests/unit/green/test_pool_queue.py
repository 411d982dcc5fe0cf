"""What SQLAlchemy's own tests claim of its QueuePool, claimed of FairPool: counts, limits, waiters, order.

Claimed again, from PoolTest and QueuePoolTest, here: counts with close() and with the collector, unlimited sizes,
overflow that is closed and not kept, threads at the limit, a connect that fails or hangs, waiters when the pool is
invalidated, recreate, dispose, LIFO and FIFO. In test_pool_reconnect.py: info and record_info, recycling,
invalidation, failures to reconnect, pre-ping, detach, double checkin. In test_pool_events.py: PoolEventsTest,
PoolFirstConnectSyncTest and ResetOnReturnTest. In test_pool.py, since before: timeouts, killed waiters.

Not claimed: the other pool classes; asyncio; a creator's signature; what is a matter of SQLAlchemy's records and
engines alone (a record without a pool, one invalidated inside its own checkout, what an engine tells the reset event)
or of its queue (the race for `queue.Empty`, its clock). Claimed differently: what is in use at a dispose() is closed
when it comes back, where QueuePool keeps it.
"""

from __future__ import annotations

import gc
import threading

import gevent
import gevent.event
import pytest

from dbsession.green.pool import FairPool
from support.drivers import Driver
from support.waiting import wait_until


@pytest.fixture
def driver():
    return Driver()


def make(driver, size=1, overflow=0, **more):
    return FairPool(driver.connect, pool_size=size, max_overflow=overflow, timeout=more.pop("timeout", 5.0), **more)


def status(pool):
    return pool.size(), pool.checkedin(), pool.overflow(), pool.checkedout()


@pytest.mark.parametrize("give_up", ["close", "drop"])
def test_counts_are_right_whether_connections_are_closed_or_dropped(driver, give_up):
    pool, held = make(driver, 3, -1), {}

    def end(*names):
        for name in names:
            if give_up == "close":
                held[name].close()
            del held[name]
        gc.collect()

    for n in range(6):
        held[n] = pool.connect()
        assert status(pool) == (3, 0, n - 2, n + 1)
    end(3, 2, 1)
    assert status(pool) == (3, 3, 3, 3)
    end(0, 4, 5)
    assert status(pool) == (3, 3, 0, 0) and driver.open() == 3
    held.update({0: pool.connect(), 1: pool.connect()})
    assert status(pool) == (3, 1, 0, 2)
    end(1)
    assert status(pool) == (3, 2, 0, 1)
    end(0)


@pytest.mark.parametrize("max_overflow", [42, 0, -5, 1])
def test_size_of_zero_means_no_limit_and_no_overflow(driver, max_overflow):
    pool = make(driver, 0, max_overflow)
    held = [pool.connect() for _ in range(50)]
    assert pool.overflow() == 0 and pool.checkedout() == 50
    for connection in held:
        connection.close()
    assert pool.checkedin() == 50 and driver.open() == 50


def test_overflow_connections_are_closed_once_and_the_others_kept(driver):
    pool = make(driver, 2, 2)
    for _ in range(5):
        for connection in [pool.connect() for _ in range(4)]:
            connection.close()
    assert sorted(connection.closed for connection in driver.opened) == [0] * 2 + [1] * 10
    assert status(pool) == (2, 2, 0, 0)


@pytest.mark.parametrize("max_overflow", [0, 5])
def test_threads_never_go_beyond_the_limit(driver, max_overflow):
    pool, peaks = make(driver, 3, max_overflow, timeout=30), []

    def use():
        for _ in range(10):
            connection = pool.connect()
            peaks.append(pool.overflow())
            connection.close()

    threads = [threading.Thread(target=use) for _ in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(peaks) == 400 and max(peaks) <= max_overflow and pool.checkedout() == 0
    pool.dispose()
    assert driver.open() == 0


def test_nothing_connects_in_recreate_and_dispose_and_settings_are_kept(driver):
    driver.down = True
    more = {"recycle": 30, "use_lifo": True, "reset_on_return": None, "pre_ping": True, "logging_name": "a"}
    pool = make(driver, 2, 3, timeout=7, **more)
    pool.cleaning = driver.connect
    pool.dispose()
    again = pool.recreate()
    assert type(again) is FairPool and again is not pool
    for name in ("_creator", "_recycle", "_reset_on_return", "_pre_ping", "logging_name", "cleaning"):
        assert getattr(again, name) == getattr(pool, name), name
    assert (again.size(), again.timeout(), again._lifo, again._limit, again._max_idle) == (2, 7, True, 5, 2)


def test_failed_connect_gives_its_overflow_back(driver):
    pool = make(driver, 2, 3)
    held = [pool.connect() for _ in range(3)]
    driver.down = True
    with pytest.raises(OSError):
        pool.connect()
    assert pool.overflow() == 1 and pool.checkedout() == len(held)


def test_connect_that_hangs_holds_nobody_else_up(driver):
    never, hangs = gevent.event.Event(), []

    def creator():
        if gevent.getcurrent() in hangs:
            never.wait(10)
        return driver.connect()

    pool = FairPool(creator, pool_size=2, max_overflow=1)
    hangs.append(gevent.spawn(pool.connect))
    gevent.sleep(0)
    for _ in range(10):
        held = [pool.connect() for _ in range(2)]
        for connection in held:
            connection.close()
    assert pool.checkedout() == 1 and len(driver.opened) == 2
    never.set()
    hangs[0].get(timeout=5).close()
    assert status(pool) == (2, 2, 0, 0)


@pytest.mark.parametrize("timeout", [None, 30])
@pytest.mark.parametrize("max_overflow", [0, 3])
def test_threads_that_wait_are_served_when_the_pool_is_invalidated(driver, timeout, max_overflow):
    pool, served = make(driver, 2, max_overflow, timeout=timeout), []
    held = [pool.connect() for _ in range(2 + max_overflow)]

    def use():
        connection = pool.connect()
        served.append(connection.dbapi_connection)
        connection.close()

    threads = [threading.Thread(target=use, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    wait_until(lambda: pool.waiting() == 3, 10)
    pool._invalidate(held[0])  # what an engine calls when it sees that the server is gone
    for thread in threads:
        thread.join(10)
    assert len(served) == 3 and not {held[1].dbapi_connection} & set(served)
    for connection in held[1:]:
        connection.close()
    assert pool.checkedout() == 0 and driver.open() == pool.checkedin() <= 2


def test_connection_in_a_with_block_comes_back_also_after_an_error(driver):
    pool = make(driver)
    with pytest.raises(ValueError), pool.connect():
        assert pool.checkedout() == 1
        raise ValueError
    assert status(pool) == (1, 1, 0, 0)


def test_dispose_closes_the_idle_ones_now_and_those_in_use_on_return(driver):
    pool = make(driver, 2)
    used, idle = pool.connect(), pool.connect()
    idle.close()
    pool.dispose()
    assert [one.closed for one in driver.opened] == [0, 1]
    used.close()
    assert [one.closed for one in driver.opened] == [1, 1] and status(pool) == (2, 0, -2, 0)


@pytest.mark.parametrize("use_lifo, expected", [(True, [2, 2, 1, 1, 0]), (False, [0, 1, 2, 0, 2])])
def test_idle_connections_are_taken_from_the_end_that_use_lifo_says(driver, use_lifo, expected):
    pool = make(driver, 3, use_lifo=use_lifo)
    held = [pool.connect() for _ in range(3)]
    for connection in held:
        connection.close()

    def take():
        connection = pool.connect()
        taken.append(driver.opened.index(connection.dbapi_connection))
        return connection

    taken = []
    take().close()  # goes back behind the others, or on top
    first = take()
    second = take()
    second.close()
    again = take()
    last = take()
    assert taken == expected
    for connection in (first, again, last):
        connection.close()
