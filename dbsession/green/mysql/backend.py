"""PyMySQL's backend: engines whose connections are ours, cleaned as they come back, and killed at the server."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

from pymysql.constants import SERVER_STATUS
from sqlalchemy.engine import Engine
from sqlalchemy.pool import ConnectionPoolEntry, PoolResetState

from dbsession.core.backends.mysql import CLEANING_S, MySQL
from dbsession.core.backends.mysql_sent import ASIDE, OPENING, USED
from dbsession.core.backends.mysql_tls import TLSContexts
from dbsession.core.config import TIMEOUTS, DatabaseConfig
from dbsession.core.interceptors import StatementNotes
from dbsession.core.pool.stats import Stats
from dbsession.green.mysql import session_state
from dbsession.green.mysql.connection import Connection
from dbsession.green.mysql.kill import SIDE, GreenKiller

logger = logging.getLogger("dbsession.mysql")


class PyMySQL(MySQL):
    """The rules of one engine by PyMySQL, and its connections. Lives as long as the engine."""

    def __init__(self, config: DatabaseConfig, stats: Stats) -> None:
        super().__init__(config)
        self._tls = TLSContexts()
        self._killer = GreenKiller(config.name, stats, self._tls) if config.kill_abandoned else None
        self._take_level_back: Callable[[Any], None]
        self.cleans = False
        """The pool is ours, and cleans what comes back."""

    def engine_options(self) -> dict[str, Any]:
        # PyMySQL waits for ever by default: a silent server would hang every request.
        timeouts = {key.removesuffix("_s"): getattr(self.config, key) for key in TIMEOUTS}
        return {"connect_args": self.driver_arguments(**timeouts)}

    def fair_pool_options(self) -> dict[str, Any]:
        # Our pool cleans what comes back, and what the server calls clean costs no round trip.
        return {} if "creator" in self.config.options else {"pool_reset_on_return": None}

    def made(self, engine: Engine, cleans: bool) -> None:
        """Take note of the new engine, whose pool `cleans` what comes back; log what the user's own options take away
        from what is promised of its connections."""
        if self._killer is not None:
            self._killer.engine = weakref.ref(engine)
        self.cleans = cleans
        name, options = self.config.name, self.config.options
        if "creator" in options:
            logger.warning(
                "Database %r: its `creator` opens stock connections, so a kill or a timeout may leave them out of step "
                "with the server, and abandoned statements run on there. Remove it, and use `connect_args`.",
                name,
            )

    # Opening.

    def around_connect(self, _: Callable[..., Any]) -> Callable[..., Any]:
        # The last step of connecting, after every `do_connect` listener of the user's, which may change the arguments
        # (a password that rotates, say) or open the connection itself.
        return self._connect

    def _connect(self, *cargs: Any, **cparams: Any) -> Any:
        killer = self._killer
        if killer is not None and (thread := SIDE.get()) is not None:
            return killer.open_side(thread, cparams)
        connection = Connection(*cargs, ping_idle_s=self.config.ping_idle_s, tls=self._tls, **cparams)
        connection.database = self.config.name
        try:
            if killer is not None:
                killer.opened(connection, cparams)
            if self.config.reset == "connection":
                session_state.note_place(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def connected(self, connection: Any, info: dict[Any, Any]) -> None:
        if getattr(connection, "collation", None) is not None:
            connection.set_character_set(connection.charset, connection.collation)  # SQLAlchemy's SET NAMES drops it
        super().connected(connection, info)

    # Statements.

    def around_execution_ctx_cls(self, inner: Any) -> Any:
        """Return the class of the dialect's execution contexts, in which a statement has failed where any of its
        results has: SQLAlchemy reads the later ones as it closes the cursor, and only logs what it meets there."""

        class Context(inner):  # type: ignore[misc]  # of Any: the dialect's
            def post_exec(self) -> None:
                inner.post_exec(self)
                driver = getattr(self.cursor, "connection", None)
                if not isinstance(driver, Connection) or driver._result is None:
                    return
                result = driver._result
                if result.unbuffered_active:
                    StatementNotes.note_user(self.root_connection)  # a listener may have executed it, by its own cursor
                elif result.has_next:
                    StatementNotes.executing(_read_later_results, driver, self.statement, None, self)

        return Context

    # Coming back.

    def cleaning(self, record: ConnectionPoolEntry) -> Callable[[], None] | None:
        """Return what a returned connection needs before somebody else gets it; None: nothing."""
        connection = record.dbapi_connection
        if connection is not None and not isinstance(connection, Connection):
            # A `do_connect` listener's own. (With a `creator`, SQLAlchemy's reset is on.) Its state we do not know.
            return None if "creator" in self.config.options else connection.rollback
        if connection is None or not connection.open:
            return None
        sent = connection.sent
        how: Callable[[Connection], None]
        if self._is_to_be_reset(connection):
            how = self._reset
        elif sent.level_changed:
            how = self._reset_level
        elif connection.settled:
            connection.forget_answer()
            sent.phase = OPENING
            return None
        else:
            how = Connection.rollback
        sent.phase = ASIDE
        return partial(self._clean, connection, how)

    def _is_to_be_reset(self, connection: Connection) -> bool:
        # sent.is_changed(), without its call for each connection that comes back
        sent = connection.sent
        if sent.changed or (self.config.reset == "connection" and connection.used):
            return True
        told = connection.server_status & SERVER_STATUS.SERVER_STATUS_AUTOCOMMIT != 0
        return told is not sent.told_at_first and not sent.level_changed and sent.phase is USED

    @staticmethod
    def on_stock_checkout(connection: Any, *_: object) -> None:
        """Note that a connection of another pool than ours is its user's from now on."""
        if isinstance(connection, Connection):
            connection.sent.taken(connection)

    def on_stock_reset(self, connection: Any, _: ConnectionPoolEntry, state: PoolResetState) -> None:
        """Reset a connection that comes back to another pool than ours."""
        if state.terminate_only or not isinstance(connection, Connection) or not connection.open:
            return
        if self._is_to_be_reset(connection):
            connection.sent.phase = ASIDE
            self._clean(connection, self._reset)
        elif connection.settled:
            connection.forget_answer()

    def around_reset_isolation_level(self, inner: Callable[[Any], None]) -> Callable[[Any], None]:
        self._take_level_back = inner

        def reset_isolation_level(dbapi_conn: Any) -> None:
            # SQLAlchemy takes an isolation level back in the middle of the return, where a kill costs the slot.
            if self.cleans and isinstance(dbapi_conn, Connection):
                dbapi_conn.sent.level_changed = True
            else:
                inner(dbapi_conn)

        return reset_isolation_level

    def _reset_level(self, connection: Any) -> None:
        connection.rollback()
        self._take_level_back(connection)
        connection.sent.level_changed = False
        if connection.told_autocommit is not connection.sent.told_at_first:
            self._reset(connection)

    def _clean(self, connection: Connection, how: Callable[[Connection], None]) -> None:
        before = connection.read_within_at_most(CLEANING_S)
        how(connection)
        connection.read_within(before)
        if not connection.open:  # an unread stream, say
            raise ConnectionAbortedError("the connection was given up while it was cleaned")
        connection.sent.returned()

    def _reset(self, connection: Connection) -> None:
        if connection.unread:  # is not read to its end, unless the rest has come and is little
            connection.rollback()
        if connection.open:
            session_state.reset(connection)
            connection.used = False


def _read_later_results(driver: Connection, *_: object) -> None:
    driver.read_later_results()
