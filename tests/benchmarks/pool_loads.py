"""The pools that bench_pool measures, on connections that cost nothing, and the loads it puts on them.

Every pool has `connect()`, which waits for its turn; what that returns has `close()`, which gives the place back.
"""

from __future__ import annotations

import operator
import random
import time
from bisect import bisect_right, insort
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import gevent
import gevent.queue
from dbutils.pooled_db import PooledDB
from sqlalchemy.exc import TimeoutError
from sqlalchemy.pool import QueuePool

from dbsession.green.pool import FairPool

from .common import Metrics, jain, percentile

SIZE = 20
HOLD_S = 0.001
WAIT_S = 120.0
"""Nobody gives up waiting: what that does to the others is measured by `kills`."""

Make = Callable[[], Any]


class FakeConnection:
    def rollback(self) -> None:
        pass

    def commit(self) -> None:
        pass

    def close(self) -> None:
        pass

    def ping(self, *_: object) -> None:
        pass

    def cursor(self) -> FakeConnection:
        return self


class FakeDriver:
    """A DB-API module, as far as DBUtils asks for one."""

    threadsafety = 1
    OperationalError = InterfaceError = InternalError = Error = RuntimeError
    connect = staticmethod(FakeConnection)


class GeventQueue:
    """What one writes around gevent.queue.LifoQueue: the least that a pool can cost, and no SQLAlchemy in it."""

    def __init__(self) -> None:
        self.idle: Any = gevent.queue.LifoQueue()
        for _ in range(SIZE):
            self.idle.put(Held(self))

    def connect(self) -> Held:
        return self.idle.get(timeout=WAIT_S)


class Held:
    def __init__(self, pool: GeventQueue) -> None:
        self.pool = pool

    def close(self) -> None:
        self.pool.idle.put(self)


class DBUtils:
    def __init__(self) -> None:
        self.connect = PooledDB(FakeDriver, maxcached=SIZE, maxconnections=SIZE, blocking=True).dedicated_connection


def sqlalchemy_pool(kind: type[QueuePool], size: int = SIZE, wait_s: float = WAIT_S) -> QueuePool:
    return kind(FakeConnection, pool_size=size, max_overflow=0, timeout=wait_s)


FAIR, QUEUE = "dbsession FairPool", "QueuePool"
POOLS: dict[str, Make] = {
    FAIR: lambda: sqlalchemy_pool(FairPool),
    QUEUE: lambda: sqlalchemy_pool(QueuePool),
    "gevent.queue": GeventQueue,
    "DBUtils PooledDB": DBUtils,
}


def closed_loop(make: Make, clients: int, window_s: float, mark: Callable[[], None] = lambda: None) -> Metrics:
    """So many greenlets that each take a connection, hold it and take the next, for ever. `mark` is called when what is
    counted begins, and when it ends."""
    pool = make()
    served, began = [0] * clients, [0.0] * clients
    longest, over = 0.0, False
    clock = time.perf_counter

    def client(number: int) -> None:
        nonlocal longest
        while not over:
            began[number] = clock()
            connection = pool.connect()
            longest = max(longest, clock() - began[number])
            began[number] = 0.0
            gevent.sleep(HOLD_S)
            connection.close()
            served[number] += 1

    tasks = [gevent.spawn(client, number) for number in range(clients)]
    while not all(map(operator.or_, map(bool, served), map(bool, began))):  # until everybody has come once
        gevent.sleep(0.05)
    mark()
    before, longest = list(served), 0.0
    start, cpu = clock(), time.process_time()
    gevent.sleep(window_s)
    elapsed, cpu = clock() - start, time.process_time() - cpu
    mark()
    counts = [now - then for now, then in zip(served, before, strict=True)]
    waiting = [clock() - since for since in began if since]  # those who never got one have waited, too
    over = True
    gevent.joinall(tasks, timeout=60)
    done = sum(counts)
    return {
        "served": done,
        "ops": done / elapsed,
        "cpu": cpu / done * 1e6,
        "starved": 100 * counts.count(0) / clients,
        "jain": jain(counts),
        "longest": 1000 * max(longest, *waiting, 0.0),
        "wait": max(longest, *waiting, 0.0) / (clients / (done / elapsed)),
    }


class WatchedFairPool(FairPool):
    """Notes to whom it assigns a connection, and in which order: to a waiter when it is taken out of the line, which is
    before its greenlet runs again. (A pool that hands nothing over has assigned nothing before connect() returns.)"""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.assigned: dict[Any, None] = {}
        self._waiting = WatchedLine(self.assigned)

    def _do_get(self) -> Any:
        record = super()._do_get()
        self.assigned.setdefault(gevent.getcurrent())
        return record


