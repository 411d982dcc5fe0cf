"""The pools in OpenTelemetry, by its semantic conventions for database clients (extra `otel`).

https://opentelemetry.io/docs/specs/semconv/database/database-metrics/
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from sqlalchemy.engine import Engine

from dbsession.core import fork, snapshot
from dbsession.core.engine import all_databases
from dbsession.core.pool.stats import BOUNDS_S, Histogram
from dbsession.errors import ConfigError, to_install
from dbsession.green import api
from dbsession.green.periodic import PeriodicTask
from dbsession.watch.deltas import Changes

try:
    from opentelemetry.metrics import CallbackOptions, Observation, get_meter
except ImportError:
    raise ConfigError(f"OpenTelemetry's metrics need its API: {to_install('otel')}.") from None

if TYPE_CHECKING:
    from opentelemetry.metrics import MeterProvider

POOL = "db.client.connection.pool.name"
STATE = "db.client.connection.state"

RECORD_S = 1.0
KEPT = 100_000
"""Values of one histogram that are kept until they are recorded, RECORD_S later at the latest."""


def instrument(meter_provider: MeterProvider | None = None) -> None:
    """Report the pools of this process, those of engines that are built later, too, as long as it lives; forked
    children report theirs. The pool's name is the database's.

    Args:
        meter_provider: the global one by default.

    Raises:
        ConfigError: [DBS-CONFIG] it was called before.
    """
    global _pools
    if _pools is not None:
        raise ConfigError("otel.instrument() was called twice: each connection would be counted twice.")
    _pools = _Pools(get_meter("dbsession", meter_provider=meter_provider))


class _Pools:
    """The instruments. Lives as long as the process.

    What is counted is read when it is collected. Of the histograms each single value is recorded, which takes locks of
    the SDK's that a destructor must not take; so a checkout only puts its values down (`_values`, one step each), and
    they are recorded each RECORD_S seconds and at each collection.
    """

    def __init__(self, meter: Any) -> None:
        gauge = meter.create_observable_up_down_counter
        name = "db.client.connection.{}".format
        used, idle = partial(_observed, "in_use", {STATE: "used"}), partial(_observed, "idle", {STATE: "idle"})
        gauge(name("count"), [self._recorded, used, idle], "{connection}", "Connections, by state.")
        gauge(name("max"), [partial(_observed, "limit", {})], "{connection}", "Connections that may be open.")
        gauge(name("idle.max"), [partial(_observed, "size", {})], "{connection}", "Idle connections that may be open.")
        gauge(name("pending_requests"), [partial(_observed, "waiting", {})], "{request}", "Callers who wait for one.")
        self._timeouts = meter.create_counter(name("timeouts"), "{timeout}", "Callers who waited in vain.")
        histogram = partial(meter.create_histogram, unit="s", explicit_bucket_boundaries_advisory=BOUNDS_S)
        self._wait_time = histogram(name("wait_time"), description="How long callers waited for their turn.")
        self._use_time = histogram(name("use_time"), description="How long connections were in use, each time.")
        self._changes = Changes(lambda stats: [stats.timeouts, stats.unwaited()])
        self._values: dict[Histogram, tuple[str, Any, deque[float]]] = {}  # written by `_listen`, one step
        for _ in self._changes.take():  # from now on, as the histograms
            pass
        fork.in_child(self._forget)
        self._ticker = PeriodicTask(self._turn)
        self._ticker.start()
        api.on_engine_created(self._listen)

    def _listen(self, name: str, engine: Engine) -> None:
        for database in all_databases():
            if database.sync_engine is engine:
                stats = database.stats
                for histogram, instrument in ((stats.waits, self._wait_time), (stats.holds, self._use_time)):
                    values: deque[float] = deque(maxlen=KEPT)
                    self._values[histogram] = name, instrument, values
                    histogram.tell = values.append
                self._timeouts.add(0, {POOL: name})

    def _turn(self) -> float:
        self._record()
        return RECORD_S

    def _recorded(self, _: CallbackOptions) -> Iterable[Observation]:
        """Record the counts by a callback, so that what is collected is up to date, and that the ticker runs in a
        forked child, too."""
        self._ticker.start()
        self._record()
        return ()

    def _record(self) -> None:
        for name, (timeouts, unwaited) in self._changes.take():
            if timeouts:
                self._timeouts.add(int(timeouts), {POOL: name})
            for _ in range(int(unwaited)):
                self._wait_time.record(0.0, {POOL: name})
        present = [each.stats for each in all_databases()]
        for histogram, (name, instrument, values) in list(self._values.items()):
            while values:
                with suppress(IndexError):  # another thread was quicker
                    instrument.record(values.popleft(), {POOL: name})
            if not any(histogram in (stats.waits, stats.holds) for stats in present):
                del self._values[histogram]

    def _forget(self) -> None:
        """Forget, in a forked child, what was put down: it is the parent's."""
        for _, _, values in self._values.values():
            values.clear()


_pools: _Pools | None = None


def _observed(field: str, attributes: dict[str, str], _: CallbackOptions) -> Iterable[Observation]:
    totals: dict[str, int] = {}  # databases of one name are counted together
    for database in snapshot.live():
        value = getattr(snapshot.database_snapshot(database), field)
        if value is not None:
            totals[database.name] = totals.get(database.name, 0) + value
    return [Observation(total, {POOL: name, **attributes}) for name, total in totals.items()]
