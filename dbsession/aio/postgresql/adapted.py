"""SQLAlchemy's adapter of a psycopg connection for asyncio, as one of the connections that the rest of us knows."""

from __future__ import annotations

from typing import Any

from sqlalchemy.dialects.postgresql.psycopg import (
    AsyncAdapt_psycopg_connection,
    AsyncAdapt_psycopg_cursor,
    AsyncAdapt_psycopg_ss_cursor,
)
from sqlalchemy.util import await_

from dbsession.core.connection_info import KnownConnection


class Cursor(AsyncAdapt_psycopg_cursor):
    """Leaves the greenlet only where there is something to wait for: psycopg's cursors have nothing to do as they are
    opened. Lives as long as its result is read."""

    __slots__ = ()

    def _aenter_cursor(self, cursor: Any) -> Any:
        return cursor


class StreamCursor(AsyncAdapt_psycopg_ss_cursor):
    """A named cursor. Lives until it is closed, at most as long as its transaction."""

    __slots__ = ()

    def _aenter_cursor(self, cursor: Any) -> Any:
        return cursor

    def close(self) -> None:
        if self._cursor is not None and self._connection.closed:
            self._cursor = None  # type: ignore[assignment]  # as SQLAlchemy has it; nothing is left to close
        super().close()


class Adapted(AsyncAdapt_psycopg_connection, KnownConnection):
    """A connection of ours as SQLAlchemy uses it. Lives as long as it."""

    _connection: Any  # a `Connection` of ours
    can_be_reset = True

    def cursor(self, name: Any = None, /) -> Any:
        stream: Any = StreamCursor
        return stream(self, name) if name else Cursor(self)

    def commit(self) -> None:
        driver = self._connection
        if driver.settled:
            driver.commit_sent = False
        else:
            super().commit()

    def rollback(self) -> None:
        driver = self._connection
        if not (driver.settled or driver.gave_up):  # else the server does, which has lost it
            super().rollback()

    def close(self) -> None:
        self._connection.end()

    def ping(self, idle_s: float, within_s: float) -> None:
        """Raise an error if the connection is gone. One that answered less than `idle_s` seconds ago is looked at only.
        Waits where it is asked, for `within_s` seconds at most."""
        driver = self._connection
        if not driver.was_heard(idle_s):
            await_(driver.ping(within_s))

    @property
    def settled(self) -> bool:
        """Whether it is known that no transaction is open."""
        return bool(self._connection.settled)

    @property
    def is_changed(self) -> bool:
        """Whether its user has changed the session."""
        return bool(self._connection.sent.changed or self._connection.is_listened_to)

    def reset(self) -> None:
        """Take back what the session has set. Waits."""
        await_(self._connection.reset())

    # As `KnownConnection` says.

    @property
    def open(self) -> bool:  # type: ignore[override]  # an attribute there
        return bool(self._connection.open)

    @property
    def gave_up(self) -> bool:  # type: ignore[override]
        return bool(self._connection.gave_up)

    @property
    def commit_sent(self) -> bool:  # type: ignore[override]
        return bool(self._connection.commit_sent)

    @property
    def unread(self) -> bool:
        return bool(self._connection.unread)

    @property
    def streaming(self) -> bool:
        """Whether a named cursor is open, or an answer is read piece by piece."""
        return bool(self._connection.streaming)

    @property
    def pinging(self) -> bool:
        """Whether a ping was sent that is not answered."""
        return bool(self._connection.pinging)

    def finish_at_hand(self) -> bool:
        return not self.unread

    def read_within(self, timeout_s: float | None) -> float | None:
        before: float | None = self._connection.read_within(timeout_s)
        return before

    def read_within_at_most(self, timeout_s: float) -> float | None:
        before: float | None = self._connection.read_within_at_most(timeout_s)
        return before
