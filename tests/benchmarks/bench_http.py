"""Requests over HTTP: gunicorn with gevent workers, wrk, and a real MariaDB, all on this one machine.

One worker and two, wrk with 10, 100 and 1,000 connections, a request that reads a row by its key and one that inserts
a row and commits: requests a second, p50, p99, and the workers' CPU for each request. The same application over
dbsession, the pattern and Flask-SQLAlchemy (in Flask, too), beside one that only says hello. All servers run all the
time, and take turns. With one worker and 100 connections, every other peer is measured as well.

A request that starves in a pool until the end is in no percentile of wrk's, which flatters an unfair pool; and where
some starve, p50 is that of the few who do not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial

from support.gunicorn import Gunicorn

from . import plots
from .apps import APPS
from .common import Metrics, Report, Samples, interleave, options
from .database import database
from .wrk import load, server

OURS, READONLY, PATTERN = "dbsession", "dbsession read-only", "the pattern"
FLASK_OURS, FLASK_SQLALCHEMY = "Flask: dbsession", "Flask: Flask-SQLAlchemy"
AGAIN = f"{PATTERN} (again, control)"
FIRST = ["hello", OURS, READONLY, PATTERN, AGAIN, FLASK_OURS, "Flask: the pattern", FLASK_SQLALCHEMY]
COLUMNS = {"rps": "req/s", "p50": "p50 ms", "p99": "p99 ms", "cpu": "CPU us", "errors": "errors"}

Cell = tuple[int, int, str]  # workers, connections, path


def measure_all(report: Report, url: str, seconds: int) -> dict[Cell, Samples]:
    quick, rounds = report.options.quick, report.options.rounds
    measured: dict[Cell, Samples] = {}
    for workers in (1, 2):
        names = FIRST if workers == 2 else FIRST + [name for name in APPS if name not in FIRST]
        with contextlib.ExitStack() as running:
            servers: dict[str, Gunicorn] = {}
            for name in names:
                app = PATTERN if name == AGAIN else name
                servers[name] = running.enter_context(server(app, url, workers))
            for gunicorn in servers.values():
                load(gunicorn, "/select", 20 * workers, 1)  # opens every connection of the pools
            for connections in (10, 100, 1000):
                for path in ("/select", "/insert"):
                    if quick and workers == 2 and connections != 100:
                        continue
                    chosen = names if (workers, connections) == (1, 100) else FIRST
                    chosen = [name for name in chosen if path == "/select" or name != READONLY]
                    # A second is not enough to see what waits for two.
                    long = seconds * (2 if connections == 1000 else 1)
                    cases: dict[str, Callable[[], Metrics]] = {
                        name: partial(load, servers[name], path, connections, long) for name in chosen
                    }
                    samples = measured[workers, connections, path] = interleave(cases, rounds)
                    title = f"{path[1:].upper()}, {workers} worker{'s' * (workers > 1)}, -c{connections}"
                    report.table(title, samples, COLUMNS, base=PATTERN)
                    report.control(f"the pattern, {title}, req/s", samples.ratio(AGAIN, PATTERN, "rps"))
                    report.control(f"the pattern, {title}, p99", samples.ratio(AGAIN, PATTERN, "p99"))
    return measured


def goals(report: Report, measured: dict[Cell, Samples]) -> None:
    for connections, limit in ((100, 0.30), (1000, 0.50)):
        for path in ("/select", "/insert"):
            ratio = measured[1, connections, path].ratio(OURS, PATTERN, "p99")
            report.goal(f"1 worker, -c{connections}, {path[1:].upper()}: p99 / the pattern", ratio, "<=", limit)
    for connections in (10, 100, 1000):
        for path in ("/select", "/insert"):
            ratio = measured[1, connections, path].ratio(OURS, PATTERN, "rps")
            report.goal(f"1 worker, -c{connections}, {path[1:].upper()}: req/s / the pattern", ratio, ">=", 1.0)
        ratio = measured[1, connections, "/select"].ratio(READONLY, PATTERN, "rps")
        report.goal(f"1 worker, -c{connections}, SELECT, read-only: req/s / the pattern", ratio, ">=", 1.2)
    for path in ("/select", "/insert"):
        samples = measured[1, 100, path]
        at = f"1 worker, -c100, {path[1:].upper()}, both in Flask:"
        rps, p99 = (samples.ratio(FLASK_OURS, FLASK_SQLALCHEMY, metric) for metric in ("rps", "p99"))
        report.goal(f"{at} req/s / Flask-SQLAlchemy", rps, ">=", 1.15)
        report.goal(f"{at} p99 / Flask-SQLAlchemy", p99, "<=", 0.35)
    errors = sum(samples.worst(OURS, "errors") for samples in measured.values())
    report.goal("errors of dbsession, all cells", errors, "==", 0)


def draw(report: Report, measured: dict[Cell, Samples]) -> None:
    shown = [OURS, PATTERN, FLASK_OURS, FLASK_SQLALCHEMY]
    for metric, unit in (("p99", "p99, ms (log)"), ("rps", "requests a second")):
        series = {
            name: [(c, measured[1, c, "/select"].median(name, metric)) for c in (10, 100, 1000)] for name in shown
        }
        plots.lines(
            report.folder / f"http_{metric}.svg",
            f"One gevent worker, SELECT: {unit.split(',')[0]}",
            series,
            "connections of wrk",
            unit,
            log_y=metric == "p99",
        )
    cell = measured[1, 100, "/select"]
    plots.bars(
        report.folder / "http_peers.svg",
        "One gevent worker, SELECT, 100 connections",
        {name: cell.median(name, "rps") for name in cell.values if name != AGAIN},
        "requests a second",
    )


def main() -> None:
    given = options(__doc__, quick_rounds=1)
    report = Report("http", __doc__, given)
    # Eight servers with two workers and 20 connections each, and the control.
    with database("--max-connections=1000") as (url, _):
        measured = measure_all(report, url, 1 if given.quick else 2)
    goals(report, measured)
    draw(report, measured)
    report.finish()


if __name__ == "__main__":
    main()
