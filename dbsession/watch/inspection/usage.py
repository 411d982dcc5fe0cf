"""What the databases of several processes add up to, and what happened between two looks at them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dbsession.core.pool.stats import BOUNDS_S, Stats, quantile
from dbsession.watch.inspection.client import Collected


@dataclass(frozen=True, slots=True)
class Usage:
    """One database, in the process `pid` or (None) in all of them.

    `counts` are those of `Stats.COUNTS`, of the engines that there are. `timed_out` is how many have waited in vain
    since the earlier look; `wait_p50_s` and `wait_p99_s` are of the checkouts since then, where there is one, else of
    all; None: there were none. `checkouts_per_s` needs an earlier look.
    """

    database: str
    pid: int | None
    backend: str
    in_use: int
    limit: int | None
    idle: int
    waiting: int
    counts: dict[str, int]
    timed_out: int
    checkouts_per_s: float | None
    wait_p50_s: float | None
    wait_p99_s: float | None


def usage(now: Collected, earlier: Collected | None = None, *, by_process: bool = False) -> list[Usage]:
    """The databases by name (and pid), at `now`; with what happened since `earlier`, in the processes that were
    there then."""
    present = _by_name_and_process(now)
    before = None if earlier is None else _by_name_and_process(earlier)
    seconds = now.time_s - earlier.time_s if earlier is not None else 0.0
    groups: dict[tuple[str, int | None], list[tuple[str, int]]] = {}
    for name, pid in sorted(present):
        groups.setdefault((name, pid if by_process else None), []).append((name, pid))
    return [_usage(*group, keys, present, before, seconds) for group, keys in groups.items()]


_Databases = dict[tuple[str, int], list[dict[str, Any]]]
"""By name and pid: a process may have several of a name, of managers or event loops, and nobody says which is which."""


def _by_name_and_process(look: Collected) -> _Databases:
    found: _Databases = {}
    for worker in look.workers:
        for database in worker["databases"]:
            found.setdefault((database["name"], worker["pid"]), []).append(database)
    return found


def _usage(
    name: str,
    pid: int | None,
    keys: list[tuple[str, int]],
    present: _Databases,
    before: _Databases | None,
    seconds: float,
) -> Usage:
    databases = [database for key in keys for database in present[key]]
    limits = [database["limit"] for database in databases]
    if before is None:
        lent, timed_out, waits = 0, 0, _counted(databases)[2:]
    else:
        risen = [0] * (len(BOUNDS_S) + 3)
        for key in before.keys() & keys:
            # One that was configured anew has begun at 0, and counts as not risen.
            counts = zip(_counted(present[key]), _counted(before[key]), risen, strict=True)
            risen = [sum_ + max(0, after - earlier) for after, earlier, sum_ in counts]
        lent, timed_out, *waits = risen
    return Usage(
        database=name,
        pid=pid,
        backend=databases[-1]["backend"],
        in_use=_sum(databases, "in_use"),
        limit=None if None in limits else sum(limits),
        idle=_sum(databases, "idle"),
        waiting=_sum(databases, "waiting"),
        counts={count: _sum(databases, count) for count in Stats.COUNTS},
        timed_out=timed_out,
        checkouts_per_s=lent / seconds if before is not None and seconds > 0 else None,
        wait_p50_s=quantile(waits, 0.5),
        wait_p99_s=quantile(waits, 0.99),
    )


def _sum(databases: Iterable[dict[str, Any]], count: str) -> int:
    return sum(database[count] for database in databases)


def _counted(databases: list[dict[str, Any]]) -> list[int]:
    """The sums of what is counted: the checkouts, those in vain, and the waits by bucket."""
    counts = ((each["checkouts"], each["timeouts"], *each["waits"]["counts"]) for each in databases)
    return [sum(column) for column in zip(*counts, strict=True)]


def holders(now: Collected) -> list[dict[str, Any]]:
    """The holders of all processes, the longest first; each with its `pid`, and `late_s`, how old this is."""
    return _rows(now, "holders", "held_s")


def scopes(now: Collected) -> list[dict[str, Any]]:
    """The scopes of all processes, the oldest first; each with its `pid`, and `late_s`, how old this is."""
    return _rows(now, "scopes", "age_s")


def _rows(now: Collected, kind: str, order: str) -> list[dict[str, Any]]:
    rows = [
        {"pid": worker["pid"], "late_s": now.late.get(worker["pid"], 0.0), **row}
        for worker in now.workers
        for row in worker[kind]
    ]
    return sorted(rows, key=lambda row: -row[order])
