"""Who holds the connections: since when, in which unit of work, and what the holder is doing now.

    HeldConnections ── _notes ──> {Checkout}                  one for each pool record, also of those that are idle
    Checkout, the note made at the checkout ──> Holder, what people and programs are shown of it

Most notes are never read, so a note costs little and keeps nothing alive: a weak reference to the greenlet or task, the
time, the text of the statement that SQLAlchemy has anyway. Where the holder is, and in which scope, is found when
somebody asks, from its present stack (`green.holders`, `aio.holders`). Once a database has had a leak or a PoolTimeout,
each of its checkouts records its call site and scope as well.
"""

from __future__ import annotations

import weakref
from bisect import bisect_left
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic
from types import FrameType
from typing import Any

from sqlalchemy import event, exc
from sqlalchemy.engine import Engine
from sqlalchemy.pool import ConnectionPoolEntry, QueuePool

from dbsession.core import fork
from dbsession.core.connection_info import CHECKOUT, SCOPE, nobody
from dbsession.core.fork import KNOWN
from dbsession.core.pool import callsites
from dbsession.core.pool.checkout import Checkout
from dbsession.core.pool.stats import BOUNDS_S, Stats
from dbsession.core.scope import BaseScope
from dbsession.core.sql import masked
from dbsession.errors import SHOWN_HOLDERS, PoolTimeout


@dataclass(frozen=True, slots=True)
class Holder:
    """One connection in use, at one moment.

    `scope` is what holds it (`GET /orders/7`, the label of a `session_scope()`, or the greenlet's function), `greenlet`
    who; in asyncio that is the task. `state` is "executing", "committing", "idle in transaction" (SQLAlchemy's: it
    lasts from a statement to the commit or rollback, with autocommit there is none) or "idle", and by the drivers whose
    connections are ours "pinging" (the server has not answered yet whether the connection lives) or "streaming" (a
    server-side cursor is open, not read to its end); `state_s` how long no statement began or ended. `place` is where
    the holder is now, as `file:line in function`: the innermost frame outside the standard library, gevent, SQLAlchemy,
    the drivers and dbsession. `stack` begins with it and goes outwards; empty where the greenlet, task or thread has
    ended, as `place` says then. `statement` is the last one, its literals masked, cut at 120 characters. `taken_at` is
    the stack of the checkout; empty before the first leak or PoolTimeout of the database, as none is recorded till
    then.
    """

    database: str
    scope: str
    greenlet: str
    held_s: float
    state: str
    state_s: float
    place: str
    stack: tuple[str, ...]
    statement: str | None
    taken_at: tuple[str, ...] = ()

    def __str__(self) -> str:
        who = self.scope if self.scope == self.greenlet else f"{self.scope} ({self.greenlet})"
        where = f"now at {self.place}" if self.stack else self.place
        taken = f", checked out at {self.taken_at[0]}" if self.taken_at else ""
        last = f", last statement: {self.statement}" if self.statement else ""
        return f"{who} for {self.held_s:.1f} s, {self.state} for {self.state_s:.1f} s, {where}{taken}{last}"


