"""Round trips to MariaDB for each request, exactly: from the server's own counters.

A request that reads one row by its key, one that inserts a row and commits, one that touches no database; each of them
many times in a row on a connection that is open already, with every peer's pool as an application gets it. Pings are
not among the server's Questions, so they are counted apart and added.
"""

# ruff: noqa: E402  # patched first, as in a gunicorn worker
from __future__ import annotations

from gevent import monkey

monkey.patch_all()

import warnings
from typing import Any

from . import plots
from .apps import APPS, request
from .common import Metrics, Report, Samples, options
from .database import database

COUNTERS = {
    "Questions": "queries",
    "Com_select": "SELECT",
    "Com_insert": "INSERT",
    "Com_begin": "BEGIN",
    "Com_commit": "COMMIT",
    "Com_rollback": "ROLLBACK",
    "Com_set_option": "SET",
    "Com_admin_commands": "ping",
}
SKIPPED = {"/insert": ("dbsession read-only",)}


class Counters:
    """The server's counters, read on one connection, whose own question is taken off."""

    def __init__(self, cursor: Any) -> None:
        self._cursor = cursor
        self._own = self._since(self._read())

    def _read(self) -> dict[str, int]:
        self._cursor.execute("SHOW GLOBAL STATUS")
        return {row["Variable_name"]: int(row["Value"]) for row in self._cursor if row["Variable_name"] in COUNTERS}

    def _since(self, before: dict[str, int]) -> dict[str, int]:
        return {name: value - before[name] for name, value in self._read().items()}

    def during(self, work: Any) -> dict[str, int]:
        before = self._read()
        work()
        return {name: value - self._own[name] for name, value in self._since(before).items()}


def measure(app: Any, path: str, counters: Counters, times: int) -> Metrics:
    for _ in range(3):
        request(app, path)  # connects, and asks what SQLAlchemy asks a new server

    def requests() -> None:
        for _ in range(times):
            request(app, path)

    counted = counters.during(requests)
    trips = (counted["Questions"] + counted["Com_admin_commands"]) / times
    return {"trips": trips} | {name: value / times for name, value in counted.items()}


def main() -> None:
    given = options(__doc__, rounds=1, quick_rounds=1)
    report = Report("round_trips", __doc__, given)
    times = 20 if given.quick else 200
    warnings.simplefilter("ignore")  # Flask-SQLAlchemy-Lite's asyncio
    with database() as (url, cursor):
        counters = Counters(cursor)
        apps = {name: make(url) for name, make in APPS.items() if name != "hello"}
        measured: dict[str, Samples] = {}
        for path in ("/select", "/insert", "/nothing"):
            samples = measured[path] = Samples()
            for name, app in apps.items():
                if name not in SKIPPED.get(path, ()):
                    samples.add(name, measure(app, path, counters, times))
            report.table(f"{path} x {times}", samples, {"trips": "round trips", **COUNTERS})
    for text, path, name, goal in (
        ("SELECT", "/select", "dbsession", 2),
        ("SELECT, read-only database", "/select", "dbsession read-only", 1),
        ("SELECT, in Flask", "/select", "Flask: dbsession", 2),
        ("INSERT + commit", "/insert", "dbsession", 2),
        ("INSERT + commit, in Flask", "/insert", "Flask: dbsession", 2),
        ("no database touched", "/nothing", "dbsession", 0),
    ):
        report.goal(f"round trips, {text}", measured[path].median(name, "trips"), "==", goal)
    pings = max(measured[path].median("dbsession", "Com_admin_commands") for path in measured)
    report.goal("round trips for liveness when busy", pings, "==", 0)
    for path, samples in measured.items():
        if path != "/nothing":
            trips = {name: samples.median(name, "trips") for name in samples.values}
            title = f"Round trips of a request: {path[1:]}"
            plots.bars(report.folder / f"round_trips_{path[1:]}.svg", title, trips, "round trips to MariaDB")
    report.finish()


if __name__ == "__main__":
    main()
