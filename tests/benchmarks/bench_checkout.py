"""What one checkout and its return cost: alone, with a note of the holder, with a look at the socket, in closed loops.

    uncontended   connect and close, on connections that cost nothing, with the notes of who holds them and without
    notes         connect and close by an engine and by a session, with the notes and without; SQLite
    look          connect and close on PyMySQL's connections, with the look at the socket that finds a dead one (the
                  default) and without; QueuePool sends no ROLLBACK here, dbsession knows that none is needed
    closed loops  100 and 1,000 greenlets on 20 connections that cost nothing, each held 1 ms: instructions by callgrind
                  where valgrind is, else CPU time

Everything is patched by gevent, as in a gunicorn worker. Under load, and who waits how long: bench_pool.
"""

# ruff: noqa: E402  # patched first, as in a gunicorn worker
from __future__ import annotations

from gevent import monkey

monkey.patch_all()

import functools
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from sqlalchemy import create_engine
from sqlalchemy.pool import ConnectionPoolEntry

from dbsession import SessionManager
from dbsession.core.pool.holders import HeldConnections

from . import callgrind, pool_loads
from .common import Metrics, Report, interleave, options
from .database import database
from .pool_loads import FAIR, POOLS, QUEUE

AGAIN = f"{QUEUE} (again, control)"
BARE = f"{FAIR}, without notes"
LOOK, NO_LOOK = "dbsession, with the look at the socket", "dbsession, without the look"


def bare() -> Any:
    pool: Any = POOLS[FAIR]()
    pool.held = Unnoted()
    return pool


def uncontended(report: Report, count: int) -> None:
    makes = POOLS | {AGAIN: POOLS[QUEUE], BARE: bare}
    cases = {name: functools.partial(pool_loads.uncontended, make, count) for name, make in makes.items()}
    samples = interleave(cases, max(5, report.options.rounds))
    report.table("uncontended checkout + checkin", samples, {"us": "us"}, base=QUEUE)
    report.control("QueuePool, uncontended", samples.ratio(AGAIN, QUEUE, "us"))


class Unnoted(HeldConnections):
    """Takes no note of anybody."""

    def taken(self, record: ConnectionPoolEntry) -> None:
        pass

    def returned(self, record: ConnectionPoolEntry) -> None:
        pass


def notes(report: Report, count: int) -> None:
    with tempfile.TemporaryDirectory(prefix="dbs-") as folder:
        manager = SessionManager({"default": f"sqlite:///{folder}/notes.db"})
        engine, session = manager.engine(), manager.get()
        pool: Any = engine.pool

        def by_session() -> None:
            session.connection()
            session.rollback()

        def measured(held: HeldConnections, use: Callable[[], object]) -> dict[str, float]:
            pool.held = held
            gc.disable()  # a collection in one and not in the other would be most of the difference
            began = time.process_time()
            for _ in range(count):
                use()
            took = time.process_time() - began
            gc.enable()
            return {"us": took / count * 1e6}

        ways = {"engine.connect()": lambda: engine.connect().close(), "a session": by_session}
        kinds = {"with notes": pool.held, "without": Unnoted(), "without (again, control)": Unnoted()}
        cases = {
            f"{way}, {kind}": functools.partial(measured, held, use)
            for way, use in ways.items()
            for kind, held in kinds.items()
        }
        samples = interleave(cases, max(9, report.options.rounds))
        manager.clear()
        manager.dispose()
    report.table("who holds a connection: CPU of one checkout + checkin", samples, {"us": "us"})
    for way in ways:
        cost = samples.median(f"{way}, with notes", "us") - samples.median(f"{way}, without", "us")
        report.goal(f"the notes of who holds a connection, by {way}", cost, "<=", 3, " us")
        report.control(
            f"{way}, without notes", samples.ratio(f"{way}, without (again, control)", f"{way}, without", "us")
        )


