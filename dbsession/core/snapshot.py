"""What a snapshot is made of, in both halves: its shapes, and how they are filled."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

# Private, and the only list there is of the sessions that are alive: one of ours would cost every request its part.
# tests/unit/test_private_names.py fails loudly when the name goes.
from sqlalchemy.orm.session import _sessions
from sqlalchemy.pool import QueuePool

from dbsession.core import fork
from dbsession.core.engine import Database, all_databases
from dbsession.core.pool.holders import Holder
from dbsession.core.pool.stats import BOUNDS_S, Histogram, Stats, quantile
from dbsession.core.scope import BaseScope
from dbsession.core.session import ManagedSession

VERSION = 1
"""The version of the shape that `Snapshot.as_dict()` has."""


@dataclass(frozen=True, slots=True)
class HistogramSnapshot:
    """How often something took how long: `counts[i]` values were at most `bounds_s[i]` seconds (and more than the
    bound before), the last of `counts` has the rest."""

    bounds_s: tuple[float, ...]
    counts: tuple[int, ...]
    sum_s: float

    def quantile(self, q: float) -> float | None:
        """The seconds below which the part `q` (0 to 1) of the values lies; None: there are none."""
        return quantile(self.counts, q)


@dataclass(frozen=True, slots=True)
class DatabaseSnapshot:
    """One database's pool and counts, since its engine was built (or the process forked); in asyncio each event loop
    has an engine of its own, whose counts end with it.

    `limit` is how many connections there may be, None: any number; `size` how many are kept. Another pool than ours
    has no `limit`, and where it has no size, None. `checkouts` ... `retries` are those of `stats.Stats`. `waits` has
    every checkout, most of them in the first bucket, and who waited in vain.
    """

    name: str
    backend: str
    size: int | None
    limit: int | None
    in_use: int
    idle: int
    waiting: int
    checkouts: int
    connects: int
    invalidated: int
    timeouts: int
    kills: int
    teardown_failures: int
    retries: int
    waits: HistogramSnapshot
    holds: HistogramSnapshot


@dataclass(frozen=True, slots=True)
class SessionSnapshot:
    """One session of a unit of work."""

    database: str
    in_transaction: bool


@dataclass(frozen=True, slots=True)
class ScopeSnapshot:
    """One unit of work that has sessions: its label, what it is ("request", "block", "implicit"), how old it is."""

    label: str
    kind: str
    age_s: float
    sessions: tuple[SessionSnapshot, ...]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state of this process's pools and scopes at `time_s` (seconds since 1970). `holders` and `scopes` begin with
    the oldest."""

    pid: int
    time_s: float
    databases: tuple[DatabaseSnapshot, ...]
    holders: tuple[Holder, ...]
    scopes: tuple[ScopeSnapshot, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return dicts, tuples, strings and numbers, ready for `json.dumps`; with the version of their shape."""
        return {"version": VERSION, **asdict(self)}


def snapshot() -> Snapshot:
    """Take a snapshot of this process: of all its databases, those of `dbsession.aio` included, in every loop.

    Frozen; it changes no more. Never waits and does no I/O, so it may be called anywhere; each number is right for its
    moment, and all are of nearly the same one. Passwords, parameter values and query strings are not in it.
    """
    fork.look()  # or it would tell of its parent
    return snapshot_of(Database)


def snapshot_of(kind: type[Database]) -> Snapshot:
    """Take a snapshot of the databases of this class only, and of the sessions on them; see `snapshot()`."""
    now = time.monotonic()
    databases = live(kind)
    holders = [holder for database in databases for holder in database.held.holders()]
    return Snapshot(
        pid=os.getpid(),
        time_s=time.time(),
        databases=tuple(map(database_snapshot, databases)),
        holders=tuple(sorted(holders, key=lambda holder: -holder.held_s)),
        scopes=tuple(_scopes(kind, now)),
    )


def live(kind: type[Database] = Database) -> list[Database]:
    """List the databases in use, by name: those configured, and earlier ones as long as somebody holds a connection.
    Two managers, or loops, may each have one of a name."""
    ours = (each for each in all_databases() if isinstance(each, kind) and not each.inherited)
    return sorted((each for each in ours if not each.retired or each.held.notes()), key=lambda each: each.name)


def database_snapshot(database: Database) -> DatabaseSnapshot:
    """Take the snapshot of one database: its pool and its counts."""
    pool: Any = database.sync_engine.pool
    ours = hasattr(pool, "limit")  # a FairPool of either half
    sized = isinstance(pool, QueuePool)
    # The pool knows of those being opened, the notes of those of the pool before a dispose().
    in_use = max(len(database.held.notes()), pool.checkedout() if sized else 0)
    return DatabaseSnapshot(
        name=database.name,
        backend=database.config.backend,
        size=pool.size() if sized else None,
        limit=pool.limit() if ours else None,
        in_use=in_use,
        idle=pool.checkedin() if sized else 0,
        waiting=pool.waiting() if ours else 0,
        **{count: getattr(database.stats, count) for count in Stats.COUNTS},
        waits=_histogram(database.stats.waits, database.stats.unwaited()),
        holds=_histogram(database.stats.holds),
    )


def _histogram(histogram: Histogram, besides: int = 0) -> HistogramSnapshot:
    first, *others = histogram.counts
    return HistogramSnapshot(BOUNDS_S, (first + besides, *others), histogram.sum_s)


def _scopes(kind: type[Database], now: float) -> Iterable[ScopeSnapshot]:
    sessions: dict[BaseScope, list[SessionSnapshot]] = {}
    for reference in list(_sessions.valuerefs()):
        session: Any = reference()
        if not isinstance(session, ManagedSession) or session._scope is None:
            continue
        scope, database = session._scope(), session._database
        # `inherited`: the parent's, in a forked child
        if scope is None or database.inherited or not isinstance(database, kind):
            continue
        held = scope.sessions.get(database)
        if session in (held, getattr(held, "sync_session", None)):  # the AsyncSession round it, in asyncio
            sessions.setdefault(scope, []).append(SessionSnapshot(database.name, session.in_transaction()))
    for scope in sorted(sessions, key=lambda scope: scope.since):
        yield ScopeSnapshot(scope.label, scope.kind, max(0.0, now - scope.since), tuple(sessions[scope]))
