"""What the backends of psycopg and asyncpg have in common: liveness, and what a connection needs as it comes back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from sqlalchemy.exc import DisconnectionError
from sqlalchemy.util.concurrency import in_greenlet

from dbsession.core.backends.postgresql import PostgreSQL
from dbsession.core.backends.postgresql_sent import Sent
from dbsession.core.connection_info import ASIDE, CLEANING_S, OPENING


class LoopPostgreSQL(PostgreSQL):
    """The rules of one engine in asyncio, by a driver whose connections are ours. Lives as long as the engine."""

    ADAPTED: ClassVar[type[Any]]
    """Our class of SQLAlchemy's adapter. Another one was made by a creator of the user's, and its state we do not
    know."""

    def connected(self, connection: Any, info: dict[Any, Any]) -> None:
        super().connected(connection, info)
        if isinstance(connection, self.ADAPTED):
            connection.read_within(self.config.read_timeout_s)  # until now it was a part of connecting

    def around_do_ping(self, inner: Callable[[Any], bool]) -> Callable[[Any], bool]:
        def do_ping(dbapi_connection: Any) -> bool:
            if not isinstance(dbapi_connection, self.ADAPTED):
                return inner(dbapi_connection)
            connection: Any = dbapi_connection
            try:
                connection.ping(self.config.ping_idle_s, self.config.connect_timeout_s)
            except Exception as error:
                if connection.open:
                    raise
                if not self.discards.due():
                    raise DisconnectionError("this one only") from error  # else SQLAlchemy discards all
                return False
            return True

        return do_ping

    def around_do_terminate(self, inner: Callable[[Any], None]) -> Callable[[Any], None]:
        def do_terminate(dbapi_connection: Any) -> None:
            # Nobody waits for that: a second cancellation there would take the place of the first, and of what it says
            # of a COMMIT.
            if isinstance(dbapi_connection, self.ADAPTED):
                dbapi_connection.close()
            else:
                inner(dbapi_connection)

        return do_terminate

    def clean(self, connection: Any) -> bool:
        """Take back what its user has set on a connection that comes back; return False if it has to be closed
        instead. May wait."""
        if not isinstance(connection, self.ADAPTED):
            return True
        adapted: Any = connection
        sent: Sent = adapted.driver_connection.sent
        if not adapted.settled:
            return False
        if not adapted.is_changed and self.config.reset != "connection":
            sent.phase = OPENING
            return True
        if sent.settings is None or not adapted.can_be_reset or not in_greenlet():
            return False
        sent.phase = ASIDE
        before = adapted.read_within_at_most(CLEANING_S)
        adapted.reset()
        adapted.read_within(before)
        sent.returned()
        return bool(adapted.open)
