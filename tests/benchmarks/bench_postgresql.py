"""What a request costs on PostgreSQL, against the hand-written pattern: round trips, instructions, and p99 over HTTP.

On psycopg 3, imported after gevent's patch, and on psycopg2, which the pattern's users have with psycogreen: each
contender in processes of its own. Round trips are counted by a proxy on the way to the server, instructions by
callgrind (user mode only; else CPU time is measured), both exact however busy the machine is. p99 is that of one
gunicorn with a gevent worker, by wrk with 100 and with 1,000 connections; with --exact it is left out.
"""

from __future__ import annotations

import contextlib
import functools
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from support.proxy import Proxy

from . import callgrind
from .apps import BY_PSYCOGREEN
from .common import Metrics, Report, Samples, interleave, options
from .database import postgresql
from .wrk import load, server

PACKAGES = ("sqlalchemy", "gevent", "greenlet", "gunicorn", "psycopg", "psycopg2-binary", "psycogreen")


class Contender(NamedTuple):
    """One of `apps`, by a driver."""

    app: str
    driver: str
    base: str | None = None
    """The pattern that it is measured against."""


PATTERN, PATTERN2 = "the pattern", BY_PSYCOGREEN
OURS, READONLY, OURS2, READONLY2 = "dbsession", "read-only", "dbsession, psycopg2", "read-only, psycopg2"
CONTENDERS = {
    PATTERN: Contender("the pattern", "psycopg"),
    OURS: Contender("dbsession", "psycopg", PATTERN),
    READONLY: Contender("dbsession read-only", "psycopg", PATTERN),
    PATTERN2: Contender(BY_PSYCOGREEN, "psycopg2"),
    OURS2: Contender("dbsession", "psycopg2", PATTERN2),
    READONLY2: Contender("dbsession read-only", "psycopg2", PATTERN2),
}
TITLES = {
    "/line": "SELECT by key",
    "/line/add": "INSERT + commit",
    "/objects/50": "50 ORM rows",
    "/objects/500": "500 ORM rows",
    "/rows/50": "50 Core rows",
    "/rows/500": "500 Core rows",
}
TIMES = {"/line": 150, "/line/add": 150, "/objects/50": 25, "/objects/500": 3, "/rows/50": 25, "/rows/500": 4}
QUICK = {"/line": 30, "/line/add": 30, "/rows/50": 6}

TRIPS = {OURS: (2, 2), READONLY: (1, None), OURS2: (2, 2), READONLY2: (1, None)}
"""The goals: of a SELECT, of an INSERT with its commit."""

COLUMNS = {"rps": "req/s", "p50": "p50 ms", "p99": "p99 ms", "cpu": "CPU us", "errors": "errors"}


def plan_of(name: str, times: Mapping[str, int]) -> dict[str, int]:
    skipped = {"/line/add"} if "read-only" in name else set()
    return {path: number for path, number in times.items() if path not in skipped}


def arguments(name: str, url: str, plan: Mapping[str, int]) -> list[str]:
    app, driver, _ = CONTENDERS[name]
    url = url.replace("+psycopg:", f"+{driver}:")
    return ["benchmarks.requests_child", app, url, *(f"{path}={number}" for path, number in plan.items())]


def child(name: str, url: str, plan: Mapping[str, int], *more: str) -> Metrics:
    return dict(json.loads(callgrind.run([sys.executable, "-m", *arguments(name, url, plan), *more], 300)))


def instructions(name: str, url: str, plan: Mapping[str, int]) -> Metrics:
    _, counted = callgrind.count(*arguments(name, url, plan))
    # between the marks of one path, after its warm-up
    return {path: total / number / 1000 for (path, number), total in zip(plan.items(), counted[::2], strict=True)}


def round_trips(url: str, port: int) -> Samples:
    samples = Samples()
    for name in CONTENDERS:
        with Proxy(port) as proxy:
            way = url.replace(f":{port}/", f":{proxy.port}/")
            plan = plan_of(name, {"/line": 20, "/line/add": 20})
            samples.add(name, child(name, way, plan, f"--trips={proxy.control_port}"))
    return samples


