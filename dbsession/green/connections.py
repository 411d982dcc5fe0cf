"""What we know of an engine's connections: whose they are, and whether something was written on them."""

from __future__ import annotations

import logging
import weakref
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from pymysql.cursors import SSCursor
from sqlalchemy import event
from sqlalchemy.engine import Engine, ExecutionContext
from sqlalchemy.pool import ConnectionPoolEntry, PoolResetState

from dbsession.core import fork
from dbsession.core.config import DatabaseConfig
from dbsession.core.connection_info import COMMITTING, DOOMED, READ_TIMEOUT, SCOPE
from dbsession.core.outcome import TransactionWatch
from dbsession.core.pool.holders import watched
from dbsession.core.pool.leaks import LeakWatch
from dbsession.core.pool.stats import Stats
from dbsession.green import leak_ticker, sqlite
from dbsession.green.holders import HeldByGreenlets
from dbsession.green.homes import HOME, home_of
from dbsession.green.mysql import connector, session_state
from dbsession.green.mysql.connection import Connection as MySQLConnection
from dbsession.green.pool import FairPool

logger = logging.getLogger("dbsession.connections")

CLEANING_S = 5.0
"""Seconds that the server has for each answer while a returned connection is cleaned; then it is discarded."""


class ConnectionLinks:
    """What we know of an engine's open connections. Lives as long as the engine, through forks. Written only by the
    pool's events, one operation each, and `closing` by whoever retires the engine."""

    def __init__(self, config: DatabaseConfig) -> None:
        self.closing = False
        self.database: object = None
        """Kept alive as long as the engine: after configure() somebody may still hold a connection of it."""
        self.stats = Stats()
        self.held = HeldByGreenlets(config.name, config.backend, self.stats)
        self._leaks = LeakWatch(config, self.held, leak_ticker.watches)  # for its life only
        self._connector = connector.Connector(config, self.stats) if connector.uses_pymysql(config) else None
        self._watch = TransactionWatch(config)
        self._config = config
        self._line: deque[sqlite.Connection] = deque()
        self._records: weakref.WeakKeyDictionary[Any, weakref.ref[Any]] = weakref.WeakKeyDictionary()

    def listen(self, engine: Engine) -> None:
        event.listen(engine, "connect", self._connected)
        event.listen(engine, "checkin", self._returned)
        event.listen(engine, "invalidate", self._invalidated)
        # By events, since a listener of the user's may execute a statement in the dialect's place.
        event.listen(engine, "do_execute", self._executing)
        event.listen(engine, "do_executemany", self._executing)
        event.listen(engine, "do_execute_no_params", self._executing_without_parameters)
        dialect: Any = engine.dialect
        dialect.do_execute = watched(dialect.do_execute)
        dialect.do_executemany = watched(dialect.do_executemany)
        dialect.do_execute_no_params = watched(dialect.do_execute_no_params)
        if isinstance(engine.pool, FairPool):
            engine.pool.held = self.held
        else:
            self.held.listen(engine)
        self._watch.listen(engine)
        if self._connector is not None:
            self._connector.listen(engine)
            self._engine = weakref.ref(engine)
            if isinstance(engine.pool, FairPool):
                engine.pool.cleaning = self._cleaning
                # SQLAlchemy takes an isolation level back in the middle of the return, where a kill costs the place.
                self._take_level_back = engine.dialect.reset_isolation_level
                engine.dialect.reset_isolation_level = self._note_level  # type: ignore[assignment,method-assign]
            elif self._config.reset == "connection":
                event.listen(engine, "reset", self._reset_in_another_pool)

    def _connected(self, connection: Any, record: Any) -> None:
        try:
            self._records[connection] = weakref.ref(record)
        except TypeError:
            pass  # a driver without weak references: after a fork its pool is replaced, and that is all
        self.stats.connects += 1
        leak_ticker.watch()
        fork.prepare()
        record.info[HOME] = home_of(connection)
        if self._config.backend == "sqlite":
            sqlite.set_up(connection, self._config, self._line)
        elif self._config.backend in ("mysql", "mariadb"):
            session_state.set_up(connection, self._config)

    def _returned(self, connection: Any, record: Any) -> None:
        if connection is None:
            return  # invalidated while it was out
        for key in (SCOPE, COMMITTING, DOOMED):
            record.info.pop(key, None)
        if READ_TIMEOUT in record.info:
            connection.read_within(record.info.pop(READ_TIMEOUT))
        if self.closing or (isinstance(connection, MySQLConnection) and not connection.open):
            record.close()

    def _invalidated(self, *_: object) -> None:
        self.stats.invalidated += 1

    def _cleaning(self, record: ConnectionPoolEntry) -> Callable[[], None] | None:
        """What a returned connection needs before somebody else gets it; None: nothing."""
        connection = record.dbapi_connection
        if connection is not None and not isinstance(connection, MySQLConnection):
            # A `do_connect` listener's own. (With a `creator`, SQLAlchemy's reset is on.) Its state we do not know.
            return None if "creator" in self._config.options else connection.rollback
        if connection is None or not connection.open:
            return None
        if self._config.reset == "connection" and connection.used:
            return partial(self._clean, connection, self._reset)
        if connection.level_changed:
            return partial(self._clean, connection, self._reset_level)
        return None if connection.settled else partial(self._clean, connection, MySQLConnection.rollback)

    def _note_level(self, connection: Any) -> None:
        if isinstance(connection, MySQLConnection):
            connection.level_changed = True
        else:
            self._take_level_back(connection)

    def _reset_level(self, connection: Any) -> None:
        connection.rollback()
        self._take_level_back(connection)
        connection.level_changed = False

    def _reset_in_another_pool(self, connection: Any, _: ConnectionPoolEntry, state: PoolResetState) -> None:
        if isinstance(connection, MySQLConnection) and connection.open and connection.used and not state.terminate_only:
            self._clean(connection, self._reset)

    def _clean(self, connection: MySQLConnection, how: Callable[[MySQLConnection], None]) -> None:
        before = connection.read_within_at_most(CLEANING_S)
        how(connection)
        connection.read_within(before)
        if not connection.open:  # an unread stream, say
            raise ConnectionAbortedError("the connection was given up while it was cleaned")

    def _reset(self, connection: MySQLConnection) -> None:
        session_state.reset(connection)
        engine = self._engine() if connection.open else None
        if engine is not None:
            level: Any = self._config.isolation_level
            if level is not None:
                engine.dialect.set_isolation_level(connection, level)
            session_state.set_up(connection, self._config)
        connection.level_changed = connection.used = False

    def _executing_without_parameters(self, cursor: Any, statement: str, context: ExecutionContext) -> bool:
        return self._executing(cursor, statement, None, context)

    def _executing(self, cursor: Any, statement: str, _: Any, context: ExecutionContext) -> bool:
        if self._watch.executing(cursor, statement, context):
            return True
        if isinstance(cursor, SSCursor) and isinstance(cursor.connection, MySQLConnection):
            cursor.connection.stream_of = weakref.ref(context.root_connection)
        return False

    def abandon(self) -> None:
        inherited = [(connection, record()) for connection, record in self._records.items()]
        self._records = weakref.WeakKeyDictionary()
        self._line = deque()
        self.held.forget()
        self.stats.reset()
        fork.abandon(inherited)
