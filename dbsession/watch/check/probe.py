"""What a database, its driver and its pool say of themselves when asked. No judgement: that is `findings`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import replace

import gevent
from gevent import monkey
from sqlalchemy import Integer, literal_column, select
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.pool import NullPool, Pool, QueuePool, StaticPool

from dbsession.core.backends import kind_of as backend_of
from dbsession.errors import DBSessionError, describe
from dbsession.green import hub
from dbsession.watch.check.facts import Facts, PoolFacts
from dbsession.watch.check.kinds import kind_of

BOUND_S = 15.0
"""Seconds that all databases have together; above PyMySQL's connect timeout of 10, which says more."""

ROUND_TRIPS = 5
_ONE = select(literal_column("1", Integer))


def gather_all(engines: Mapping[str, Engine]) -> list[Facts]:
    """Ask all databases at once; takes BOUND_S at most. Switches greenlets.

    Each is asked in a native thread of its own, which has a hub of its own if gevent has patched: a driver that blocks
    then stops that thread, and neither the caller's hub nor the other databases. A thread that is late is left alone;
    it ends when its driver gives up, or with the process.
    """
    if _patched():
        # The first hub of a process imports its loop and its resolver. The import's lock is patched, too, and needs a
        # hub to wait: two threads that both make the first one wait for each other for ever.
        _ = gevent.get_hub().resolver
    jobs = [_Job(name, engine) for name, engine in engines.items()]
    end = time.monotonic() + BOUND_S
    return [job.result(end - time.monotonic()) for job in jobs]


class _Job:
    """One database being asked. `_facts` is written once, by its thread, before it wakes the waiter."""

    def __init__(self, name: str, engine: Engine) -> None:
        self._name = name
        self._engine = engine
        self._facts: Facts | None = None
        self._waiter = hub.Waiter()
        hub.run_in_thread(self._run)

    def _run(self) -> None:
        try:
            self._facts = gather(self._name, self._engine)
        finally:
            home = hub.here()
            if home is not None:
                gevent.sleep(0)  # what another thread waits for may be in its queue: the end of a lock, say
                home.destroy(destroy_loop=True)  # its descriptors are not closed with its thread
            self._waiter.wake()

    def result(self, timeout_s: float) -> Facts:
        self._waiter.wait(max(timeout_s, 0.0))
        if self._facts is None:
            return replace(_blank(self._name, self._engine), error=f"no answer within {BOUND_S:g} s")
        return self._facts


def gather(name: str, engine: Engine) -> Facts:
    """Ask one database, on a connection opened by its engine, and so by whatever listens to that, but outside the
    limit of its pool, and closed at the end. Switches greenlets, or blocks, for as long as the driver does."""
    found = _blank(name, engine)
    kind, rules = kind_of(found), backend_of(engine.url)
    try:
        with engine.connect() as connection:
            if isinstance(engine.pool, QueuePool):
                connection.detach()  # a connection belongs to its thread, which ends
            found = replace(found, version=rules.product(connection), latency_ms=_latency_ms(connection))
            found = replace(found, **kind.ask(connection))
            return replace(found, cooperative=_cooperates(connection))
    except DBSessionError as error:
        return replace(found, error=str(error))
    except Exception as error:  # a driver may raise anything; its text may hold the password and is not shown
        number = kind.number(error)
        return replace(found, error=describe(error, number), error_number=number)


def _blank(name: str, engine: Engine) -> Facts:
    return Facts(name, engine.url.drivername, _pool(engine.pool))


def _pool(pool: Pool) -> PoolFacts:
    limit: int | None = None
    if isinstance(pool, QueuePool):
        # Private, like the two below, and nothing public tells them. tests/unit/test_private_names.py fails loudly.
        limit = pool.size() + pool._max_overflow if pool.size() and pool._max_overflow >= 0 else None
    elif isinstance(pool, StaticPool):
        limit = 1
    recycle_s = int(pool._recycle)
    return PoolFacts(limit, not isinstance(pool, NullPool), recycle_s if recycle_s >= 0 else None, pool._pre_ping)


def _latency_ms(connection: Connection) -> float:
    taken = []
    for _ in range(ROUND_TRIPS):
        started = time.perf_counter()
        connection.execute(_ONE).all()
        taken.append((time.perf_counter() - started) * 1000)
    return round(statistics.median(taken), 3)


def _patched() -> bool:
    return monkey.is_module_patched("socket")


def _cooperates(connection: Connection) -> bool | None:
    """Measure whether greenlets run while the driver waits, since no list of drivers knows what was patched. A greenlet
    just spawned runs first thing when anybody switches to the hub, however long the wait is then."""
    pause = backend_of(connection.engine.url).PAUSES.get(connection.dialect.name)
    if pause is None or not _patched():
        return None
    turns: list[bool] = []
    other = gevent.spawn(turns.append, True)
    connection.exec_driver_sql(pause).all()
    ran = bool(turns)
    other.join()
    return ran