def costs(given: Any, url: str) -> Samples:
    """contender -> path -> one figure a round."""
    plans = {name: plan_of(name, QUICK if given.quick else TIMES) for name in CONTENDERS}
    if not callgrind.available():
        return interleave({name: functools.partial(child, name, url, plan) for name, plan in plans.items()}, 9)
    running = {name: callgrind.at_once.submit(instructions, name, url, plan) for name, plan in plans.items()}
    samples = Samples()
    for name, future in running.items():
        samples.add(name, future.result())
    return samples


def show(report: Report, measured: Samples, unit: str) -> None:
    columns = [name for name, contender in CONTENDERS.items() if contender.base]
    rows = []
    for path in measured.values[PATTERN]:
        row = [TITLES[path]]
        for name, contender in CONTENDERS.items():
            if contender.base is None:
                row.append(f"{measured.median(name, path):,.0f}")
            elif path in measured.values[name]:
                row.append(f"{measured.ratio(name, contender.base, path).value:.2f}")
            else:
                row.append("-")
        rows.append(row)
    report.matrix([f"a request, {unit}", *CONTENDERS], rows)
    report.tables[unit] = measured.values
    for path in measured.values[PATTERN]:
        for name in columns:
            base = CONTENDERS[name].base
            if path in measured.values[name] and base:
                text = f"{TITLES[path]}, {name}: {unit.split(' of ')[-1]} / {base}"
                report.goal(text, measured.ratio(name, base, path), "<=", 1.0)


def over_http(report: Report, url: str) -> None:
    seconds = 1 if report.options.quick else 2
    with contextlib.ExitStack() as running:
        servers = {}
        for name, (app, driver, _) in CONTENDERS.items():
            way = url.replace("+psycopg:", f"+{driver}:")
            servers[name] = running.enter_context(server(app, way, 1))
            load(servers[name], "/select", 20, 1)  # opens every connection of the pool
        for connections in (100, 1000):
            for path in ("/select", "/insert"):
                names = [name for name in CONTENDERS if path == "/select" or "read-only" not in name]
                # A second is not enough to see what waits for two.
                long = seconds * (2 if connections == 1000 else 1)
                cases: dict[str, Callable[[], Metrics]] = {
                    name: functools.partial(load, servers[name], path, connections, long) for name in names
                }
                title = f"{path[1:].upper()}, -c{connections}"
                samples = interleave(cases, report.options.rounds)
                report.table(title, samples, COLUMNS, base=PATTERN)
                for name in names:
                    base = CONTENDERS[name].base
                    if base:
                        limit = 0.3 if connections == 100 else 1.0
                        report.goal(f"{title}, {name}: p99 / {base}", samples.ratio(name, base, "p99"), "<=", limit)
                        report.goal(f"{title}, {name}: req/s / {base}", samples.ratio(name, base, "rps"), ">=", 1.0)
                        report.goal(f"{title}, {name}: errors", samples.worst(name, "errors"), "==", 0)


def main() -> None:
    given = options(__doc__, quick_rounds=1, exact="only what is exact: round trips and instructions")
    report = Report("postgresql", __doc__, given, PACKAGES)
    unit = "thousands of instructions" if callgrind.available() else "us of CPU"
    with postgresql() as (url, port):
        trips = round_trips(url, port)
        report.table("round trips", trips, {"/line": "SELECT by key", "/line/add": "INSERT + commit"})
        for name, wanted in TRIPS.items():
            for path, goal in zip(("/line", "/line/add"), wanted, strict=True):
                if goal is not None:
                    report.goal(f"{TITLES[path]}, {name}: round trips", trips.median(name, path), "==", goal)
        show(report, costs(given, url), unit)
        if not given.exact:
            over_http(report, url)
    report.finish()


if __name__ == "__main__":
    main()
