"""psycopg2's backend under gevent: engines whose connections are ours, and whose statements end with their users."""

from __future__ import annotations

import _socket
import os
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

from sqlalchemy.engine import Engine

from dbsession.core.backends.postgresql import PostgreSQL
from dbsession.core.config import DatabaseConfig
from dbsession.core.pool.stats import Stats
from dbsession.green.cleaning import Cleans
from dbsession.green.postgresql.psycopg2 import Connection
from dbsession.green.postgresql.psycopg2_waits import open_within
from dbsession.green.postgresql.terminate import SIDE, GreenTerminator


class Psycopg2(Cleans, PostgreSQL):
    """The rules of one engine by psycopg2, and its connections. Lives as long as the engine."""

    CONNECTION: ClassVar[type[Any]] = Connection
    LOGGER = "dbsession.postgresql"

    def __init__(self, config: DatabaseConfig, stats: Stats) -> None:
        super().__init__(config)
        self._terminator = GreenTerminator(config.name, stats) if config.kill_abandoned else None

    def made(self, engine: Engine, cleans: bool) -> None:
        super().made(engine, cleans)
        if self._terminator is not None:
            self._terminator.engine = weakref.ref(engine)

    def around_connect(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        # The last step of connecting, after every `do_connect` listener of the user's.
        def connect(*cargs: Any, **cparams: Any) -> Any:
            if "connection_factory" in cparams:
                return inner(*cargs, **cparams)  # the user's own class, of which we know nothing
            return self._connect(*cargs, **cparams)

        return connect

    def _connect(self, dsn: str | None = None, cursor_factory: Any = None, **arguments: Any) -> Any:
        config, terminator = self.config, self._terminator
        if dsn is not None:
            arguments["dsn"] = dsn
        if terminator is not None and (backend := SIDE.get()) is not None:
            return terminator.open_side(backend, arguments)
        seconds = float(arguments.get("connect_timeout") or config.connect_timeout_s)
        connection: Connection = open_within(Connection, seconds, dict(arguments))
        connection.database = config.name
        connection.read_timeout_s, connection.write_timeout_s = config.read_timeout_s, config.write_timeout_s
        connection.address = _address_of(connection)
        if cursor_factory is not None:
            connection.cursor_factory = connection.factory_at_first = cursor_factory
        if terminator is not None:
            terminator.opened(connection, arguments)
        return connection

    def around_do_ping(self, inner: Callable[[Any], bool]) -> Callable[[Any], bool]:
        def do_ping(dbapi_connection: Any) -> bool:
            if not isinstance(dbapi_connection, Connection):
                return inner(dbapi_connection)
            dbapi_connection.ping(self.config.ping_idle_s, self.config.connect_timeout_s)
            return True

        return do_ping


def _address_of(connection: Connection) -> tuple[str | None, int]:
    mine = _socket.socket(fileno=os.dup(connection.fileno()))
    try:
        if mine.family == _socket.AF_UNIX:
            return None, -1
        return str(mine.getpeername()[0]), int(mine.getsockname()[1])
    finally:
        mine.close()
