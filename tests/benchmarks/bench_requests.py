"""What a request costs, against the hand-written pattern: instructions by callgrind where valgrind is, else CPU time.

Each contender in processes of its own, which call the WSGI application, or make the task, themselves, with no server
round it. A row has int, bigint, varchar, text, decimal, datetime, JSON and bool. Instructions are those of user mode:
what the kernel does, where a round trip that is saved counts most, is not among them. `raw` is PyMySQL alone, in
autocommit mode. Without asyncmy: dbsession where that driver is not installed, whose parser it uses otherwise.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from . import callgrind
from .common import Metrics, Report, Samples, interleave, options
from .database import database
from .requests_child import PASSED, READS, TASK, WITHOUT

PACKAGES = ("sqlalchemy", "gevent", "greenlet", "pymysql", "asyncmy", "flask", "flask-sqlalchemy")
PATTERN, OURS, READONLY, RAW = "the pattern", "dbsession", "dbsession read-only", "raw PyMySQL"
FLASK_OURS, FLASK_SQLALCHEMY = "Flask: dbsession", "Flask: Flask-SQLAlchemy"
WITHOUT_ASYNCMY = OURS + WITHOUT
COLUMNS = {
    WITHOUT_ASYNCMY: "ours, no asyncmy",
    OURS: "ours",
    READONLY: "read-only",
    FLASK_OURS: "ours in Flask",
    FLASK_SQLALCHEMY: "Flask-SQLAlchemy",
    RAW: "raw",
}


class Cell(NamedTuple):
    """A row of the table; `times` and `quick`, which 0 leaves out, are how often it is requested by each contender."""

    title: str
    times: int
    quick: int


CELLS = {
    "/line": Cell("SELECT by key", 150, 30),
    "/line/add": Cell("INSERT + commit", 150, 30),
    "/twenty": Cell("20 small SELECTs", 12, 3),
    "/objects/50": Cell("50 ORM rows", 25, 6),
    "/objects/500": Cell("500 ORM rows", 3, 0),
    "/objects/5000": Cell("5,000 ORM rows", 1, 0),
    "/rows/50": Cell("50 Core rows", 25, 0),
    "/rows/500": Cell("500 Core rows", 4, 1),
    "/rows/5000": Cell("5,000 Core rows", 1, 0),
    "/streamed/objects": Cell("5,000 streamed ORM rows", 1, 0),
    "/streamed/rows": Cell("5,000 streamed Core rows", 1, 0),
    "/add/objects": Cell("1,000 ORM inserts", 1, 0),
    "/add/rows": Cell("1,000 Core inserts", 2, 1),
}
SKIPPED = {
    READONLY: {"/line/add", "/add/objects", "/add/rows"},
    RAW: {path for path in CELLS if "objects" in path or "streamed" in path},
    PASSED: CELLS.keys() - READS.keys(),
    TASK: CELLS.keys() - READS.keys(),
}
IN_QUICK = (PATTERN, OURS, WITHOUT_ASYNCMY, READONLY, FLASK_OURS, FLASK_SQLALCHEMY)

GOALS = [  # path, of whom, against whom, how it is called, limit
    ("/line", OURS, PATTERN, "SELECT by key", 0.78),
    ("/line", READONLY, PATTERN, "SELECT by key, read-only", 0.70),
    ("/line/add", OURS, PATTERN, "INSERT + commit", 0.93),
    ("/twenty", OURS, PATTERN, "20 small SELECTs", 0.83),
    ("/objects/50", OURS, PATTERN, "50 ORM rows", 0.52),
    ("/objects/50", WITHOUT_ASYNCMY, PATTERN, "50 ORM rows, without asyncmy", 0.64),
    ("/rows/500", OURS, PATTERN, "500 Core rows", 0.30),
    ("/rows/500", WITHOUT_ASYNCMY, PATTERN, "500 Core rows, without asyncmy", 0.48),
    ("/streamed/rows", OURS, PATTERN, "streamed Core rows", 0.27),
    ("/streamed/rows", WITHOUT_ASYNCMY, PATTERN, "streamed Core rows, without asyncmy", 0.46),
    ("/add/rows", OURS, PATTERN, "1,000 Core inserts", 0.65),
    ("/line", FLASK_OURS, FLASK_SQLALCHEMY, "SELECT by key, both in Flask", 0.82),
    ("/line/add", FLASK_OURS, FLASK_SQLALCHEMY, "INSERT + commit, both in Flask", 0.93),
    ("/line", TASK, PASSED, "asyncio, one SELECT in a task", 0.98),
    ("/twenty", TASK, PASSED, "asyncio, 20 SELECTs in a task", 0.98),
]
BASES = {PATTERN: "the pattern", FLASK_SQLALCHEMY: "Flask-SQLAlchemy", PASSED: "an AsyncSession passed by hand"}


def plans(quick: bool) -> dict[str, dict[str, int]]:
    """contender -> path -> how many requests."""
    times = {path: cell.quick if quick else cell.times for path, cell in CELLS.items()}
    names = IN_QUICK if quick else (PATTERN, *COLUMNS)
    return {
        name: {path: n for path, n in times.items() if n and path not in SKIPPED.get(name, ())}
        for name in (*names, PASSED, TASK)
    }


def arguments(name: str, url: str, plan: Mapping[str, int]) -> list[str]:
    return ["benchmarks.requests_child", name, url, *(f"{path}={times}" for path, times in plan.items())]


def instructions(name: str, url: str, plan: Mapping[str, int]) -> Metrics:
    _, counted = callgrind.count(*arguments(name, url, plan))
    # between the marks of one path, after its warm-up
    return {path: total / times / 1000 for (path, times), total in zip(plan.items(), counted[::2], strict=True)}


def cpu(name: str, url: str, plan: Mapping[str, int]) -> Metrics:
    return dict(json.loads(callgrind.run([sys.executable, "-m", *arguments(name, url, plan)], 300)))


def measure(given: Any, url: str) -> Samples:
    """contender -> path -> one figure a round."""
    planned = plans(given.quick)
    if not callgrind.available():
        return interleave(
            {name: functools.partial(cpu, name, url, plan) for name, plan in planned.items()}, given.rounds
        )
    running = {name: callgrind.at_once.submit(instructions, name, url, plan) for name, plan in planned.items()}
    samples = Samples()
    for name, future in running.items():
        samples.add(name, future.result())
    return samples


def show(report: Report, measured: Samples, unit: str) -> None:
    columns = {name: head for name, head in COLUMNS.items() if name in measured}
    rows = []
    for path, figures in measured.values[PATTERN].items():
        ratios = [
            f"{measured.ratio(name, PATTERN, path).value:.2f}" if path in measured.values[name] else "-"
            for name in columns
        ]
        rows.append([CELLS[path].title, f"{sorted(figures)[len(figures) // 2]:,.0f}", *ratios])
    report.matrix([f"a request, {unit}", "the pattern", *columns.values()], rows)
    rows = [
        [
            CELLS[path].title,
            f"{measured.median(PASSED, path):,.0f}",
            f"{measured.ratio(TASK, PASSED, path).value:.2f}",
        ]
        for path in READS
    ]
    report.matrix([f"a task of asyncio's, {unit}", "an AsyncSession passed by hand", "ours"], rows)
    report.tables[unit] = measured.values


def main() -> None:
    exact = callgrind.available()
    given = options(__doc__, rounds=1 if exact else 9, quick_rounds=1 if exact else 3)
    report = Report("requests", __doc__, given, PACKAGES)
    unit = "thousands of instructions" if exact else "us of CPU"
    with database() as (url, _):
        measured = measure(given, url)
    show(report, measured, unit)
    for path, name, base, text, limit in GOALS:
        has = path in measured.values.get(name, ()) and path in measured.values.get(base, ())
        value = measured.ratio(name, base, path) if has else None
        report.goal(f"{text}: {unit.split(' of ')[-1]} / {BASES[base]}", value, "<=", limit)
    report.finish()


if __name__ == "__main__":
    main()
