"""psycopg 3's backend under gevent: engines whose connections are ours, and whose statements end with their users."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from dbsession.core.backends.postgresql import PostgreSQL
from dbsession.core.config import DatabaseConfig
from dbsession.core.pool.stats import Stats
from dbsession.green.cleaning import Cleans
from dbsession.green.postgresql.cancel import GreenCanceller
from dbsession.green.postgresql.connection import Connection


class Psycopg(Cleans, PostgreSQL):
    """The rules of one engine by psycopg 3, and its connections. Lives as long as the engine."""

    CONNECTION: ClassVar[type[Any]] = Connection
    LOGGER = "dbsession.postgresql"

    def __init__(self, config: DatabaseConfig, stats: Stats) -> None:
        super().__init__(config)
        self._canceller = GreenCanceller(config.name, stats) if config.kill_abandoned else None

    def around_connect(self, _: Callable[..., Any]) -> Callable[..., Any]:
        # The last step of connecting, after every `do_connect` listener of the user's.
        return self._connect

    def _connect(self, *cargs: Any, **cparams: Any) -> Any:
        config = self.config
        connection = Connection.open_within(
            float(cparams.get("connect_timeout") or config.connect_timeout_s), *cargs, **cparams
        )
        connection.database = config.name
        connection.read_timeout_s, connection.write_timeout_s = config.read_timeout_s, config.write_timeout_s
        if self._canceller is not None:
            self._canceller.opened(connection)
        try:
            if self.pooled is None:
                self.pooled = connection.wait(connection.is_pooled())
            if self.pooled and "prepare_threshold" not in cparams:
                connection.prepare_threshold = None  # a statement prepared in one session is not there in the next
        except BaseException:
            connection.close()
            raise
        return connection

    def connected(self, connection: Any, info: dict[Any, Any]) -> None:
        super().connected(connection, info)
        if isinstance(connection, Connection):
            connection.sent.unseen = False  # until now SQLAlchemy has asked, for types

    def is_to_be_reset(self, connection: Any) -> bool:
        return super().is_to_be_reset(connection) or connection.is_listened_to

    def around_do_ping(self, inner: Callable[[Any], bool]) -> Callable[[Any], bool]:
        def do_ping(dbapi_connection: Any) -> bool:
            if not isinstance(dbapi_connection, Connection):  # a creator's, or a listener's own
                return inner(dbapi_connection)
            dbapi_connection.ping(self.config.ping_idle_s, self.config.connect_timeout_s)
            return True

        return do_ping
