"""Interceptors: the one place where an engine's dialect methods are replaced, and where its events are listened to.

A *layer* is an object with methods `around_<name>(inner)`, which return what is called in place of the dialect's method
(or class) of that name, and `on_<event>`, which listen (`on_stock_<event>`: where the pool is not ours);
`executing(inner, cursor, statement, parameters, context)` stands for the three methods that execute a statement, and
calls `inner` with what it got. `install()` takes the layers of an engine from the innermost to the outermost:

    notes        StatementNotes       who executes what, for those who look in
    outcome      TransactionWatch     what becomes of a transaction
    backend      a Backend            the driver's connections: connect, liveness, bounds, isolation levels
    connections  EngineConnections    what is known of the open connections

So do_commit of an asyncio engine on MySQL calls, from the outside in: connections (the next ROLLBACK is not needed),
backend (the answer is there in time), outcome (was it answered?), SQLAlchemy's. Events are listened to in the same
order; `on_connect_first` comes before everything else, SQLAlchemy's own questions to a new server included. Listeners
of the user's code are added later, and come after all of ours.

A replaced method keeps the parameters of the original, with their names: SQLAlchemy's recipes and other libraries call
`dialect.do_execute(cursor, statement, parameters, context=context)`. The dialect is the engine's own, and that of the
engines made from it by execution_options().
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from time import monotonic
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine

from dbsession.core import fork
from dbsession.core.backends.base import Backend
from dbsession.core.connection_info import (
    CHECKOUT,
    COMMITTING,
    DETACHED_USER,
    DOOMED,
    READ_TIMEOUT,
    SCOPE,
    KnownConnection,
)
from dbsession.core.engine import discard_earlier
from dbsession.core.fork import KNOWN
from dbsession.core.outcome import TransactionWatch
from dbsession.core.pool.checkout import Checkout
from dbsession.core.pool.holders import HeldConnections
from dbsession.errors import UsedByTwo

NO_PARAMETERS = "do_execute_no_params"
STATEMENTS = ("do_execute", "do_executemany", NO_PARAMETERS)
REPLACED = (
    *("connect", *STATEMENTS, "execution_ctx_cls"),
    *("do_commit", "do_commit_twophase", "do_rollback", "do_rollback_twophase"),
    *("do_ping", "do_close", "do_terminate"),
    *("set_isolation_level", "reset_isolation_level", "detect_autocommit_setting"),
)
"""What of a dialect may be replaced."""

EVENTS = (
    *("do_connect", "connect", "checkin", "reset", "invalidate"),
    *(*STATEMENTS, "handle_error"),
)
"""What of an engine may be listened to. With a ConnectionEvent that is none of the dialect's, SQLAlchemy joins two
dispatchers in each Connection: 50 calls a request."""

# Texts made for each engine would fill the interpreter's cache of attributes, 4096 entries, before they are freed.
_AROUND = {name: f"around_{name}" for name in REPLACED}
_ON = {name: f"on_{name}" for name in EVENTS}


def install(engine: Engine, layers: Sequence[Any]) -> None:
    """Put the layers, the innermost first, into the dialect and the events of a new engine."""
    dialect = engine.dialect
    for name, ours in _AROUND.items():
        for layer in layers:
            around = getattr(layer, ours, None)
            if around is not None:
                setattr(dialect, name, around(getattr(dialect, name)))
    around_statements = [layer.executing for layer in layers if hasattr(layer, "executing")]
    for name in STATEMENTS if around_statements else ():
        executing = getattr(dialect, name)
        if name == NO_PARAMETERS:
            executing = partial(_with_parameters, executing)
        for each in around_statements:
            executing = partial(each, executing)  # one in another: Python makes no frame for it
        setattr(dialect, name, partial(_without_parameters, executing) if name == NO_PARAMETERS else executing)
    for layer in layers:
        if hasattr(layer, "on_connect_first"):
            event.listen(engine, "connect", layer.on_connect_first, insert=True)
    for name, ours in _ON.items():
        for layer in layers:
            listener = getattr(layer, ours, None)
            if listener is not None:
                event.listen(engine, name, listener)


def _with_parameters(inner: Callable[..., None], cursor: Any, statement: str, parameters: Any, context: Any) -> None:
    inner(cursor, statement, context)


def _without_parameters(executing: Callable[..., None], cursor: Any, statement: str, context: Any = None) -> None:
    executing(cursor, statement, None, context)


class StatementNotes:
    """Notes with which statement a connection in use is busy. Without state.

    Not by events: they tell of the beginning only, and those that tell of the end cost too much (see `outcome`).
    """

    @staticmethod
    def executing(
        inner: Callable[..., None], cursor: Any, statement: str, parameters: Any, context: Any = None
    ) -> None:
        """Execute the statement; `context` is None in a recipe of the user's that names none.

        Raises:
            UsedByTwo: [DBS-TWO] another task, greenlet or thread is in the middle of one on the same Connection. Some
                drivers let the second wait, some mix up the answers.
        """
        if not KNOWN[0]:
            fork.found_out()
        record = None if context is None else context.root_connection.connection.record_info
        note: Checkout | None = None if record is None else record.get(CHECKOUT)
        if note is None:  # SQLAlchemy asks a new server what it can; or it was detached from the pool
            if record is None and context is not None:
                context.root_connection.connection.info[DETACHED_USER] = weakref.ref(context.root_connection)
            inner(cursor, statement, parameters, context)
            return
        connection = context.root_connection
        if note.executing is connection:
            raise UsedByTwo("A statement")
        note.statement = statement
        if note.connection is None:
            note.connection = weakref.ref(connection)
        note.executing = connection
        note.changed = monotonic()
        try:
            inner(cursor, statement, parameters, context)
        finally:
            note.executing = None
            note.changed = monotonic()

    @staticmethod
    def note_user(connection: Connection) -> None:
        """Note who executes, where a listener of the user's has executed the statement in the dialect's place."""
        proxied = connection.connection
        note: Checkout | None = (proxied.record_info or {}).get(CHECKOUT)
        if note is not None:
            note.connection = weakref.ref(connection)
        elif proxied.record_info is None:
            proxied.info[DETACHED_USER] = weakref.ref(connection)


class EngineConnections:
    """What is known of an engine's open connections, in either half. Lives as long as the engine, through forks.

    Written by the pool's events, one operation each, and `closing` by whoever retires the engine.
    """

    def __init__(self, backend: Backend, held: HeldConnections) -> None:
        self.backend = backend
        self.held = held
        self.stats = held.stats
        self.closing = False
        """Whatever comes back is closed."""

    def install(self, engine: Engine, fair_pool: type[Any]) -> None:
        """Follow a new engine, and its pool."""
        install(engine, (StatementNotes, TransactionWatch(self.backend), self.backend, self))
        if isinstance(engine.pool, fair_pool):
            pool: Any = engine.pool
            pool.held = self.held
            pool.is_full = self.backend.is_full
        else:
            self.held.listen(engine)
            for name in ("checkout", "reset"):  # of which our own pool tells at less cost
                listener = getattr(self.backend, f"on_stock_{name}", None)
                if listener is not None:
                    event.listen(engine, name, listener)

    def around_do_close(self, inner: Callable[[Any], None]) -> Callable[[Any], None]:
        def do_close(dbapi_connection: Any) -> None:
            fork.look()
            inner(dbapi_connection)

        return do_close

    def on_connect(self, connection: Any, record: Any) -> None:
        """Note a connection that was opened."""
        self.stats.connects += 1
        self.backend.connected(connection, record.info)
        discards = self.backend.discards
        if discards.refused and self.backend.takes_writes(connection):
            discards.refused = False
            discard_earlier(self.backend.config.url, record.starttime)

    def on_checkin(self, connection: Any, record: Any) -> None:
        """Forget what was its user's of a connection that comes back."""
        if connection is None:
            return  # invalidated while it was out
        info = record.info
        for key in (SCOPE, COMMITTING, DOOMED):
            info.pop(key, None)
        if READ_TIMEOUT in info:
            connection.read_within(info.pop(READ_TIMEOUT))
        if self.closing or (isinstance(connection, KnownConnection) and not connection.open):
            self.close(record)

    def close(self, record: Any) -> None:
        """Close the connection of a pool record that comes back."""
        record.close()

    def on_invalidate(self, *_: object) -> None:
        """Note a connection that was thrown away."""
        self.stats.invalidated += 1
