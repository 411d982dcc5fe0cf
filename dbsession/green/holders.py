"""Which greenlet holds a connection, and what it is doing: see `core.pool.holders`."""

from __future__ import annotations

import sys
import weakref
from time import monotonic
from typing import Any

from sqlalchemy.pool import ConnectionPoolEntry

from dbsession.core.connection_info import CHECKOUT
from dbsession.core.pool import callsites
from dbsession.core.pool.checkout import Checkout
from dbsession.core.pool.holders import HeldConnections
from dbsession.core.pool.leaks import Watches
from dbsession.core.scope import BaseScope
from dbsession.green import hub, ident
from dbsession.green.periodic import PeriodicTask


class HeldByGreenlets(HeldConnections):
    """The connections of one engine that greenlets, or threads, have in use. Lives as long as the engine."""

    def taken(self, record: ConnectionPoolEntry) -> None:
        # Written out in both halves: what is shared would be a call more in each checkout.
        info: Any = record.record_info
        try:
            note: Checkout = info[CHECKOUT]
        except KeyError:
            note = self.new_note(record)
        note.thread = ident.thread()
        try:
            note.taker = weakref.ref(ident.current())
        except RuntimeError:  # the interpreter is shutting down
            note.taker = None
        note.since = note.changed = monotonic()
        if self.recording:
            self.record_call_site(note, callsites.outwards(sys._getframe()))
        note.in_use = True
        self.stats.checkouts += 1

    def name_of(self, note: Checkout) -> str:
        return ident.name_of(_taker(note), note.thread)

    def scopes_of(self, note: Checkout) -> list[BaseScope]:
        return list(getattr(_taker(note), "_dbsession_scopes", ()))

    def stack_of(self, note: Checkout) -> list[callsites.CallSite] | str:
        taker = _taker(note)
        if taker is None or taker.dead:
            return "its greenlet has ended"
        frame = taker.gr_frame
        if frame is None:  # it runs just now: here, or in another thread
            # The caller's: a frame that is its own variable keeps all that is in it until the next collection.
            frame = sys._getframe(1) if taker is ident.current() else sys._current_frames().get(note.thread)
            frame = taker.gr_frame or frame  # unless it has stopped meanwhile, and another one runs there
        return callsites.users(callsites.outwards(frame))


def _taker(note: Checkout) -> Any:
    return None if note.taker is None else note.taker()


leak_watches = Watches(hub.run_aside)

_leak_watch = PeriodicTask(leak_watches.look)


def watch_leaks() -> None:
    """Start this process's leak watch, unless it runs. Called for each new connection, since a process without one has
    nothing to watch."""
    if leak_watches:
        _leak_watch.start()
