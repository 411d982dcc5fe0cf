"""pg_terminate_backend under gevent: what psycopg2 cannot cancel is ended by a side connection, aside.

psycopg2 has closed the connection by then, and with it the key that a CancelRequest needs. So a side connection is
opened as a new one would be, to the address that the old one had, and ends the session that has both the process id
that ours was told and our socket's own port: behind a proxy or a pooler nobody has both. By a Unix socket there is no
port; there the side connection sees by its own process id whether a pooler stands between.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from time import monotonic
from typing import Any, NamedTuple

import psycopg2
from sqlalchemy.engine import Engine

from dbsession.core.backends import postgresql_errors
from dbsession.core.backends.postgresql_cancel import TIMEOUT_S, Cancels, logger
from dbsession.core.pool.stats import Stats
from dbsession.green.abandoned import EndsAbandoned
from dbsession.green.postgresql.psycopg2 import Connection
from dbsession.green.postgresql.psycopg2_waits import open_within

AGAIN_FOR_S = 30.0
"""Seconds until the last attempt while the server has no room for a side connection."""

END = """
SELECT side.direct, process.pid,
    CASE WHEN side.direct AND process.client_port = %s THEN pg_terminate_backend(process.pid) END
FROM (SELECT pg_backend_pid() = %s AS direct) AS side
LEFT JOIN pg_catalog.pg_stat_activity AS process ON process.pid = %s
"""
"""Answers whether the side connection leads to the server itself, to which a pooler's made-up process ids mean nothing;
the process, if there is one; whether it was ended."""


class Backend(NamedTuple):
    """The server process of one connection, as we know it."""

    pid: int
    address: str | None
    port: int
    """Our own; -1 by a Unix socket, as the server has it."""
    own: Any
    """Opens a side connection with the connection's own arguments, which are in there unseen: a password is among
    them."""


SIDE: ContextVar[Backend | None] = ContextVar("dbsession.postgresql.side", default=None)
"""For whose server process the greenlet or thread opens a side connection now."""


class GreenTerminator(Cancels, EndsAbandoned):
    """Ends abandoned statements of one engine. Lives as long as the engine."""

    def __init__(self, name: str, stats: Stats) -> None:
        Cancels.__init__(self, name, stats)
        EndsAbandoned.__init__(self)
        self.engine: Callable[[], Engine | None] = lambda: None
        self._refused = False
        self._full_since: float | None = None  # the server has had no room for a side connection

    def opened(self, connection: Connection, arguments: dict[str, Any]) -> None:
        """Take charge of what is abandoned on a connection just opened with these arguments."""
        self.take_over()
        self.note_hub()
        connection.reopen = lambda backend: self.open_side(backend, arguments)
        connection.on_abandon = self.abandon

    def abandon(self, connection: Connection) -> None:
        """Have the statement of this connection ended. Does not wait; may be called by anybody, the Hub included."""
        self.take_over()
        self.abandoned.append(Backend(connection.pid, *connection.address, connection.reopen))
        self.begin()

    def end(self, each: Backend) -> None:
        side = self._open(each)
        try:
            with side.cursor() as cursor:
                cursor.execute(END, (each.port, side.get_backend_pid(), each.pid))
                direct, pid, ended = cursor.fetchone()
        finally:
            side.close()
        self._full_since = None
        if direct and pid is None:
            return  # it is over
        if ended:
            self.sent()
        elif ended is None and not self._refused:
            self._refused = True
            logger.warning(
                "Database %r: an abandoned statement is not ended at the server, since its session there cannot be "
                "recognised: the server shows another client under its process id, or none, so a proxy or a pooler "
                "stands between. This is said once. Set statement_timeout there, or kill_abandoned to False.",
                self._name,
            )

    def _open(self, each: Backend) -> Any:
        token = SIDE.set(each)
        try:
            engine: Any = self.engine()
            # As the pool opens one, with the user's `do_connect` listeners: the password may have been changed since.
            side = each.own(each) if engine is None else engine.pool._invoke_creator(None)
        except Exception as error:
            if postgresql_errors.is_full(error):
                raise
            side = each.own(each)
        finally:
            SIDE.reset(token)
        return side

    @staticmethod
    def open_side(backend: Backend, arguments: dict[str, Any]) -> Connection:
        """Open a side connection to the address that `backend` has: its name may mean another server by now."""
        given = dict(arguments)
        if backend.address is not None:
            given["hostaddr"] = backend.address
        side: Connection = open_within(Connection, TIMEOUT_S, given)
        side.read_timeout_s = side.write_timeout_s = TIMEOUT_S
        try:
            side.autocommit = True
        except BaseException:
            side.close()
            raise
        return side

    def tries_again(self, error: Exception, each: Backend | None) -> bool:
        """Put one back to the others, if the server had no room for a side connection."""
        if not postgresql_errors.is_full(error) or each is None:
            return False
        now = monotonic()
        self._full_since = now if self._full_since is None else self._full_since
        if now - self._full_since >= AGAIN_FOR_S:
            return False
        self.abandoned.appendleft(each)
        return True

    def failed(self, error: Exception, each: Backend | None) -> None:
        """Report it, and forget the others of the same server: each would wait as long for one that does not answer."""
        self._full_since = None
        self.not_sent(error)
        if isinstance(error, psycopg2.Error) and postgresql_errors.state(error) is not None:
            return  # it has answered
        for _ in range(len(self.abandoned)):
            other = self.abandoned.popleft()
            if each is not None and other.address != each.address:
                self.abandoned.append(other)
