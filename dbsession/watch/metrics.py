"""Prometheus metrics of the pools (extra `metrics`), and the WSGI path where they are scraped.

One process copies its counts when it is scraped. The workers of one gunicorn share a folder (prometheus_client's
multiprocess mode, see `metrics_folder`): each copies its counts there every PUBLISH_S seconds and at its end, and
whichever of them is scraped answers for all.
"""

from __future__ import annotations

import atexit
import logging
import os
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING, Any

from dbsession.core import fork, snapshot
from dbsession.core.engine import Database, all_databases
from dbsession.core.pool.stats import BOUNDS_S, Stats
from dbsession.errors import ConfigError, describe, to_install
from dbsession.green import hub
from dbsession.green.periodic import PeriodicTask
from dbsession.watch import metrics_folder
from dbsession.watch.deltas import Changes

try:
    import prometheus_client
    from prometheus_client import multiprocess
except ImportError:
    raise ConfigError(f"Metrics need prometheus_client: {to_install('metrics')}.") from None

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

logger = logging.getLogger("dbsession.watch.metrics")

PUBLISH_S = 1.0

READINGS, READING_S = 20, 0.01
"""How often the shared files are read until they are whole, and the seconds between: prometheus_client makes a file in
several steps, and a reader that comes in between gets an error."""


def _gauge(name: str, text: str, *labels: str, mode: Any = "livesum") -> prometheus_client.Gauge:
    return prometheus_client.Gauge(name, text, ("database", *labels), registry=None, multiprocess_mode=mode)


CONNECTIONS = _gauge("dbsession_pool_connections", "Open connections of the pool.", "state")
SIZE = _gauge("dbsession_pool_size", "Connections that the pool keeps open at most.")
LIMIT = _gauge("dbsession_pool_limit", "Connections that the pool opens at most; absent where it has no limit.")
WAITING = _gauge("dbsession_pool_waiting", "Callers who wait for a connection now.")
OLDEST = _gauge(
    "dbsession_oldest_holder_seconds", "How long the longest holder has had its connection.", mode="livemax"
)


def _counter(name: str, text: str) -> prometheus_client.Counter:
    return prometheus_client.Counter(name, text, ("database",), registry=None)


COUNTERS = {  # those of Stats.COUNTS
    "checkouts": _counter("dbsession_checkouts", "Connections given out."),
    "connects": _counter("dbsession_connects", "Connections opened."),
    "invalidated": _counter("dbsession_invalidated", "Connections thrown away, because they were lost or not in step."),
    "timeouts": _counter("dbsession_pool_timeouts", "Callers who waited for a connection in vain."),
    "kills": _counter("dbsession_abandoned_kills", "Statements that nobody waited for, ended at the server."),
    "teardown_failures": _counter("dbsession_teardown_failures", "Sessions that failed to close."),
    "retries": _counter("dbsession_retries", "Further attempts of run_in_transaction."),
}


def _histogram(name: str, text: str) -> prometheus_client.Histogram:
    return prometheus_client.Histogram(name, text, ("database",), registry=None, buckets=BOUNDS_S)


WAITS = _histogram("dbsession_pool_wait_seconds", "How long callers waited for their turn, in vain or not.")
HOLDS = _histogram("dbsession_connection_hold_seconds", "How long connections were in use, each time.")

_METRICS = (CONNECTIONS, SIZE, LIMIT, WAITING, OLDEST, *COUNTERS.values(), WAITS, HOLDS)


def _numbers(stats: Stats) -> list[float]:
    """Return the numbers that `_increments` takes, in its order."""
    counts = [getattr(stats, count) for count in COUNTERS]
    first, *others = stats.waits.counts
    return [*counts, first + stats.unwaited(), *others, stats.waits.sum_s, *stats.holds.counts, stats.holds.sum_s]


@cache
def _increments(name: str) -> list[Callable[[float], object]]:
    """Return the functions that add a database's numbers to the metrics."""
    increments: list[Callable[[float], object]] = [counter.labels(name).inc for counter in COUNTERS.values()]
    for metric in (WAITS, HOLDS):
        # `_buckets` and `_sum` are private, and the only way to copy a bucket: `observe()` takes single values, in the
        # middle of a checkout. tests/unit/test_private_names.py fails loudly when the names go.
        histogram = metric.labels(name)
        increments += [bucket.inc for bucket in histogram._buckets]
        increments.append(histogram._sum.inc)
    return increments


def _gauges(database: Database) -> Iterator[tuple[prometheus_client.Gauge, tuple[str, ...], float | None]]:
    pool, name = snapshot.database_snapshot(database), database.name
    yield CONNECTIONS, (name, "in_use"), pool.in_use
    yield CONNECTIONS, (name, "idle"), pool.idle
    yield SIZE, (name,), pool.size
    yield LIMIT, (name,), pool.limit
    yield WAITING, (name,), pool.waiting
    notes = database.held.notes()
    yield OLDEST, (name,), time.monotonic() - notes[0].since if notes else 0.0


