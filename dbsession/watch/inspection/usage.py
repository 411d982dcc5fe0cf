"""What the databases of several processes add up to, and what happened between two looks at them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dbsession.core.pool import stats
from dbsession.watch.inspection.client import Collected


@dataclass(frozen=True, slots=True)
class Usage:
    """One database, in the process `pid` or (None) in all of them.

    `checkouts` and `timeouts` are of the engines that there are. `wait_p50_s` and `wait_p99_s` are of the checkouts
    since the earlier look, where there is one, else of all; None: there were none. `checkouts_per_s` needs an earlier
    look.
    """

    database: str
    pid: int | None
    in_use: int
    limit: int | None
    idle: int
    waiting: int
    checkouts: int
    timeouts: int
    checkouts_per_s: float | None
    wait_p50_s: float | None
    wait_p99_s: float | None


def usage(now: Collected, earlier: Collected | None = None, *, by_process: bool = False) -> list[Usage]:
    """The databases by name (and pid), at `now`; with what happened since `earlier`, in the processes that were
    there then."""
    entries: dict[tuple[str, int | None], list[tuple[int, dict[str, Any]]]] = {}
    for worker in now.workers:
        for database in worker["databases"]:
            key = database["name"], worker["pid"] if by_process else None
            entries.setdefault(key, []).append((worker["pid"], database))
    before: dict[tuple[int, str], list[dict[str, Any]]] | None = None
    if earlier is not None:
        before = {}
        for worker in earlier.workers:
            for database in worker["databases"]:
                before.setdefault((worker["pid"], database["name"]), []).append(database)
    seconds = now.time_s - earlier.time_s if earlier is not None else 0.0
    return [
        _usage(name, pid, entries[name, pid], before, seconds)
        for name, pid in sorted(entries, key=lambda key: (key[0], key[1] or 0))
    ]


def _usage(
    name: str,
    pid: int | None,
    entries: list[tuple[int, dict[str, Any]]],
    before: dict[tuple[int, str], list[dict[str, Any]]] | None,
    seconds: float,
) -> Usage:
    databases = [database for _, database in entries]
    limits = [database["limit"] for database in databases]
    waits = [0] * (len(stats.BOUNDS_S) + 1)
    lent = 0
    if before is None:
        waits = _waits(databases)
    else:
        # By process: one may have several of a name, of managers or event loops, and nobody says which was which.
        for process in {process for process, _ in entries}:
            ours = [database for of, database in entries if of == process]
            then = before.get((process, name))
            if then is not None:
                waits = _sum(waits, _risen(_waits(ours), _waits(then)))
                lent += max(0, _checkouts(ours) - _checkouts(then))
    return Usage(
        database=name,
        pid=pid,
        in_use=sum(database["in_use"] for database in databases),
        limit=None if None in limits else sum(limits),
        idle=sum(database["idle"] for database in databases),
        waiting=sum(database["waiting"] for database in databases),
        checkouts=_checkouts(databases),
        timeouts=sum(database["timeouts"] for database in databases),
        checkouts_per_s=lent / seconds if before is not None and seconds > 0 else None,
        wait_p50_s=stats.quantile(waits, 0.5),
        wait_p99_s=stats.quantile(waits, 0.99),
    )


def _waits(databases: list[dict[str, Any]]) -> list[int]:
    counts = [0] * (len(stats.BOUNDS_S) + 1)
    for database in databases:
        counts = _sum(counts, database["waits"]["counts"])
    return counts


def _checkouts(databases: list[dict[str, Any]]) -> int:
    return sum(database["checkouts"] for database in databases)


def _sum(left: Sequence[int], right: Sequence[int]) -> list[int]:
    return [a + b for a, b in zip(left, right, strict=True)]


def _risen(now: Sequence[int], then: Sequence[int]) -> list[int]:
    """By how much; a database configured anew has begun at 0, and counts as not risen."""
    return [max(0, a - b) for a, b in zip(now, then, strict=True)]


def holders(now: Collected) -> list[dict[str, Any]]:
    """The holders of all processes, each with its `pid`; the longest first."""
    found = [{"pid": worker["pid"], **holder} for worker in now.workers for holder in worker["holders"]]
    return sorted(found, key=lambda holder: -holder["held_s"])