class HeldConnections:
    """The connections of one engine that are in use. Lives as long as the engine, through forks. Who holds them, the
    subclass of each half knows.

    `_notes` grows with the pool, one set operation at a time; who reads it takes a copy.
    """

    def __init__(self, name: str | None = None, backend: str = "", stats: Stats | None = None) -> None:
        self.name = name
        self._backend = backend
        self.stats = stats or Stats()
        self._notes: weakref.WeakSet[Checkout] = weakref.WeakSet()
        # The holders of which a PoolTimeout told last, and until when the next one tells of them. Replaced in one step.
        self._told: tuple[float, tuple[Holder, ...]] = (0.0, ())
        self.recording = False
        """Whether checkouts record their call site. Set once, by whoever sees the first leak or PoolTimeout."""
        self.tell: Callable[[Checkout], None] | None = None
        """Called with the note of a connection that comes back after it was reported. Must not wait."""

    def taken(self, record: ConnectionPoolEntry) -> None:
        """Note that a connection was taken out of the pool. Called for each: all that may be found out later is left
        out."""
        raise NotImplementedError

    def name_of(self, note: Checkout) -> str:
        """Return what people call the greenlet, thread or task that took the connection."""
        raise NotImplementedError

    def stack_of(self, note: Checkout) -> list[callsites.CallSite] | str:
        """The present stack of who took it, innermost first; or a text that says what has become of them.

        From any thread. What is suspended stands still meanwhile; the frames of one that runs may go on while they are
        read, so that a line of them is a moment old, but nothing is written to them, and none is kept.
        """
        raise NotImplementedError

    def scopes_of(self, note: Checkout) -> list[BaseScope]:
        """The scopes that are open now where it was taken, innermost last."""
        raise NotImplementedError

    def record_call_site(self, note: Checkout, frames: Iterable[FrameType]) -> None:
        """Note in which scope a connection was taken, and where: `frames` is the stack there, innermost first."""
        scopes = self.scopes_of(note)
        note.label = scopes[-1].label if scopes and scopes[-1].kind != "implicit" else None
        note.taken_at = callsites.users(frames)

    def new_note(self, record: ConnectionPoolEntry) -> Checkout:
        """The note of this record, at its first checkout."""
        info: Any = record.record_info
        note = info[CHECKOUT] = Checkout()
        note.record = weakref.ref(record)
        note.in_use = False  # until the rest is there, too
        note.statement = note.connection = note.executing = note.label = None
        note.taken_at = []
        note.reported, note.reported_since = (), 0.0
        self._notes.add(note)
        return note

    def returned(self, record: ConnectionPoolEntry) -> None:
        """Note that a connection was given back, or was lost to the pool in another way."""
        info: Any = record.record_info
        note: Checkout | None = info.get(CHECKOUT)
        if note is None or not note.in_use:
            return
        note.in_use = False
        note.statement = note.connection = None  # the first may be large
        held_s, holds = monotonic() - note.since, self.stats.holds
        holds.counts[bisect_left(BOUNDS_S, held_s)] += 1  # as Histogram.add() does, without its call
        holds.sum_s += held_s
        if holds.tell is not None:
            holds.tell(held_s)
        if note.reported:
            if self.tell is not None and note.reported_since == note.since:
                self.tell(note)
            note.reported = ()

    def listen(self, engine: Engine) -> None:
        """Follow a pool that does not call `taken` and `returned` itself."""
        event.listen(engine, "checkout", self._checked_out)
        event.listen(engine, "checkin", lambda _, record: self.returned(record))
        event.listen(engine, "detach", lambda _, record: self.returned(record))

    def _checked_out(self, _: object, record: ConnectionPoolEntry, __: object) -> None:
        if not KNOWN[0]:  # a pool that does not look itself may have handed out a connection of the parent's
            fork.found_out()
            raise exc.DisconnectionError("this process was forked")  # SQLAlchemy then opens another one
        self.taken(record)

    def waited(self, seconds: float, in_vain: bool) -> None:
        """Count that somebody has waited for a connection."""
        self.stats.waits.add(seconds)
        if in_vain:
            self.stats.timeouts += 1

    def not_connected(self, waited: bool) -> None:
        """Count a connection that could not be opened, for whose slot somebody had perhaps waited."""
        self.stats.unserved += waited

    def timeout(self, pool: QueuePool, waiting: int, waited_s: float, refusal: str = "") -> PoolTimeout:
        """The error for whoever has waited in vain, perhaps because of the server's `refusal` to open more."""
        self.recording = True
        sizes = pool.size(), pool.overflow(), pool.checkedout()
        return PoolTimeout(self.name, *sizes, waiting, waited_s, self._holders_for_timeout(), refusal)

    def _holders_for_timeout(self) -> tuple[Holder, ...]:
        """The holders; of a large pool perhaps those found just now: a crowd that waits in vain for it spends no more
        than a fifth of its time, and one copy of them, on saying who they are."""
        until, found = self._told
        began = monotonic()
        if began >= until:
            found = self.holders()
            ended = monotonic()
            if len(found) > SHOWN_HOLDERS:
                self._told = ended + 4 * (ended - began), found
        return found

    def forget(self) -> None:
        """Forget, in a forked child, what was in use: it belongs to the parent."""
        for note in list(self._notes):
            note.in_use = False
        self._notes = weakref.WeakSet()
        self._told = (0.0, ())

    def notes(self) -> list[Checkout]:
        """Return the notes of the connections in use now, longest first."""
        while True:
            with suppress(RuntimeError):  # another thread opened a connection meanwhile
                return sorted((note for note in list(self._notes) if note.in_use), key=lambda note: note.since)

    def holders(self) -> tuple[Holder, ...]:
        """Return what people and programs are shown of the connections in use, the longest held first."""
        now, found = monotonic(), []
        for note in self.notes():
            since = None
            while note.in_use and note.since != since:  # once; else another thread has handed it on meanwhile
                since = note.since
                holder = self.holder_of(note, now)
            if note.in_use and since is not None:
                found.append(holder)
        return tuple(found)

    def holder_of(self, note: Checkout, now: float) -> Holder:
        """Return what people and programs are shown of a `note`, at `now` by time.monotonic()."""
        taker = self.name_of(note)
        stack = self.stack_of(note)
        sites = () if isinstance(stack, str) else callsites.written(stack) or (callsites.UNKNOWN,)
        return Holder(
            database=self.name or "?",
            scope=self._label_of(note) or taker,
            greenlet=taker,
            held_s=max(0.0, now - note.since),
            state=note.state(),
            state_s=max(0.0, now - note.changed),
            place=stack if isinstance(stack, str) else sites[0],
            stack=sites,
            statement=None if note.statement is None else masked(note.statement, self._backend),
            taken_at=callsites.written(note.taken_at),
        )

    def _label_of(self, note: Checkout) -> str | None:
        """The scope of the session that uses it; else the one in which it was checked out, if that is recorded or still
        open. None: an implicit one, or none that is known."""
        record = note.record()
        scope: BaseScope | None = None if record is None else record.info.get(SCOPE, nobody)()
        if scope is None and note.label is None:
            scope = next((each for each in reversed(self.scopes_of(note)) if each.since <= note.since), None)
        if scope is None:
            return note.label
        return None if scope.kind == "implicit" else scope.label