def looks(report: Report, count: int) -> None:
    def use(pool: Any) -> Metrics:
        gc.collect()
        began = time.process_time()
        for _ in range(count):
            pool.connect().close()
        return {"us": (time.process_time() - began) / count * 1e6}

    with database() as (url, _):
        manager = SessionManager({"look": url, "blind": {"url": url, "options": {"pool_pre_ping": False}}})
        plain = create_engine(url, pool_size=20, max_overflow=0, pool_reset_on_return=None)
        pools = {QUEUE: plain.pool, AGAIN: plain.pool}
        pools |= {NO_LOOK: manager.engine("blind").pool, LOOK: manager.engine("look").pool}
        for pool in pools.values():
            pool.connect().close()
        cases = {name: functools.partial(use, pool) for name, pool in pools.items()}
        samples = interleave(cases, max(9, report.options.rounds))
        manager.dispose()
        plain.dispose()
    report.table("checkout + return, PyMySQL", samples, {"us": "us of CPU"}, base=QUEUE)
    for name, limit in ((NO_LOOK, 1.0), (LOOK, 1.2)):
        text = f"uncontended checkout + return, notes included, {name.partition(', ')[2]}: CPU / QueuePool"
        report.goal(text, samples.ratio(name, QUEUE, "us"), "<=", limit)
    report.control("QueuePool, CPU", samples.ratio(AGAIN, QUEUE, "us"))


def arguments(pool: str, clients: int, seconds: float) -> list[str]:
    return ["benchmarks.bench_checkout", "child", pool, str(clients), str(seconds)]


def in_child(pool: str, clients: int, seconds: float) -> Metrics:
    """A closed loop in a process of its own."""
    return dict(json.loads(callgrind.run([sys.executable, "-m", *arguments(pool, clients, seconds)], 300)))


def instructions(pool: str, clients: int, seconds: float) -> float:
    """Thousands of them for a checkout. In so slow a process nobody can be said to starve."""
    printed, counted = callgrind.count(*arguments(pool, clients, seconds))
    return counted[0] / float(json.loads(printed)["served"]) / 1000


def closed_loops(report: Report, quick: bool) -> None:
    exact = callgrind.available()
    unit = "thousands of instructions" if exact else "us of CPU"
    for clients in (100, 1000):
        cases = {name: functools.partial(in_child, name, clients, 2.0) for name in (FAIR, QUEUE)}
        samples = interleave(cases, report.options.rounds)
        if exact:
            seconds = 4.0 if quick else 10.0
            running = {name: callgrind.at_once.submit(instructions, name, clients, seconds) for name in cases}
            for name, future in running.items():
                samples.values[name]["cost"] = [future.result()]
        columns = {"cost": f"{unit} a checkout", "starved": "starved %"}
        report.table(f"closed loop, {clients:,} greenlets", samples, columns)
        at = f"closed loop, {clients:,} on 20:"
        text = f"{at} {unit.split(' of ')[-1]} a checkout / QueuePool"
        report.goal(text, samples.ratio(FAIR, QUEUE, "cost"), "<=", 1.0)
        report.goal(f"{at} starved, worst round", samples.worst(FAIR, "starved"), "==", 0, " %")


def child(pool: str, clients: int, seconds: float) -> None:
    def mark() -> None:
        if not marked:
            callgrind.start()
        marked.append(True)
        callgrind.mark()

    marked: list[bool] = []
    found = pool_loads.closed_loop(POOLS[pool], clients, seconds, mark)
    print(json.dumps(found | {"cost": found["cpu"]}))


def main() -> None:
    given = options(__doc__)
    report = Report("checkout", __doc__, given)
    uncontended(report, 3000 if given.quick else 30_000)
    notes(report, 1000 if given.quick else 10_000)
    looks(report, 1000 if given.quick else 10_000)
    closed_loops(report, given.quick)
    report.finish()


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
    else:
        main()
