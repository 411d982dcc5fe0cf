"""The pool: first come, first served; no place and no wake-up lost, whatever happens to those who wait."""

from __future__ import annotations

import gc
import random
import threading

import gevent
import pytest
from sqlalchemy import exc
from sqlalchemy.pool import QueuePool

from dbsession.green.pool import FairPool
from support.pools import Connection, counts, make
from support.processes import run_python
from support.waiting import wait_until


@pytest.fixture(autouse=True)
def none_open():
    Connection.opened = 0


def take(pool, order, name):
    connection = pool.connect()
    order.append(name)
    gevent.sleep(0)
    connection.close()


def test_is_a_queue_pool_with_its_counts():
    pool = make(3, 2)
    assert isinstance(pool, QueuePool)
    assert (pool.size(), pool.overflow(), pool.timeout()) == (3, -3, 5.0)
    held = [pool.connect() for _ in range(5)]
    assert counts(pool) == (5, 0, 0) and pool.overflow() == 2 and Connection.opened == 5
    for connection in held:
        connection.close()
    assert counts(pool) == (0, 3, 0) and Connection.opened == 3
    assert "Pool size: 3  Connections in pool: 3" in pool.status()
    pool.dispose()
    assert counts(pool) == (0, 0, 0) and Connection.opened == 0
    again = pool.recreate()
    assert type(again) is FairPool and (again.size(), again._limit) == (3, 5)


@pytest.mark.parametrize("lifo, expected", [(False, [0, 1]), (True, [1, 0])])
def test_idle_connections_are_used_in_the_order_that_use_lifo_says(lifo, expected):
    pool = make(2, use_lifo=lifo)
    held = [pool.connect(), pool.connect()]
    drivers = [connection.dbapi_connection for connection in held]
    for connection in held:
        connection.close()
    again = [pool.connect(), pool.connect()]
    assert [drivers.index(connection.dbapi_connection) for connection in again] == expected


def test_unlimited_sizes():
    for pool in (make(0), make(2, -1)):
        held = [pool.connect() for _ in range(30)]
        assert pool.checkedout() == 30
        for connection in held:
            connection.close()
        assert pool.checkedout() == 0


def test_waiters_are_served_in_their_order_and_nobody_overtakes():
    pool, order = make(), []
    held = pool.connect()
    jobs = [gevent.spawn(take, pool, order, n) for n in range(20)]
    gevent.sleep(0)
    assert pool.waiting() == 20
    held.close()
    late = gevent.spawn(take, pool, order, "late")
    gevent.joinall([*jobs, late], timeout=5, raise_error=True)
    assert order == [*range(20), "late"] and counts(pool) == (0, 1, 0)


def test_looping_greenlets_all_get_the_same_share():
    pool, served, stop = make(5), [0] * 100, []

    def loop(n):
        while not stop:
            connection = pool.connect()
            gevent.sleep(0)
            connection.close()
            served[n] += 1

    jobs = [gevent.spawn(loop, n) for n in range(100)]
    while sum(served) < 5_000:
        gevent.sleep(0)
    stop.append(True)
    gevent.joinall(jobs, timeout=5, raise_error=True)
    jain = sum(served) ** 2 / (len(served) * sum(n * n for n in served))
    assert min(served) > 0 and jain >= 0.98


def test_waiter_killed_in_the_tick_in_which_it_is_served_hands_on():
    pool, order = make(), []
    held = pool.connect()
    first, second = (gevent.spawn(take, pool, order, n) for n in (1, 2))
    gevent.sleep(0)
    gevent.get_hub().loop.run_callback(first.throw, gevent.GreenletExit())  # runs before what held.close() schedules
    held.close()
    with gevent.Timeout(20):
        second.join()
    assert order == [2] and counts(pool) == (0, 1, 0)


def test_waiter_that_times_out_says_so_and_leaves_the_line():
    pool = make(timeout=0.02)
    held = pool.connect()
    with pytest.raises(exc.TimeoutError, match="QueuePool limit of size 1 overflow 0 reached"):
        gevent.spawn(pool.connect).get()
    assert counts(pool) == (1, 0, 0)
    held.close()
    pool.connect().close()


def test_place_of_an_invalidated_connection_goes_to_the_next_waiter():
    pool, order = make(), []
    held = pool.connect()
    job = gevent.spawn(take, pool, order, 1)
    gevent.sleep(0)
    held.invalidate()
    held.close()
    job.get(timeout=5)
    assert order == [1] and counts(pool) == (0, 1, 0) and Connection.opened == 1


def test_place_of_a_connect_that_failed_goes_to_the_next_waiter():
    outcomes = [OSError("refused"), gevent.GreenletExit(), None]

    def creator():
        outcome = outcomes.pop(0) if outcomes else None
        gevent.sleep(0.001)
        if outcome:
            raise outcome
        return Connection()

    pool = make(creator=creator)

    def use():
        try:
            pool.connect().close()
        except BaseException as error:
            return type(error)

    jobs = [gevent.spawn(use) for _ in range(5)]
    gevent.joinall(jobs, timeout=5)
    assert [job.value for job in jobs] == [OSError, gevent.GreenletExit, None, None, None]
    assert counts(pool) == (0, 1, 0)


def test_kill_while_a_surplus_connection_is_closed_costs_no_place():
    class Slow(Connection):
        def close(self):
            super().close()
            gevent.sleep(0.01)

    pool = make(1, 1, creator=Slow)

    def use():
        held = pool.connect(), pool.connect()
        held[0].close()
        held[1].close()

    job = gevent.spawn(use)
    gevent.sleep(0)
    job.kill()
    assert pool.checkedout() == 0
    held = [pool.connect() for _ in range(2)]
    assert pool.checkedout() == 2
    del held


