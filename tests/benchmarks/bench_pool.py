"""The pool under load, on connections that cost nothing: who waits how long. What a checkout costs: bench_checkout.

    closed loop   20/100/1,000/5,000 greenlets on 20 connections, each held 1 ms, again and again
    burst         1,000 and 5,000 greenlets at once, one checkout each
    open          arrivals at random times, at 75 and 125 % of what QueuePool serves of the burst of 5,000
    kills         a waiter killed in the tick it is notified; kills and timeouts at random

Everything is patched by gevent, as in a gunicorn worker. `longest` is the longest wait, and beside it the same as a
multiple of greenlets/throughput, which is what everybody would wait if all were served in turn.

`overtaken by` counts for the unluckiest arrival how many later ones had a connection assigned before it had. A pool
that hands a connection over has assigned it there and then, though the waiter's greenlet runs only at the end of that
pass of the event loop; for a pool that wakes a waiter to look for itself, what connect() returns is the first thing
that is assigned. `came back first` counts by the return of connect() for all of them: so a newcomer who finds another
connection idle and goes on at once counts as well, though nothing was taken from the waiter, who has its own already.
"""

# ruff: noqa: E402  # patched first, as in a gunicorn worker
from __future__ import annotations

from gevent import monkey

monkey.patch_all()

import functools
import statistics

from sqlalchemy.pool import QueuePool

from dbsession.green.pool import FairPool

from . import plots, pool_loads
from .common import Report, Samples, interleave, options
from .pool_loads import FAIR, POOLS, QUEUE

AGAIN = f"{QUEUE} (again, control)"
BOTH = {FAIR: FairPool, QUEUE: QueuePool}


def closed_loop(report: Report, seconds: float) -> None:
    columns = {"ops": "ops/s", "cpu": "CPU us", "starved": "starved %", "jain": "Jain", "longest": "longest ms"}
    columns["wait"] = "x n/throughput"
    measured: dict[int, Samples] = {}
    for clients in (20, 100, 1000, 5000):
        window = seconds * (1 if clients < 5000 else 2)
        makes = POOLS | ({AGAIN: POOLS[QUEUE]} if clients == 100 else {})
        cases = {name: functools.partial(pool_loads.closed_loop, make, clients, window) for name, make in makes.items()}
        samples = measured[clients] = interleave(cases, report.options.rounds)
        report.table(f"closed loop, {clients:,} greenlets", samples, columns)
        if clients == 20:
            continue
        at = f"closed loop, {clients:,}:"
        report.goal(f"{at} starved, worst round", samples.worst(FAIR, "starved"), "==", 0, " %")
        report.goal(f"{at} Jain's index, worst round", samples.worst(FAIR, "jain", max), ">=", 0.98)
        report.goal(f"{at} longest wait / (n / throughput)", samples.median(FAIR, "wait"), "<=", 1.3)
        report.goal(f"{at} throughput / QueuePool", samples.ratio(FAIR, QUEUE, "ops"), ">=", 1.0)
        if AGAIN in samples:
            report.control("QueuePool, closed loop, throughput", samples.ratio(AGAIN, QUEUE, "ops"))
            report.control("QueuePool, closed loop, CPU", samples.ratio(AGAIN, QUEUE, "cpu"))
    for metric, file, unit in (("starved", "pool_starved", "% never served"), ("longest", "pool_longest", "ms")):
        plots.lines(
            report.folder / f"{file}.svg",
            "Greenlets never served" if metric == "starved" else "The longest wait",
            {name: [(clients, s.median(name, metric)) for clients, s in measured.items()] for name in POOLS},
            f"greenlets in a closed loop on {pool_loads.SIZE} connections",
            unit,
            log_y=metric == "longest",
        )


def open_loads(report: Report, seconds: float) -> None:
    columns = {"rate": "served/s", "cpu": "CPU us", "p50": "p50 ms", "p99": "p99 ms", "max": "max ms"}
    columns |= {"overtaken": "overtaken by", "returned": "came back first"}
    pools = POOLS | {FAIR: lambda: pool_loads.sqlalchemy_pool(pool_loads.WatchedFairPool)}
    for count in (1000, 5000):
        due = [0.0] * count
        cases = {name: functools.partial(pool_loads.one_shot, make, due) for name, make in pools.items()}
        samples = interleave(cases, report.options.rounds)
        report.table(f"burst of {count:,}", samples, columns)
    capacity = samples.median(QUEUE, "rate")
    print(f"\nopen arrivals: 100 % is {capacity:,.0f}/s, what QueuePool served of the burst of 5,000")
    makes = {name: pools[name] for name in (FAIR, QUEUE, "gevent.queue")} | {AGAIN: pools[QUEUE]}
    for percent in (75, 125):
        due = pool_loads.arrivals(capacity * percent / 100, seconds)
        cases = {name: functools.partial(pool_loads.one_shot, make, due) for name, make in makes.items()}
        samples = interleave(cases, report.options.rounds)
        report.table(f"open arrivals, {percent} %", samples, columns)
        report.control(f"QueuePool, open arrivals, {percent} %, p99", samples.ratio(AGAIN, QUEUE, "p99"))
    report.goal("open arrivals, 125 %: p99 / QueuePool", samples.ratio(FAIR, QUEUE, "p99"), "<=", 0.7)
    report.goal("open arrivals, 125 %: overtaken, worst round", samples.worst(FAIR, "overtaken"), "==", 0)
    plots.bars(
        report.folder / "pool_overload.svg",
        "p99 of the wait when 125 % arrive",
        {name: samples.median(name, "p99") for name in makes if name != AGAIN},
        "ms",
    )


def kills(report: Report, quick: bool) -> None:
    wait_s = 1.0 if quick else 5.0
    cases = {name: functools.partial(pool_loads.killed_when_notified, kind, wait_s) for name, kind in BOTH.items()}
    samples = interleave(cases, report.options.rounds)
    heads = {"next": "next served after ms", "failed": "it failed"}
    report.table(f"a notified waiter is killed, pool_timeout {wait_s:g} s", samples, heads)
    served = samples.worst(FAIR, "next")
    report.goal("a notified waiter is killed: the next one is served, worst round", served, "<=", 100, " ms")
    clients = 2000 if quick else 20_000
    cases = {name: functools.partial(pool_loads.kills, kind, clients) for name, kind in BOTH.items()}
    samples = interleave(cases, min(3, report.options.rounds))
    heads = {"unfinished": "unfinished", "lost": "places lost", "served": "served", "seconds": "seconds"}
    report.table(f"{clients:,} clients, kills and timeouts at random", samples, heads)
    lost = statistics.fmean(samples.values[FAIR]["lost"] + samples.values[FAIR]["unfinished"])
    report.goal("kills at random: places lost and clients unfinished", lost, "==", 0)


def main() -> None:
    given = options(__doc__)
    report = Report("pool", __doc__, given)
    closed_loop(report, 0.6 if given.quick else 2.0)
    open_loads(report, 0.7 if given.quick else 3.0)
    kills(report, given.quick)
    report.finish()


if __name__ == "__main__":
    main()
