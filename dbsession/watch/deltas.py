"""What has been counted since somebody looked last: for those who add it to counters of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from dbsession.core import fork
from dbsession.core.engine import all_databases
from dbsession.core.pool.stats import Stats
from dbsession.green import hub


class Changes:
    """Hands out each count once. One for each publisher; lives as long as the process, and begins anew after a fork.

    Copying costs nothing where it is counted, which is in the middle of a checkout and even in destructors, where the
    locks of a metrics library must not be taken: a garbage collection may come while this very thread holds them.

    Args:
        numbers: the counts of one database, each of which only grows.
    """

    def __init__(self, numbers: Callable[[Stats], list[float]]) -> None:
        self._numbers = numbers
        self._begin()

    def _begin(self) -> None:
        self._epoch = fork.epoch
        self._lock: Any = hub.allocate_lock()  # never waited for
        self._taken: dict[Stats, tuple[str, list[float]]] = {}  # each database's name, and what was handed out

    def take(self) -> Iterator[tuple[str, list[float]]]:
        """For each database its name and by how much each number has grown. Nothing while another thread is at it."""
        fork.look()
        if self._epoch != fork.epoch:
            self._begin()
        if not self._lock.acquire(False):
            return
        try:
            present = {each.stats: each.name for each in all_databases()}
            for stats, name in (present | {stats: name for stats, (name, _) in self._taken.items()}).items():
                now = self._numbers(stats)
                _, before = self._taken.get(stats, (name, [0.0] * len(now)))
                # A derived number may fall for a moment.
                self._taken[stats] = name, list(map(max, now, before))
                if stats not in present:  # nobody counts there any more
                    del self._taken[stats]
                yield name, [max(0.0, number - known) for number, known in zip(now, before, strict=True)]
        finally:
            self._lock.release()
