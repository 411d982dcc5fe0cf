"""What a connection needs as it comes back, before somebody else gets it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

from sqlalchemy.engine import Engine
from sqlalchemy.pool import ConnectionPoolEntry, PoolResetState

from dbsession.core.backends.base import Backend
from dbsession.core.config import DatabaseConfig
from dbsession.core.connection_info import ASIDE, CLEANING_S, OPENING


class Cleans(Backend):
    """Before a kind of database among the bases of a backend whose connections are ours. Lives as long as the engine.

    In our own pool they are cleaned aside, and what is known to be clean costs no round trip; in another one as
    SQLAlchemy resets them.
    """

    CONNECTION: ClassVar[type[Any]]
    LOGGER: ClassVar[str]
    _take_level_back: Callable[[Any], None]

    def __init__(self, config: DatabaseConfig) -> None:
        super().__init__(config)
        self.cleans = False
        """The pool is ours, and cleans what comes back."""

    def made(self, engine: Engine, cleans: bool) -> None:
        """Take note of the new engine, whose pool `cleans` what comes back; log what the user's own options take away
        from what is promised of its connections."""
        self.cleans = cleans
        if "creator" in self.config.options:
            logging.getLogger(self.LOGGER).warning(
                "Database %r: its `creator` opens stock connections, so a kill or a timeout may leave them out of step "
                "with the server, and abandoned statements run on there. Remove it, and use `connect_args`.",
                self.config.name,
            )

    def fair_pool_options(self) -> dict[str, Any]:
        # Our pool cleans what comes back, and what is known to be clean costs no round trip.
        return {} if "creator" in self.config.options else {"pool_reset_on_return": None}

    def is_to_be_reset(self, connection: Any) -> bool:
        """Return whether the session of a connection that comes back is not as at first."""
        return bool(connection.sent.changed) or self.config.reset == "connection"

    def reset(self, connection: Any) -> None:
        """Take back what the session of a connection that comes back has set. Switches."""
        if connection.sent.settings is None:  # too much was set as it was opened
            connection.close()
        else:
            connection.reset()

    def cleaning(self, record: ConnectionPoolEntry) -> Callable[[], None] | None:
        """Return what a returned connection needs before somebody else gets it; None: nothing."""
        connection: Any = record.dbapi_connection
        if connection is not None and not isinstance(connection, self.CONNECTION):
            # A `do_connect` listener's own. (With a `creator`, SQLAlchemy's reset is on.) Its state we do not know.
            return None if "creator" in self.config.options else connection.rollback
        if connection is None or not connection.open:
            return None
        sent = connection.sent
        how: Callable[[Any], None]
        if self.is_to_be_reset(connection):
            how = self.reset
        elif sent.level_changed:
            how = self.reset_level
        elif connection.settled:
            connection.forget_answer()
            sent.phase = OPENING
            return None
        else:
            how = self.CONNECTION.rollback
        sent.phase = ASIDE
        return partial(self._clean, connection, how)

    def on_stock_checkout(self, connection: Any, *_: object) -> None:
        """Note that a connection of another pool than ours is its user's from now on."""
        if isinstance(connection, self.CONNECTION):
            if connection.sent.phase is not OPENING and connection.settled:  # SQLAlchemy has rolled it back
                connection.forget_answer()
            connection.sent.taken(connection)

    def on_stock_reset(self, connection: Any, _: ConnectionPoolEntry, state: PoolResetState) -> None:
        """Reset a connection that comes back to another pool than ours."""
        if state.terminate_only or not isinstance(connection, self.CONNECTION) or not connection.open:
            return
        if self.is_to_be_reset(connection):
            connection.sent.phase = ASIDE
            self._clean(connection, self.reset)
        elif connection.settled:
            connection.forget_answer()

    def around_reset_isolation_level(self, inner: Callable[[Any], None]) -> Callable[[Any], None]:
        self._take_level_back = inner

        def reset_isolation_level(dbapi_conn: Any) -> None:
            # SQLAlchemy takes an isolation level back in the middle of the return, where a kill costs the slot.
            if self.cleans and isinstance(dbapi_conn, self.CONNECTION):
                dbapi_conn.sent.level_changed = True
            else:
                inner(dbapi_conn)

        return reset_isolation_level

    def reset_level(self, connection: Any) -> None:
        """Take back the isolation level of one checkout. Switches."""
        connection.rollback()
        self._take_level_back(connection)
        connection.sent.level_changed = False

    def _clean(self, connection: Any, how: Callable[[Any], None]) -> None:
        before = connection.read_within_at_most(CLEANING_S)
        how(connection)
        connection.read_within(before)
        if not connection.open:  # an unread stream, say
            raise ConnectionAbortedError("the connection was given up while it was cleaned")
        connection.forget_answer()
        connection.sent.returned()
