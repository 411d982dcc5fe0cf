"""What a user can set to make requests cheaper: gunicorn's parser and access log, and the interpreter's collector.

Over HTTP: one worker, wrk with 20 connections that are kept alive, the worker's CPU for each request that only says
hello and for one that reads a row. gunicorn's compiled parser (gunicorn_h1c) is installed, and left out where the case
says so.

In one process: queries one after the other, as a worker has them, whose 5,000 rows each become ORM objects, with the
collector as Python sets it, with a first threshold of 50,000, with gc.freeze() and that threshold, and without a
collector: CPU and the collections that began, for each query.
"""

from __future__ import annotations

import contextlib
import gc
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from sqlalchemy import create_engine, select
from sqlalchemy.orm import Session

from support.gunicorn import Gunicorn

from .apps import Item
from .common import Metrics, Report, Samples, interleave, options
from .database import database
from .wrk import load

PYTHON_PARSER, COMPILED, WITH_LOG = "parser in Python", "compiled parser", "compiled parser, access log"
SERVERS = {
    PYTHON_PARSER: ["--http-parser=python"],
    COMPILED: ["--http-parser=fast"],
    WITH_LOG: ["--http-parser=fast", "--access-logfile=/dev/null"],
}
DEFAULT, THRESHOLD, FREEZE, NONE = "as Python sets it", "threshold 50,000", "freeze and threshold 50,000", "none"
ROWS = 5_000
QUERIES = 8  # of a sample: what one of them leaves, a full collection finds in a later one


def over_http(report: Report, url: str, seconds: int) -> dict[str, Samples]:
    measured = {}
    with contextlib.ExitStack() as running:
        env = {"BENCH_APP": "dbsession", "BENCH_URL": url}
        servers = {
            name: running.enter_context(
                Gunicorn("benchmarks.apps:app", "--worker-class=gevent", *arguments, env=env, ready="/nothing")
            )
            for name, arguments in SERVERS.items()
        }
        for path in ("/nothing", "/select"):
            cases = {name: partial(load, server, path, 20, seconds) for name, server in servers.items()}
            measured[path] = samples = interleave(cases, report.options.rounds)
            title = "GET /nothing" if path == "/nothing" else "GET /select"
            report.table(title, samples, {"cpu": "CPU us", "rps": "req/s"}, base=PYTHON_PARSER)
    return measured


def collected(engine: Any, set_up: Callable[[], None]) -> Metrics:
    """QUERIES of them, with the collector as `set_up` leaves it."""
    before = gc.get_threshold()
    began = 0

    def count(phase: str, _: dict[str, int]) -> None:
        nonlocal began
        began += phase == "start"

    gc.collect()
    set_up()
    gc.callbacks.append(count)
    try:
        start = time.process_time()
        for _ in range(QUERIES):
            with Session(engine) as session:
                assert len(session.scalars(select(Item).limit(ROWS)).all()) == ROWS
        return {"ms": (time.process_time() - start) * 1e3 / QUERIES, "collections": began / QUERIES}
    finally:
        gc.callbacks.remove(count)
        gc.set_threshold(*before)
        gc.enable()
        gc.unfreeze()


def freeze_and_threshold() -> None:
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)


def in_process(report: Report, url: str) -> Samples:
    engine = create_engine(url)
    cases: dict[str, Callable[[], None]] = {
        DEFAULT: lambda: None,
        THRESHOLD: lambda: gc.set_threshold(50_000, 10, 10),
        FREEZE: freeze_and_threshold,
        NONE: gc.disable,
    }
    collected(engine, gc.disable)  # opens the connection, fills SQLAlchemy's caches
    samples = interleave(
        {name: partial(collected, engine, of) for name, of in cases.items()}, 3 * report.options.rounds
    )
    report.table(f"{ROWS:,} ORM rows, the collector", samples, {"ms": "CPU ms", "collections": "began"}, base=DEFAULT)
    engine.dispose()
    return samples


def main() -> None:
    given = options(__doc__, rounds=5, quick_rounds=1)
    report = Report("settings", __doc__, given, ("gunicorn", "gunicorn_h1c", "gevent", "sqlalchemy", "pymysql"))
    seconds = 1 if given.quick else 3
    with database() as (url, _):
        os.environ.setdefault("BENCH_URL", url)
        in_process(report, url)
        over_http(report, url, seconds)
    report.finish()


if __name__ == "__main__":
    main()