class Publisher:
    """Copies the counts and the state of this process's databases to the metrics above. One for each process; begins
    anew after a fork. Databases of one name, of two managers say, are counted together."""

    def __init__(self) -> None:
        self._changes = Changes(_numbers)
        self._shown: dict[tuple[prometheus_client.Gauge, tuple[str, ...]], float] = {}
        self._failed = False
        self._reserved: tuple[int, frozenset[str]] = 0, frozenset()  # in which process, and for which databases

    def publish(self) -> None:
        """Copy the counts and the state to the metrics. Never waits, and does no I/O but into the shared folder's
        mapped files.

        Raises:
            OSError: there is no room for them.
        """
        if metrics_folder.folder() is not None:
            _, known = self._reserved
            needed = os.getpid(), known.union(each.name for each in all_databases())
            if self._reserved != needed:
                metrics_folder.reserve(needed[1])
                self._reserved = needed
        for name, grown in self._changes.take():
            for increment, by in zip(_increments(name), grown, strict=True):
                if by:
                    increment(by)
        shown = dict.fromkeys(self._shown, 0.0)  # those of databases that are gone, too
        for database in snapshot.live():
            for gauge, labels, value in _gauges(database):
                if value is not None:
                    before = shown.get((gauge, labels), 0.0)
                    shown[gauge, labels] = max(before, value) if gauge is OLDEST else before + value
        self._shown = shown
        for (gauge, labels), value in shown.items():
            gauge.labels(*labels).set(value)

    def turn(self) -> float:
        """Publish; return the seconds until the next time."""
        try:
            self.publish()
            self._failed = False
        except Exception as error:
            if not self._failed:
                self._failed = True
                logger.warning("The metrics of process %s could not be published: %s.", os.getpid(), describe(error))
        return PUBLISH_S


_publisher = Publisher()
_ticker = PeriodicTask(_publisher.turn)


class _Collector(prometheus_client.registry.Collector):
    """This process's metrics, up to date, for prometheus_client's own registry."""

    def collect(self) -> Iterable[prometheus_client.Metric]:
        _publisher.publish()
        for metric in _METRICS:
            yield from metric.collect()


class _SharedCollector(prometheus_client.registry.Collector):
    """The metrics of all processes that share the folder."""

    def __init__(self) -> None:
        self._files: Any = multiprocess.MultiProcessCollector(None)  # type: ignore[no-untyped-call]  # theirs

    def collect(self) -> Iterable[prometheus_client.Metric]:
        for _ in range(READINGS - 1):
            with suppress(struct.error, RuntimeError):  # a file that a worker is just making
                return list(self._files.collect())
            hub.sleep(READING_S)
        return list(self._files.collect())


if metrics_folder.folder() is None:
    prometheus_client.REGISTRY.register(_Collector())
else:
    atexit.register(_publisher.turn)  # inherited by the workers: what was counted since the last turn


@cache
def _scraped() -> Any:
    """prometheus_client's WSGI application, over this process's metrics or those of the shared folder."""
    registry = prometheus_client.REGISTRY
    if metrics_folder.folder() is not None:
        registry = prometheus_client.CollectorRegistry()
        registry.register(_SharedCollector())
    return prometheus_client.make_wsgi_app(registry)


def start() -> None:
    """Keep this process's metrics in the shared folder, if there is one. Idempotent; never waits."""
    if metrics_folder.folder() is not None:
        _publisher.turn()
        _ticker.start()


class MetricsMiddleware:
    """Answers a GET or HEAD of `path` with the metrics, everything else as `app` does. Lives as long as the process.

    It opens no scope and touches no database, so it answers when every pool is exhausted, too; put it outermost. It
    asks nobody who they are: keep the path away from the public.

    Args:
        app: the WSGI application.
        path: where Prometheus scrapes.
    """

    def __init__(self, app: WSGIApplication, path: str = "/metrics") -> None:
        if not path.startswith("/"):
            raise ConfigError(f"MetricsMiddleware: the path {path!r} must begin with '/', such as '/metrics'.")
        self._app = app
        self._path = path
        self._epoch: int | None = None  # of the process that was started

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        fork.look()
        if self._epoch != fork.epoch:
            self._epoch = fork.epoch
            start()
        if environ.get("PATH_INFO") != self._path:
            return self._app(environ, start_response)
        method = environ["REQUEST_METHOD"]
        if method not in ("GET", "HEAD"):
            start_response("405 Method Not Allowed", [("Allow", "GET, HEAD"), ("Content-Type", "text/plain")])
            return [b"Metrics are read: GET or HEAD.\n"]
        if metrics_folder.folder() is not None:
            _publisher.turn()
        body: list[bytes] = _scraped()(environ | {"REQUEST_METHOD": "GET"}, start_response)
        return [] if method == "HEAD" else body
