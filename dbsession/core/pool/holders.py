"""Who holds the connections: since when, in which unit of work, taken at which line, and with what they are busy.

    HeldConnections ── _held ──> {pool record: Checkout}      what is in use now
    Checkout, the note made at the checkout ──> Holder, the picture of it for people and programs

Most notes are never read, so a note costs little and keeps nothing alive: code objects with an offset in place of
frames, a weak reference to the greenlet or task, the text of the statement that SQLAlchemy has anyway. Who takes a
connection is found out by `greenlet_holders`, and by `aio.holders`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine, ExecutionContext
from sqlalchemy.pool import ConnectionPoolEntry, QueuePool

from dbsession.core.connection_info import CHECKOUT, COMMITTING, SCOPE, WIRE
from dbsession.core.pool import callsites
from dbsession.core.pool.stats import Stats
from dbsession.core.sql import masked
from dbsession.errors import PoolTimeout

STACK_FRAMES = 3
"""How many frames of the user's own are noted at a checkout: all of them would cost more than the rest of it."""

_WHOLE_STACK = 200


@dataclass(frozen=True, slots=True)
class Holder:
    """One connection in use, at one moment.

    `scope` is what holds it (`GET /orders/7`, the label of a `session_scope()`, or the greenlet's function),
    `greenlet` who; in asyncio that is the task. `state` is "executing", "committing", "idle in transaction"
    (SQLAlchemy's: it lasts from a statement to the commit or rollback, with autocommit there is none) or "idle", and on
    MySQL and MariaDB "pinging" (the server has not answered yet whether the connection lives) or "streaming" (a
    server-side cursor is not read to its end); `state_s` how long no statement began or ended. `place` is `file:line in
    function` of the innermost frame outside SQLAlchemy and dbsession at the checkout; in asyncio, of this task and
    outside of asyncio itself, too, and where a listener took the connection, the line that awaits. `stack` begins with
    it and goes outwards. `statement` is the last one, its literals masked, cut at 120 characters.
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

    def __str__(self) -> str:
        who = self.scope if self.scope == self.greenlet else f"{self.scope} ({self.greenlet})"
        last = f", last statement: {self.statement}" if self.statement else ""
        return (
            f"{who} for {self.held_s:.1f} s, {self.state} for {self.state_s:.1f} s, checked out at {self.place}{last}"
        )


class Checkout:
    """The note of one checkout, used again for the next one of the same pool record. Lives as long as the record;
    written by whoever uses the connection. It keeps nothing alive but code objects and texts."""

    __slots__ = (
        "__weakref__",
        "changed",
        "connection",
        "executing",
        "in_use",
        "label",
        "record",
        "reported",
        "reported_as",
        "reported_since",
        "since",
        "stack",
        "statement",
        "taker",
        "thread",
    )

    record: weakref.ref[ConnectionPoolEntry]
    in_use: bool  # what else is here is of the last checkout; whether it goes on
    stack: callsites.Noted
    taker: weakref.ref[Any] | None  # the greenlet or task; another one may use the connection meanwhile
    thread: int  # the native one of a greenlet
    label: str | None  # of the scope in which it was checked out
    statement: str | None
    connection: weakref.ref[Connection] | None  # SQLAlchemy's, that has executed something
    executing: bool
    since: float  # by time.monotonic(), as `changed`: when `executing` became what it is
    changed: float
    # By the leak watch, perhaps in a thread of its own; it counts for the checkout that began at `reported_since`.
    reported: tuple[str, ...]  # what was said of it
    reported_as: str  # whose it was then
    reported_since: float

    def state(self) -> str:
        """What it is busy with: see `Holder`."""
        if self.executing:
            return "executing"
        record = self.record()
        if record is None or record.dbapi_connection is None:
            return "idle"
        if COMMITTING in record.info:
            return "committing"
        wire = record.info.get(WIRE, record.dbapi_connection)
        if getattr(wire, "pinging", False):
            return "pinging"
        if getattr(wire, "unread", False):
            return "streaming"
        user = None if self.connection is None else self.connection()
        return "idle in transaction" if _in_transaction(record.dbapi_connection, user) else "idle"


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
        self.frames = STACK_FRAMES
        """How many are noted from now on."""
        self.tell: Callable[[Checkout], None] | None = None
        """Called with the note of a connection that comes back after it was reported. Must not wait."""

    def taken(self, record: ConnectionPoolEntry) -> None:
        """A connection was taken out of the pool. Called for each: all that may be found out later is left out."""
        raise NotImplementedError

    def name_of(self, note: Checkout) -> str:
        """What people call who took it."""
        raise NotImplementedError

    def new_note(self, record: ConnectionPoolEntry) -> Checkout:
        """The note of this record, at its first checkout."""
        info: Any = record.record_info
        note = info[CHECKOUT] = Checkout()
        note.record = weakref.ref(record)
        note.in_use = note.executing = False  # until the rest is there, too
        note.statement = note.connection = None
        note.reported, note.reported_since = (), 0.0
        self._notes.add(note)
        return note

    def returned(self, record: ConnectionPoolEntry) -> None:
        """It was given back, or was lost to the pool in another way."""
        info: Any = record.record_info
        note: Checkout | None = info.get(CHECKOUT)
        if note is None or not note.in_use:
            return
        note.in_use = False
        note.statement = note.connection = None  # the first may be large
        self.stats.holds.add(monotonic() - note.since)
        if note.reported:
            if self.tell is not None and note.reported_since == note.since:
                self.tell(note)
            note.reported = ()

    def listen(self, engine: Engine) -> None:
        """Follow a pool that does not call `taken` and `returned` itself."""
        event.listen(engine, "checkout", self._checked_out)
        event.listen(engine, "checkin", self._checked_in)
        event.listen(engine, "detach", self._checked_in)

    def _checked_out(self, _: Any, record: ConnectionPoolEntry, __: Any) -> None:
        self.taken(record)

    def _checked_in(self, _: Any, record: ConnectionPoolEntry) -> None:
        self.returned(record)

    def waited(self, seconds: float, in_vain: bool) -> None:
        """Somebody has waited for a connection."""
        self.stats.waits.add(seconds)
        if in_vain:
            self.stats.timeouts += 1

    def not_connected(self, waited: bool) -> None:
        """Somebody's connection, for whose place they had perhaps waited, could not be opened."""
        self.stats.unserved += waited

    def timeout(self, pool: QueuePool, waiting: int, waited_s: float) -> PoolTimeout:
        """The error for whoever has waited in vain."""
        sizes = pool.size(), pool.overflow(), pool.checkedout()
        return PoolTimeout(self.name, *sizes, waiting, waited_s, self.holders())

    def note_whole_stacks(self) -> None:
        """From now on: after a leak was seen, it is worth its time."""
        self.frames = _WHOLE_STACK

    def forget(self) -> None:
        """In a forked child: what was in use belongs to the parent."""
        for note in list(self._notes):
            note.in_use = False
        self._notes = weakref.WeakSet()

    def notes(self) -> list[Checkout]:
        """Those in use now, longest first."""
        while True:
            try:
                return sorted((note for note in list(self._notes) if note.in_use), key=lambda note: note.since)
            except RuntimeError:  # another thread opened a connection meanwhile
                continue

    def holders(self) -> tuple[Holder, ...]:
        """The same, as pictures."""
        now = monotonic()
        return tuple(self.picture(note, now) for note in self.notes())

    def picture(self, note: Checkout, now: float) -> Holder:
        """`note` for people and programs, at `now` by time.monotonic()."""
        stack = callsites.written(note.stack)
        taker = self.name_of(note)
        record = note.record()
        home = None if record is None else record.info.get(SCOPE, _nobody)()
        label = note.label if home is None else home.label
        implicit = label is None or (home is not None and home.kind == "implicit")
        return Holder(
            database=self.name or "?",
            scope=taker if implicit or label is None else label,
            greenlet=taker,
            held_s=max(0.0, now - note.since),
            state=note.state(),
            state_s=max(0.0, now - note.changed),
            place=stack[0],
            stack=stack,
            statement=None if note.statement is None else masked(note.statement, self._backend),
        )


