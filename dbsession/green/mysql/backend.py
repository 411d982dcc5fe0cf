"""PyMySQL's backend: engines whose connections are ours, cleaned as they come back, and killed at the server."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, ClassVar

from pymysql.constants import SERVER_STATUS
from sqlalchemy.engine import Engine

from dbsession.core.backends.mysql import MySQL
from dbsession.core.backends.mysql_tls import TLSContexts
from dbsession.core.config import TIMEOUTS, DatabaseConfig
from dbsession.core.connection_info import USED
from dbsession.core.interceptors import StatementNotes
from dbsession.core.pool.stats import Stats
from dbsession.green.cleaning import Cleans
from dbsession.green.mysql import session_state
from dbsession.green.mysql.connection import Connection
from dbsession.green.mysql.kill import SIDE, GreenKiller


class PyMySQL(Cleans, MySQL):
    """The rules of one engine by PyMySQL, and its connections. Lives as long as the engine."""

    CONNECTION: ClassVar[type[Any]] = Connection
    LOGGER = "dbsession.mysql"

    def __init__(self, config: DatabaseConfig, stats: Stats) -> None:
        super().__init__(config)
        self._tls = TLSContexts()
        self._killer = GreenKiller(config.name, stats, self._tls) if config.kill_abandoned else None

    def engine_options(self) -> dict[str, Any]:
        # PyMySQL waits for ever by default: a silent server would hang every request.
        timeouts = {key.removesuffix("_s"): getattr(self.config, key) for key in TIMEOUTS}
        return {"connect_args": self.driver_arguments(**timeouts)}

    def made(self, engine: Engine, cleans: bool) -> None:
        super().made(engine, cleans)
        if self._killer is not None:
            self._killer.engine = weakref.ref(engine)

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

    def is_to_be_reset(self, connection: Any) -> bool:
        # sent.is_changed(), without its call for each connection that comes back
        sent = connection.sent
        if sent.changed or (self.config.reset == "connection" and connection.used):
            return True
        told = connection.server_status & SERVER_STATUS.SERVER_STATUS_AUTOCOMMIT != 0
        return told is not sent.told_at_first and not sent.level_changed and sent.phase is USED

    def reset(self, connection: Any) -> None:
        if connection.unread:  # is not read to its end, unless the rest has come and is little
            connection.rollback()
        if connection.open:
            session_state.reset(connection)
            connection.used = False

    def reset_level(self, connection: Any) -> None:
        super().reset_level(connection)
        if connection.told_autocommit is not connection.sent.told_at_first:
            self.reset(connection)


def _read_later_results(driver: Connection, *_: object) -> None:
    driver.read_later_results()