class WatchedLine(OrderedDict[Any, None]):
    def __init__(self, assigned: dict[Any, None]) -> None:
        super().__init__()
        self.assigned = assigned
        self.greenlets: dict[Any, Any] = {}

    def __setitem__(self, waiter: Any, value: None) -> None:
        self.greenlets[waiter] = gevent.getcurrent()
        super().__setitem__(waiter, value)

    def popitem(self, last: bool = True) -> tuple[Any, None]:
        waiter, value = super().popitem(last)
        self.assigned[self.greenlets.pop(waiter)] = value
        return waiter, value


def one_shot(make: Make, due: list[float]) -> Metrics:
    """One greenlet for each arrival, at its time, which takes a connection once. What it waited is counted from the
    time when it was due, so that a late generator hides nothing."""
    pool = make()
    clock = time.perf_counter
    waits: list[float] = []
    returned: list[int] = []

    def client(number: int, at: float) -> None:
        connection = pool.connect()
        waits.append(clock() - at)
        returned.append(number)
        gevent.sleep(HOLD_S)
        connection.close()

    tasks = []
    start, cpu = clock(), time.process_time()
    for number, after in enumerate(due):
        early = start + after - clock()
        if early > 0:
            gevent.sleep(early)
        tasks.append(gevent.spawn(client, number, start + after))
    gevent.joinall(tasks, timeout=120)
    elapsed, cpu = clock() - start, time.process_time() - cpu
    assert len(returned) == len(due), "somebody was never served"
    numbers = {task: number for number, task in enumerate(tasks)}
    assigned = [numbers[task] for task in pool.assigned] if isinstance(pool, WatchedFairPool) else returned
    assert len(assigned) == len(due)
    return {
        "rate": len(due) / elapsed,
        "cpu": cpu / len(due) * 1e6,
        "p50": 1000 * percentile(waits, 50),
        "p99": 1000 * percentile(waits, 99),
        "max": 1000 * max(waits),
        "overtaken": most_overtaken(assigned),
        "returned": most_overtaken(returned),
    }


def most_overtaken(order: list[int]) -> int:
    """By how many who came later the unluckiest one was overtaken, where `order` has the number of each arrival."""
    earlier: list[int] = []
    most = 0
    for number in order:
        most = max(most, len(earlier) - bisect_right(earlier, number))
        insort(earlier, number)
    return most


def arrivals(rate: float, seconds: float) -> list[float]:
    """Times at random, the same ones in every run."""
    source, at, due = random.Random(1), 0.0, []
    while at < seconds:
        due.append(at)
        at += source.expovariate(rate)
    return due


def uncontended(make: Make, count: int) -> Metrics:
    pool = make()
    pool.connect().close()
    connect = pool.connect
    start = time.process_time()
    for _ in range(count):
        connect().close()
    return {"us": (time.process_time() - start) / count * 1e6}


def killed_when_notified(kind: type[QueuePool], wait_s: float) -> Metrics:
    """A connection, two waiters; it comes back in the tick in which the first is killed. When is the next served?"""
    pool = sqlalchemy_pool(kind, 1, wait_s)
    failed = 0.0

    def client() -> None:
        nonlocal failed
        try:
            pool.connect().close()
        except TimeoutError:
            failed = 1.0

    connection = pool.connect()
    first, second = gevent.spawn(client), gevent.spawn(client)
    gevent.sleep(0.01)
    assert not first.ready() and not second.ready()
    start = time.perf_counter()
    first.kill(block=False)  # at the end of this tick: until then it is a waiter like any other
    connection.close()
    second.join(timeout=wait_s * 3)
    return {"next": 1000 * (time.perf_counter() - start), "failed": failed}


def kills(kind: type[QueuePool], clients: int) -> Metrics:
    """A third of all is killed at a random time, and others give up waiting: what is lost?"""
    pool = sqlalchemy_pool(kind, 5, 10.0)
    source = random.Random(2)
    served = 0

    def client(patience_s: float) -> None:
        nonlocal served
        with gevent.Timeout(patience_s, False):
            connection = pool.connect()
            try:
                gevent.sleep(HOLD_S)
                served += 1
            finally:
                connection.close()

    def one(after_s: float, patience_s: float, killed_s: float | None) -> None:
        gevent.sleep(after_s)
        task = gevent.spawn(client, patience_s)
        if killed_s is not None:
            gevent.sleep(killed_s)
            task.kill(block=False)
        task.join()

    tasks = [
        gevent.spawn(
            one,
            source.uniform(0, clients / 5000),
            source.choice([0.02, 20]),
            source.choice([None, None, source.uniform(0, 0.02)]),
        )
        for _ in range(clients)
    ]
    start = time.perf_counter()
    gevent.joinall(tasks, timeout=30)
    return {
        "unfinished": float(sum(not task.ready() for task in tasks)),
        "lost": float(pool.checkedout()),
        "served": served,
        "seconds": time.perf_counter() - start,
    }
