"""PyMySQL's backend: engines whose connections are ours, cleaned as they come back, and killed at the server."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

from sqlalchemy.engine import Engine
from sqlalchemy.pool import ConnectionPoolEntry, PoolResetState

from dbsession.core.backends.mysql import MySQL
from dbsession.core.backends.mysql_tls import TLSContexts
from dbsession.core.config import TIMEOUTS, DatabaseConfig
from dbsession.core.interceptors import StatementNotes
from dbsession.core.pool.stats import Stats
from dbsession.green.mysql import session_state
from dbsession.green.mysql.connection import Connection
from dbsession.green.mysql.kill import GreenKiller

logger = logging.getLogger("dbsession.mysql")

CLEANING_S = 5.0
"""Seconds that the server has for each answer while a returned connection is cleaned; then it is discarded."""


class PyMySQL(MySQL):
    """The rules of one engine by PyMySQL, and its connections. Lives as long as the engine."""

    def __init__(self, config: DatabaseConfig, stats: Stats) -> None:
        super().__init__(config)
        self._tls = TLSContexts()
        self._killer = GreenKiller(config.name, stats, self._tls) if config.kill_abandoned else None
        self._engine: Callable[[], Engine | None] = lambda: None
        self._take_level_back: Callable[[Any], None]
        self.cleans = False
        """The pool is ours, and cleans what comes back."""
        if config.reset != "connection":
            self.on_reset = None  # type: ignore[assignment,method-assign]

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
        self._engine = weakref.ref(engine)
        self.cleans = cleans
        name, options = self.config.name, self.config.options
        if "creator" in options:
            logger.warning(
                "Database %r: its `creator` opens stock connections, so a kill or a timeout may leave them out of step "
                "with the server, and abandoned statements run on there. Remove it, and use `connect_args`.",
                name,
            )
        if self.config.reset == "connection":
            for listener in engine.pool.dispatch.connect:
                module = getattr(listener, "__module__", "") or ""
                if not module.startswith(("sqlalchemy.", "dbsession.")):
                    logger.warning(
                        "Database %r: what the `connect` listener %s sets up is undone by reset='connection' and not "
                        "done again. Use `init_command` in `connect_args`.",
                        name,
                        f"{module}.{getattr(listener, '__qualname__', '?')}",
                    )

    # Opening.

    def around_connect(self, _: Callable[..., Any]) -> Callable[..., Any]:
        # The last step of connecting, after every `do_connect` listener of the user's, which may change the arguments
        # (a password that rotates, say) or open the connection itself.
        return self._connect

    def _connect(self, *cargs: Any, **cparams: Any) -> Any:
        killer = self._killer
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

        class Context(inner):  # type: ignore[misc]
            def post_exec(self) -> None:
                super().post_exec()
                driver = getattr(self.cursor, "connection", None)
                if not isinstance(driver, Connection) or driver._result is None:
                    return
                result = driver._result
                if result.unbuffered_active:
                    StatementNotes.note_user(self.root_connection)  # a listener may have executed it, by its own cursor
                elif result.has_next:
                    driver.read_later_results()

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
        if self.config.reset == "connection" and connection.used:
            return partial(self._clean, connection, self._reset)
        if connection.level_changed:
            return partial(self._clean, connection, self._reset_level)
        return None if connection.settled else partial(self._clean, connection, Connection.rollback)

    def on_reset(self, connection: Any, _: ConnectionPoolEntry, state: PoolResetState) -> None:
        """Reset a connection that comes back to another pool than ours."""
        if self.cleans or self.config.reset != "connection" or state.terminate_only:
            return
        if isinstance(connection, Connection) and connection.open and connection.used:
            self._clean(connection, self._reset)

    def around_reset_isolation_level(self, inner: Callable[[Any], None]) -> Callable[[Any], None]:
        self._take_level_back = inner

        def reset_isolation_level(dbapi_conn: Any) -> None:
            # SQLAlchemy takes an isolation level back in the middle of the return, where a kill costs the slot.
            if self.cleans and isinstance(dbapi_conn, Connection):
                dbapi_conn.level_changed = True
            else:
                inner(dbapi_conn)

        return reset_isolation_level

    def _reset_level(self, connection: Any) -> None:
        connection.rollback()
        self._take_level_back(connection)
        connection.level_changed = False

    def _clean(self, connection: Connection, how: Callable[[Connection], None]) -> None:
        before = connection.read_within_at_most(CLEANING_S)
        how(connection)
        connection.read_within(before)
        if not connection.open:  # an unread stream, say
            raise ConnectionAbortedError("the connection was given up while it was cleaned")

    def _reset(self, connection: Connection) -> None:
        session_state.reset(connection)
        engine = self._engine() if connection.open else None
        if engine is not None:
            level: Any = self.config.isolation_level
            if level is not None:
                engine.dialect.set_isolation_level(connection, level)
            self.connected(connection, {})
        connection.level_changed = connection.used = False
