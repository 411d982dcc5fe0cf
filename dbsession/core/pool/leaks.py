"""The leak watch: says which connections are held too long. It reports, and takes nothing away from anybody."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable
from functools import partial

from dbsession.core.config import DatabaseConfig
from dbsession.core.pool.checkout import Checkout
from dbsession.core.pool.holders import HeldConnections

logger = logging.getLogger("dbsession.leaks")

_LONGEST_S, _SHORTEST_S = 1.0, 0.05  # between two looks


class Watches:
    """The LeakWatches of one half of this process. Lives as long as the process.

    Args:
        aside: runs what it is given soon, without waiting for it; what that raises costs nobody anything.
    """

    def __init__(self, aside: Callable[[Callable[[], object]], object]) -> None:
        self.aside = aside
        # By weak references, one set operation at a time: a WeakSet cannot be read while another thread adds to it.
        self._all: set[weakref.ref[LeakWatch]] = set()

    def __len__(self) -> int:
        return len(self._all)

    def add(self, watch: LeakWatch) -> None:
        self._all.add(weakref.ref(watch, self._all.discard))

    def look(self) -> float:
        """Look at every database; return the seconds until the next look."""
        watches = [each for each in (reference() for reference in list(self._all)) if each is not None]
        soonest = min((each.look() for each in watches), default=time.monotonic() + _LONGEST_S)
        return max(_SHORTEST_S, min(_LONGEST_S, soonest - time.monotonic()))


class LeakWatch:
    """Watches the connections of one engine. Lives as long as the engine, through forks."""

    def __init__(self, config: DatabaseConfig, held: HeldConnections, watches: Watches) -> None:
        self._config = config
        self._held = held
        self._aside = watches.aside
        held.tell = self._returned
        limits = [limit_s for limit_s in (config.leak_after_s, config.idle_in_transaction_s) if limit_s]
        # What begins after a look is seen at the next one: not so late that a short limit means nothing.
        self._pause_s = min((limit_s / 4 for limit_s in limits), default=_LONGEST_S)
        if limits:
            watches.add(self)

    def look(self) -> float:
        """Report what is held too long now; return when to look again, by time.monotonic(), at the latest."""
        now = time.monotonic()
        soonest = now + min(self._pause_s, _LONGEST_S)
        for note in self._held.notes():
            taken = note.since
            for limit_s, since, what in (
                (self._config.leak_after_s, taken, "leak"),
                (self._config.idle_in_transaction_s, note.changed, "idle"),
            ):
                if not limit_s or (what in note.reported and note.reported_since == taken):
                    continue
                if now < since + limit_s:
                    soonest = min(soonest, since + limit_s)
                elif what == "leak" or note.state() == "idle in transaction":
                    self._report(what, note, taken, now)
        return soonest

    def _report(self, what: str, note: Checkout, taken: float, now: float) -> None:
        holder = self._held.holder_of(note, now)
        earlier = note.reported if note.reported_since == taken else ()
        if not note.in_use or note.since != taken:
            return  # where we are in a thread of our own, it may have come back meanwhile, and gone to somebody else
        note.reported_as = holder.scope
        note.reported_since = taken
        note.reported = (*earlier, what)  # last: whoever returns it now reads the others
        # Aside, one by one: a log handler may wait, or fail, and that is to cost no other report and no look.
        if what == "idle":
            self._aside(
                lambda: logger.warning(
                    "Database %r: a transaction is open and no statement has run in it for more than "
                    "idle_in_transaction_s=%g s: %s. Commit, roll back or release_dbsession() before slow other work.",
                    holder.database,
                    self._config.idle_in_transaction_s,
                    holder,
                )
            )
            return
        self._held.recording = True
        lines = [f"    {site}" for site in holder.stack or (holder.place,)]
        if holder.taken_at:
            lines += [" The stack of its checkout, innermost first:", *(f"    {site}" for site in holder.taken_at)]
        self._aside(
            lambda: logger.warning(
                "Database %r: a connection has been held for more than leak_after_s=%g s: %s. Its stack now, innermost "
                "first:\n%s",
                holder.database,
                self._config.leak_after_s,
                holder,
                "\n".join(lines),
            )
        )

    def _returned(self, note: Checkout) -> None:
        """Log that a connection that was reported came back. Never waits: it is called in the middle of the return,
        where a kill would cost the connection's slot."""
        said = partial(logger.info, "Database %r: the connection of %s was returned after %.1f s.", self._held.name)
        self._aside(partial(said, note.reported_as, time.monotonic() - note.since))
