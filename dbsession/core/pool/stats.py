"""What is counted of one database in this process: its connections, how long they were waited for, how long held."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
"""Upper bounds of the histograms' buckets, in seconds; one more bucket takes the rest."""


class Histogram:
    """How often something took how long. Lives as long as its Stats.

    Written by any greenlet or thread: each line of `add` that writes is one read, one addition and one store, between
    which CPython lets no other thread run (it looks for that at calls and backward jumps only, since 3.10).
    """

    __slots__ = ("counts", "sum_s", "tell")

    def __init__(self) -> None:
        self.reset()
        self.tell: Callable[[float], object] | None = None
        """Called with each value, too, by destructors as well: it may take no lock, and wait for nothing."""

    def reset(self) -> None:
        self.counts = [0] * (len(BOUNDS_S) + 1)
        self.sum_s = 0.0

    def add(self, seconds: float) -> None:
        bucket = bisect_left(BOUNDS_S, seconds)
        self.counts[bucket] += 1
        self.sum_s += seconds
        if self.tell is not None:
            self.tell(seconds)


class Stats:
    """The counts of one database. Lives as long as its engine; a forked child begins at 0. Written as Histogram is.

    `checkouts` counts connections given out, `connects` those opened, `invalidated` those thrown away by SQLAlchemy or
    by us (a disconnect, a kill in the middle of an answer), `timeouts` callers who waited in vain, `kills` abandoned
    statements ended at the server, `teardown_failures` sessions that failed to close, `retries` further attempts of
    `run_in_transaction`. `waits` has those who waited for a connection, in vain or not (most do not wait at all),
    `holds` how long each connection was held.
    """

    COUNTS = ("checkouts", "connects", "invalidated", "timeouts", "kills", "teardown_failures", "retries")

    def __init__(self) -> None:
        self.waits = Histogram()
        self.holds = Histogram()
        self.reset()

    def reset(self) -> None:
        self.checkouts = self.connects = self.invalidated = self.timeouts = 0
        self.unserved = 0  # whose wait ended with a connection that could not be opened
        self.kills = self.teardown_failures = self.retries = 0
        self.waits.reset()
        self.holds.reset()

    def unwaited(self) -> int:
        """How many got a connection without waiting for one."""
        return max(0, self.checkouts - (sum(self.waits.counts) - self.timeouts - self.unserved))


def quantile(counts: Sequence[int], q: float) -> float | None:
    """The value below which the part `q` (0 to 1) of a histogram's values lies, interpolated inside its bucket, in
    seconds; None where there is no value. What is in the last bucket counts as the largest bound."""
    rank = q * sum(counts)
    below, seen = 0.0, 0
    for bound, count in zip(BOUNDS_S, counts, strict=False):
        if count and seen + count >= rank:
            return below + (bound - below) * max(0.0, rank - seen) / count
        below, seen = bound, seen + count
    return BOUNDS_S[-1] if sum(counts) else None
