"""KILL under gevent: a greenlet, or a thread of ours, that ends abandoned statements by a side connection."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from pymysql import err
from pymysql.cursors import Cursor
from sqlalchemy.engine import Engine

from dbsession.core.backends.mysql_kill import (
    AGAIN_S,
    OWN_THREAD,
    TIMEOUT_S,
    Killer,
    NotLetIn,
    Thread,
    side_arguments,
)
from dbsession.core.backends.mysql_tls import TLSContexts
from dbsession.core.pool.stats import Stats
from dbsession.green.abandoned import EndsAbandoned
from dbsession.green.mysql.connection import Connection

SIDE: ContextVar[Thread | None] = ContextVar("dbsession.side", default=None)
"""For whose thread the greenlet or thread opens a side connection now."""


class GreenKiller(Killer, EndsAbandoned):
    """Ends abandoned statements of one engine. Lives as long as the engine."""

    again_s = AGAIN_S

    def __init__(self, name: str, stats: Stats, tls: TLSContexts | None = None) -> None:
        Killer.__init__(self, name, stats)
        self._tls = tls
        self.engine: Callable[[], Engine | None] = lambda: None
        EndsAbandoned.__init__(self)

    def opened(self, connection: Connection, arguments: dict[str, Any]) -> None:
        """Note how the server sees a connection just opened with these arguments: a round trip, unless it is known."""
        self.take_over()  # made with the engine, perhaps before a fork
        connection.reopen = lambda thread: self.open_side(thread, arguments)
        self.note_hub()
        if connection.local is not None:
            connection.seen_as = self.host_of(connection.local, connection.peer) or self._ask(connection)
        connection.on_abandon = self.abandon_connection  # not before: the question itself is nothing to end

    def _ask(self, connection: Connection) -> str | None:
        with connection.cursor(Cursor) as cursor:
            try:
                cursor.execute(OWN_THREAD)
                return self.learn(connection.local, connection.peer, connection.thread_id(), cursor.fetchone())
            except err.MySQLError:
                if not connection.open:
                    raise
                return None  # a server that speaks the protocol, and has no such table
            finally:
                connection.used = False

    def abandon_connection(self, connection: Connection) -> None:
        """Have the statement of this connection ended. Does not wait; may be called by anybody, the Hub included."""
        self.take_over()
        if self.abandon(Thread(connection.thread_id(), connection.seen_as, connection.peer, connection.reopen)):
            self.begin()

    def end(self, thread: Thread) -> None:
        side = self._open(thread)
        try:
            with side.cursor() as cursor:
                self._run(thread, cursor)
        finally:
            side.close()

    def _open(self, thread: Thread) -> Any:
        token = SIDE.set(thread)
        try:
            engine: Any = self.engine()
            # As the pool opens one, with the user's `do_connect` listeners.
            side = thread.own(thread) if engine is None else engine.pool._invoke_creator(None)
        except Exception as error:
            if not self.is_barred(error):
                raise
            try:
                side = thread.own(thread)
            except Exception as own:
                raise NotLetIn(error, own) if self.is_barred(own) else own from error
        finally:
            SIDE.reset(token)
        return side

    def open_side(self, thread: Thread, arguments: dict[str, Any]) -> Connection:
        """Open a side connection to the address that `thread` has: its name may mean another server by now."""
        timeouts = dict.fromkeys(("connect_timeout", "read_timeout", "write_timeout"), TIMEOUT_S)
        ours = {"defer_connect": True, "cursorclass": Cursor}
        side = Connection(tls=self._tls, **side_arguments(arguments) | timeouts | ours)
        own = arguments.get("bind_address")
        raw = socket.create_connection(thread.peer[:2], TIMEOUT_S, None if own is None else (own, 0))
        side.connect(raw)  # or closes it
        return side

    def _run(self, thread: Thread, cursor: Any) -> None:
        steps = self.steps(thread)
        try:
            statement = next(steps)
            while True:
                try:
                    cursor.execute(statement)
                except err.MySQLError as error:
                    statement = steps.throw(error)
                else:
                    statement = steps.send(cursor.fetchone())
        except StopIteration:
            pass
