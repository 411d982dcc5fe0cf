"""The last minutes of every database, over all workers: what the dashboard's charts show."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Iterable
from typing import Any, NamedTuple

from dbsession.watch.inspection.client import Collected, summary
from dbsession.watch.inspection.usage import Usage, holders, scopes, usage

KEPT_S = 300
INTERVAL_S = 0.5
"""The pause between two looks at the workers."""

WINDOW_S = 5.0
"""Rates and quantiles are of so many seconds: of a single interval they would jump about."""

SHOWN_ROWS = 500
"""How many holders, and how many scopes, one answer has."""


class Point(NamedTuple):
    """One database at one moment; None where no worker told, or where there was nothing to measure."""

    time_s: float
    in_use: int | None = None
    limit: int | None = None
    waiting: int | None = None
    checkouts_per_s: float | None = None
    wait_p50_s: float | None = None
    wait_p99_s: float | None = None


class _Series:
    """One database's points, oldest first, each with the number of its look. Lives until only gaps are left of it."""

    def __init__(self) -> None:
        self.points: deque[tuple[int, Point]] = deque(maxlen=int(KEPT_S / INTERVAL_S))
        self.usage: Usage | None = None  # at the last look; None: no worker has it
        self.timed_out_s: float | None = None  # when somebody last waited in vain, in seconds since 1970


class History:
    """What the dashboard knows. Lives as long as its process.

    Written by the poller's greenlet alone, by `add`, and read by the requests: no method switches greenlets, so each
    sees it whole.
    """

    def __init__(self) -> None:
        self._id = secrets.token_hex(4)  # by which a page notices that the dashboard was started anew
        self._number = 0
        self._series: dict[str, _Series] = {}
        self._looks: deque[Collected] = deque()  # of the last WINDOW_S, oldest first

    def add(self, now: Collected) -> None:
        """Take in a look at all workers, newer than those before."""
        self._number += 1
        while self._looks and now.time_s - self._looks[0].time_s > WINDOW_S:
            self._looks.popleft()
        # The very first look has nothing to be compared with: compared with itself, nothing has happened yet.
        found = {each.database: each for each in usage(now, self._looks[0] if self._looks else now)}
        for name in found.keys() | self._series.keys():
            each, series = found.get(name), self._series.setdefault(name, _Series())
            series.usage, point = each, Point(now.time_s)
            if each is not None:
                if each.timed_out:
                    series.timed_out_s = now.time_s
                told = each.in_use, each.limit, each.waiting
                point = Point(now.time_s, *told, each.checkouts_per_s, each.wait_p50_s, each.wait_p99_s)
            series.points.append((self._number, point))
            if all(point.in_use is None for _, point in series.points):
                del self._series[name]
        self._looks.append(now)

    def answer(self, cursor: str, now_s: float) -> dict[str, Any]:
        """Return what a page shows that has everything up to `cursor`, the one of the answer before ("": nothing yet).

        Args:
            now_s: seconds since 1970.
        """
        id_, _, number = cursor.partition("-")
        seen = int(number) if id_ == self._id and number.isascii() and number.isdecimal() and len(number) < 16 else 0
        now = self._looks[-1] if self._looks else Collected(now_s, [])
        held, open_scopes = holders(now), scopes(now)
        missing = now.silent or now.late or now.unreadable
        return {
            "cursor": f"{self._id}-{self._number}",
            "interval_s": INTERVAL_S,
            "kept_s": KEPT_S,
            "time_s": now.time_s,
            "age_s": max(0.0, now_s - now.time_s),
            "workers": len(now.workers),
            "summary": summary(now),
            "level": "bad" if not now.workers else "waiting" if missing else "fine",
            "late": list(now.late.items()),
            "point": Point._fields,
            "databases": [
                {
                    "name": name,
                    "backend": series.usage and series.usage.backend,
                    "counts": series.usage and {"idle": series.usage.idle, **series.usage.counts},
                    "timed_out_s": series.timed_out_s,
                    "points": _after(series.points, seen),
                }
                for name, series in sorted(self._series.items())
            ],
            "holders": held[:SHOWN_ROWS],
            "more_holders": max(0, len(held) - SHOWN_ROWS),
            "scopes": open_scopes[:SHOWN_ROWS],
            "more_scopes": max(0, len(open_scopes) - SHOWN_ROWS),
        }


def _after(points: Iterable[tuple[int, Point]], seen: int) -> list[Point]:
    return [point for number, point in points if number > seen]
