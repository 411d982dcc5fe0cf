"""Which greenlet holds a connection: see `holders`."""

from __future__ import annotations

import weakref
from time import monotonic
from typing import Any

from sqlalchemy.pool import ConnectionPoolEntry

from dbsession.core.connection_info import CHECKOUT
from dbsession.core.pool import callsites
from dbsession.core.pool.holders import Checkout, HeldConnections
from dbsession.green import ident


class HeldByGreenlets(HeldConnections):
    """The connections of one engine that greenlets, or threads, have in use. Lives as long as the engine."""

    def taken(self, record: ConnectionPoolEntry) -> None:
        # Written out in both halves: what is shared would be a call more in each checkout.
        info: Any = record.record_info
        try:
            note: Checkout = info[CHECKOUT]
        except KeyError:
            note = self.new_note(record)
        note.stack = callsites.noted_from_pool(self.frames)
        note.thread = ident.thread()
        try:
            caller = ident.current()
            note.taker = weakref.ref(caller)
            note.label = caller._dbsession_scopes[-1].label
        except RuntimeError:  # the interpreter is shutting down
            note.taker = note.label = None
        except (AttributeError, IndexError):
            note.label = None
        note.since = note.changed = monotonic()
        note.in_use = True
        self.stats.checkouts += 1

    def name_of(self, note: Checkout) -> str:
        return ident.name_of(note.taker() if note.taker is not None else None, note.thread)
