"""The leak watch: says which connections are held too long. It reports, and takes nothing away from anybody."""

from __future__ import annotations

import logging
import time
import weakref
from functools import partial

from dbsession import hub
from dbsession.config import DatabaseConfig
from dbsession.holders import Checkout, HeldConnections
from dbsession.ticker import Ticker

logger = logging.getLogger(__name__)

_LONGEST_S, _SHORTEST_S = 1.0, 0.05  # between two looks

# Every LeakWatch of this process, by weak references, one set operation at a time: a WeakSet cannot be read while
# another thread adds to it.
_watches: set[weakref.ref[LeakWatch]] = set()


class LeakWatch:
    """Watches the connections of one engine. Lives as long as the engine, through forks."""

    def __init__(self, config: DatabaseConfig, held: HeldConnections) -> None:
        self._config = config
        self._held = held
        held.tell = self._returned
        limits = [limit_s for limit_s in (config.leak_after_s, config.idle_in_transaction_s) if limit_s]
        # What begins after a look is seen at the next one: not so late that a short limit means nothing.
        self._pause_s = min((limit_s / 4 for limit_s in limits), default=_LONGEST_S)
        if limits:
            _watches.add(weakref.ref(self, _watches.discard))

    def look(self) -> float:
        """Report what is held too long now; return when to look again, by time.monotonic(), at the latest."""
        now = time.monotonic()
        soonest = now + min(self._pause_s, _LONGEST_S)
        for note in self._held.notes():
            for limit_s, since, what in (
                (self._config.leak_after_s, note.since, "leak"),
                (self._config.idle_in_transaction_s, note.changed, "idle"),
            ):
                if not limit_s or what in note.reported:
                    continue
                if now < since + limit_s:
                    soonest = min(soonest, since + limit_s)
                elif what == "leak" or note.state() == "idle in transaction":
                    self._report(what, note, now)
        return soonest

    def _report(self, what: str, note: Checkout, now: float) -> None:
        # Aside, one by one: a log handler may wait, or fail, and that is to cost no other report and no look.
        holder = self._held.picture(note, now)
        note.reported_as = holder.scope
        note.reported += (what,)  # last: whoever returns it now reads the other
        if what == "idle":
            hub.run_aside(
                lambda: logger.warning(
                    "Database %r: a transaction is open and no statement has run in it for more than "
                    "idle_in_transaction_s=%g s: %s. Commit, roll back or release_dbsession() before slow other work.",
                    holder.database,
                    self._config.idle_in_transaction_s,
                    holder,
                )
            )
            return
        self._held.note_whole_stacks()
        hub.run_aside(
            lambda: logger.warning(
                "Database %r: a connection has been held for more than leak_after_s=%g s: %s. The stack of its "
                "checkout, innermost first:\n%s",
                holder.database,
                self._config.leak_after_s,
                holder,
                "\n".join(f"    {place}" for place in holder.stack),
            )
        )

    def _returned(self, note: Checkout) -> None:
        """A connection that was reported came back. Never waits: it is called in the middle of the return, where a
        kill would cost the connection's place."""
        text, held_s = "Database %r: the connection of %s was returned after %.1f s.", time.monotonic() - note.since
        hub.run_aside(partial(logger.info, text, self._held.name, note.reported_as, held_s))


def watch() -> None:
    """See to it that this process has its watcher. Called for each new connection, since a process without one has
    nothing to watch."""
    if _watches:
        _ticker.start()


def _look_all() -> float:
    """Look at every database; return the seconds until the next look."""
    watches = [each for each in (reference() for reference in list(_watches)) if each is not None]
    soonest = min((each.look() for each in watches), default=time.monotonic() + _LONGEST_S)
    return max(_SHORTEST_S, min(_LONGEST_S, soonest - time.monotonic()))


_ticker = Ticker(_look_all)