def _nobody() -> Any:
    return None


def _in_transaction(connection: Any, user: Connection | None) -> bool:
    """Whether a transaction is open on this DBAPI connection: for SQLAlchemy, as `Session.in_transaction()` has it,
    since a SELECT alone may begin none at the server, and holds the connection all the same; or as far as the driver
    tells, else probably."""
    driver = getattr(connection, "driver_connection", connection)  # below SQLAlchemy's adapter of one for asyncio
    try:
        if user is not None and user.in_transaction() and not _autocommits(user, connection):
            return True
        known = getattr(driver, "in_transaction", None)
        if known is None and hasattr(driver, "get_transaction_status"):  # asyncmy, aiomysql
            known = driver.get_transaction_status()
        return bool(known) if known is not None else getattr(connection, "autocommit", False) is not True
    except Exception:  # closed just now
        return False


def _autocommits(user: Connection, connection: Any) -> bool:
    try:
        return user.dialect.detect_autocommit_setting(connection)
    except NotImplementedError:  # not every dialect can tell
        return False


def watched(execute: Callable[..., Any]) -> Callable[..., Any]:
    """One of a dialect's methods that execute a statement, with a look at it before and after. Not by events: they tell
    of the beginning only, and those that tell of the end cost too much (see `outcome`)."""

    def noting(cursor: Any, statement: str, *arguments: Any) -> None:
        context = arguments[-1] if arguments else None  # it stands last, where there is one
        if not isinstance(context, ExecutionContext):
            execute(cursor, statement, *arguments)
            return
        record = context.root_connection.connection.record_info
        note = None if record is None else record.get(CHECKOUT)
        if note is None:  # SQLAlchemy asks a new server what it can; or it was detached from the pool
            execute(cursor, statement, *arguments)
            return
        note.statement = statement
        if note.connection is None:
            note.connection = weakref.ref(context.root_connection)
        note.executing = True
        note.changed = monotonic()
        try:
            execute(cursor, statement, *arguments)
        finally:
            note.executing = False
            note.changed = monotonic()

    return noting