def test_dispose_serves_those_who_wait_and_keeps_nothing():
    pool, order = make(2), []
    held = [pool.connect(), pool.connect()]
    jobs = [gevent.spawn(take, pool, order, n) for n in range(4)]
    gevent.sleep(0)
    pool.dispose()
    for connection in held:
        connection.close()
    gevent.joinall(jobs, timeout=5, raise_error=True)
    assert sorted(order) == [0, 1, 2, 3] and counts(pool) == (0, 0, 0) and Connection.opened == 0


def test_connection_that_the_collector_finds_under_the_lock_comes_back():
    """A collection in the middle of a checkout, by the thread that holds the lock."""
    pool = make(2)
    dropped = pool.connect()
    dropped.cycle = dropped
    del dropped
    with pool._lock:
        gc.collect()
        assert len(pool._returned) == 1
    connection = pool.connect()
    assert pool.checkedout() == 1
    connection.close()
    assert counts(pool) == (0, pool.checkedin(), 0)


def test_plain_threads_wait_in_line_too():
    pool, total, out = make(3), [], []

    def use():
        for _ in range(50):
            connection = pool.connect()
            out.append(pool.checkedout())
            connection.close()
            total.append(1)

    threads = [threading.Thread(target=use) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(total) == 1000 and max(out) <= 3 and counts(pool)[0] == 0 and counts(pool)[2] == 0


def test_threads_and_greenlets_share_one_line():
    pool, done = make(2), []

    def use(n):
        for _ in range(30):
            connection = pool.connect()
            gevent.sleep(0) if n % 2 else None
            connection.close()
        done.append(n)

    threads = [threading.Thread(target=use, args=(2 * n,)) for n in range(4)]
    jobs = [gevent.spawn(use, 2 * n + 1) for n in range(4)]
    for thread in threads:
        thread.start()
    gevent.joinall(jobs, timeout=20, raise_error=True)
    wait_until(lambda: len(done) == 8, 20)
    assert counts(pool)[0] == 0 and counts(pool)[2] == 0


def test_kills_timeouts_invalidations_and_failures_lose_no_place():
    seed = random.randrange(10**6)
    chance = random.Random(seed)

    def creator():
        gevent.sleep(0)
        if chance.random() < 0.02:
            raise OSError
        return Connection()

    pool = make(4, 2, timeout=0.02, creator=creator)

    def use():
        connection = pool.connect()
        try:
            gevent.sleep(chance.choice((0, 0, 0.001)))
            if chance.random() < 0.05:
                connection.invalidate()
        finally:
            connection.close()

    for _ in range(5):
        jobs = [gevent.spawn(use) for _ in range(1000)]
        for job in jobs:
            if chance.random() < 0.3:
                gevent.spawn_later(chance.random() * 0.02, job.kill, block=False)
        with _silent():
            gevent.joinall(jobs, timeout=30)
        assert all(job.dead for job in jobs), seed
    gevent.sleep(0.03)
    assert pool.checkedout() == 0 and pool.waiting() == 0 and pool.checkedin() <= 4, (seed, counts(pool))
    assert Connection.opened == pool.checkedin(), seed


class _silent:
    """The errors of the greenlets above are expected: gevent would print each."""

    def __enter__(self):
        self._hub = gevent.get_hub()
        self._old, self._hub.print_exception = self._hub.print_exception, lambda *_: None

    def __exit__(self, *_):
        self._hub.print_exception = self._old


def test_f19_connection_belongs_to_the_hub_that_opened_it(mariadb_url):
    """Main, a threadpool job, main, a job, then both at once, over a pool that is smaller than their number."""
    run_python(
        """
        from gevent import monkey; monkey.patch_all()
        import sys
        import gevent, dbsession
        from sqlalchemy import text
        from support.waiting import wait_until
        dbsession.configure({"default": {"url": sys.argv[1], "options": {"pool_size": 3}}})
        session, engine = dbsession.get_dbsession(), dbsession.get_engine()
        def use(token):
            with dbsession.session_scope():
                assert session.scalar(text("SELECT :t"), {"t": token}) == token
                assert engine.pool.checkedout() <= 3
        pool = gevent.get_hub().threadpool
        for n in range(10):
            use(f"main {n}")
            pool.apply(use, (f"job {n}",))
        for _ in range(10):
            jobs = [gevent.spawn(use, f"greenlet {n}") for n in range(6)]
            jobs += [pool.spawn(use, f"job {n}") for n in range(6)]
            for job in jobs:
                job.get(timeout=20)
        wait_until(lambda: engine.pool.checkedout() == 0, 20)  # some are closed aside
        assert engine.pool.checkedin() <= 3
        dbsession.dispose()
        """,
        mariadb_url,
    )


def test_f19_idle_connections_of_a_thread_that_is_gone_make_room(mariadb_url):
    run_python(
        """
        from gevent import monkey; monkey.patch_all()
        import sys
        import gevent, dbsession
        from gevent.monkey import get_original
        from sqlalchemy import text
        from support.waiting import wait_until
        gevent.get_hub()  # two threads that make the first ones at once may wait for each other in gevent's import
        dbsession.configure({"default": {"url": sys.argv[1], "options": {"pool_size": 2, "pool_timeout": 20}}})
        session, engine, done = dbsession.get_dbsession(), dbsession.get_engine(), []
        def use():
            with dbsession.session_scope():
                done.append(session.scalar(text("SELECT 1")))
        for n in range(1, 7):
            get_original("_thread", "start_new_thread")(use, ())
            wait_until(lambda: len(done) == n and engine.pool.checkedout() == 0, 20)
            assert engine.pool.checkedin() <= 2
        use()
        assert engine.pool.checkedout() == 0
        """,
        mariadb_url,
    )
