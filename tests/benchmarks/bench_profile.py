"""Where a request's time goes: calls and CPU by the library whose code runs, without a server round it.

The /select of bench_http, called in this process by 20 greenlets on 20 connections of a real MariaDB. `calls` are the
Python and C functions that one request calls (in the greenlet itself, not in the Hub): exact. `CPU` is sampled each
millisecond of CPU time, and booked on the library of the innermost Python frame, so what C code does counts for its
caller; PyMySQL's packets are read by dbsession's own code in part. It explains bench_http; it has no goals.
"""

# ruff: noqa: E402  # patched first, as in a gunicorn worker
from __future__ import annotations

from gevent import monkey

monkey.patch_all()

import collections
import functools
import signal
import sys
import time
from types import FrameType
from typing import Any

import gevent

from .apps import APPS, request
from .common import RESULTS, Metrics, Report, interleave, options
from .database import database

NAMES = ["dbsession", "dbsession read-only", "the pattern"]
NAMES += ["Flask: dbsession", "Flask: the pattern", "Flask: Flask-SQLAlchemy"]
LAYERS = {
    "gevent": ("gevent", "greenlet"),
    "PyMySQL": ("pymysql",),
    "SQLAlchemy": ("sqlalchemy",),
    "dbsession": ("dbsession",),
    "Flask": ("flask", "flask_sqlalchemy", "werkzeug", "blinker"),
}
REST = "the rest"
COLUMNS = {"total": "total"} | {layer: layer for layer in (*LAYERS, REST)}
GREENLETS = 20
ROOT = RESULTS.parents[2]


@functools.cache
def layer_of(filename: str) -> str:
    package = filename.removeprefix(f"{ROOT}/").rpartition("site-packages/")[2].split("/")[0]
    return next((layer for layer, names in LAYERS.items() if package in names), REST)


def calls(app: Any, times: int) -> Metrics:
    """Functions called by one request."""
    counted: collections.Counter[str] = collections.Counter()

    def called(frame: FrameType, event: str, _: object) -> None:
        if event in ("call", "c_call"):
            counted[layer_of(frame.f_code.co_filename)] += 1

    sys.setprofile(called)
    try:
        for _ in range(times):
            request(app, "/select")
    finally:
        sys.setprofile(None)
    found = {layer: counted[layer] / times for layer in (*LAYERS, REST)}
    return {"total": sum(found.values())} | found


def cpu(app: Any, times: int) -> Metrics:
    """Microseconds of CPU for one request."""
    sampled: collections.Counter[str] = collections.Counter()

    def sample(_: int, frame: FrameType | None) -> None:
        sampled[layer_of(frame.f_code.co_filename) if frame else REST] += 1

    def one() -> None:
        for _ in range(times // GREENLETS):
            request(app, "/select")

    before = signal.signal(signal.SIGPROF, sample)
    started = time.process_time()
    signal.setitimer(signal.ITIMER_PROF, 0.001, 0.001)
    try:
        gevent.joinall([gevent.spawn(one) for _ in range(GREENLETS)], raise_error=True)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    total = (time.process_time() - started) / (times // GREENLETS * GREENLETS) * 1e6
    every = sum(sampled.values()) or 1
    return {"total": total} | {layer: total * sampled[layer] / every for layer in (*LAYERS, REST)}


def main() -> None:
    given = options(__doc__)
    report = Report("profile", __doc__, given)
    with database() as (url, _):
        apps = {name: APPS[name](url) for name in NAMES}
        for app in apps.values():
            cpu(app, 200)  # connects, and fills SQLAlchemy's caches
        counted = interleave({name: functools.partial(calls, app, 50) for name, app in apps.items()}, 1)
        report.table("functions called by a SELECT request", counted, COLUMNS)
        times = 1000 if given.quick else 6000
        used = interleave({name: functools.partial(cpu, app, times) for name, app in apps.items()}, given.rounds)
        report.table("CPU us of a SELECT request", used, COLUMNS)
    report.finish()


if __name__ == "__main__":
    main()
