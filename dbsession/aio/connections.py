"""What is known of an engine's open connections in asyncio, and the ROLLBACK that is not needed.

SQLAlchemy ends a session's transaction by a COMMIT or ROLLBACK, and then rolls the connection back once more as it
returns to the pool, because somebody may have used it without a transaction of SQLAlchemy's. That is a round trip for
nothing (for aiosqlite: one to its thread) where nothing can have been sent in between: whoever sends something waits
for the answer, and the loop takes a step. So if the step is the same, nothing was sent, by no task, and by no way round
SQLAlchemy either. A statement forgets it all the same, lest a driver answers without waiting. A connection of asyncmy
or aiomysql knows what was sent on it, whatever the step: `mysql.backend` asks that.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable
from contextvars import Context
from typing import Any

from sqlalchemy.engine import Engine
from sqlalchemy.util import greenlet_spawn

from dbsession.aio.holders import HeldByTasks, leak_watches, watch_leaks
from dbsession.aio.mysql.backend import AsyncMySQL
from dbsession.aio.pool import FairPool
from dbsession.aio.sqlite import AioSQLite
from dbsession.core.backends import driver_of, kind_of
from dbsession.core.backends.base import Backend
from dbsession.core.backends.mysql import MySQL
from dbsession.core.backends.postgresql import PostgreSQL
from dbsession.core.backends.sqlite import SQLite
from dbsession.core.config import DatabaseConfig
from dbsession.core.interceptors import EngineConnections, install
from dbsession.core.pool.leaks import LeakWatch
from dbsession.core.pool.stats import Stats
from dbsession.core.teardown import kill_of


class EndsOfSteps:
    """A layer of `core.interceptors` that leaves out the ROLLBACK which is not needed, for drivers whose connections do
    not know what was sent on them. Lives as long as its engine.

    Who writes: `_ended` is written at the ends of transactions, in the loop's thread only.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self._ended: Any = None
        """The connection of which a transaction has ended in this very step of the event loop."""
        self._context = Context()  # empty: the callback would keep that of the request

    def on_do_execute(self, *_: Any) -> None:
        """Note that something is sent."""
        self._ended = None

    on_do_executemany = on_do_execute_no_params = on_do_execute

    def around_do_commit(self, inner: Callable[[Any], None]) -> Callable[[Any], None]:
        def do_commit(dbapi_connection: Any) -> None:
            self._ended = None
            inner(dbapi_connection)
            self._note_end(dbapi_connection)

        return do_commit

    def around_do_rollback(self, inner: Callable[[Any], None]) -> Callable[[Any], None]:
        def do_rollback(dbapi_connection: Any) -> None:
            connection = dbapi_connection.dbapi_connection
            if connection is None or connection is not self._ended:
                self._ended = None
                inner(dbapi_connection)
                self._note_end(dbapi_connection)

        return do_rollback

    def _note_end(self, proxied: Any) -> None:
        if self.backend.still_open(proxied):
            return
        self._ended = proxied.dbapi_connection
        asyncio.get_running_loop().call_soon(self._next_step, context=self._context)

    def _next_step(self) -> None:
        self._ended = None


class LoopConnections(EngineConnections):
    """The open connections of one engine, and its backend. Lives as long as the engine.

    Who writes: `_records` grows with each connection, in the loop's thread only.
    """

    def __init__(self, config: DatabaseConfig) -> None:
        held = HeldByTasks(config.name, config.backend)
        super().__init__(_backend_of(config, held.stats), held)
        # Takes back what the user of a connection has set; False: it has to be closed instead.
        self._clean: Callable[[Any], bool] | None = getattr(self.backend, "clean", None)
        self._leaks = LeakWatch(config, held, leak_watches)  # for its life only
        self._records: weakref.WeakSet[Any] = weakref.WeakSet()

    def follow(self, engine: Engine) -> None:
        """Follow a new engine, and its pool."""
        self.install(engine, FairPool)
        if self._clean is None:
            install(engine, (EndsOfSteps(self.backend),))

    def on_connect(self, connection: Any, record: Any) -> None:
        """Note a connection that was opened."""
        watch_leaks()
        self._records.add(record)
        super().on_connect(connection, record)

    def on_checkin(self, connection: Any, record: Any) -> None:
        """Take back what its user has set on a connection that comes back."""
        super().on_checkin(connection, record)
        if self._clean is not None and record.dbapi_connection is not None:
            try:
                clean = self._clean(connection)
            except BaseException as error:
                _give_up(record, error)
            else:
                if not clean:
                    self.close(record)

    def close(self, record: Any) -> None:
        """Close the connection of a pool record that comes back."""
        try:
            record.close()
        except BaseException as error:  # a cancellation, or a listener of the user's
            _give_up(record, error)

    def around_reset_isolation_level(self, inner: Callable[[Any], None]) -> Callable[[Any], None]:
        def reset_isolation_level(dbapi_conn: Any) -> None:
            # SQLAlchemy calls it as a connection comes back, where nobody expects an error: that, or a cancellation,
            # would cost a slot of the pool.
            try:
                inner(dbapi_conn)
            except BaseException as error:
                record = next((each for each in list(self._records) if each.dbapi_connection is dbapi_conn), None)
                if record is None:
                    raise
                _give_up(record, error)

        return reset_isolation_level

    async def cut(self) -> None:
        """Close what is open still, whoever uses it: the loop ends, and nobody runs in it any more."""
        for record in list(self._records):
            if record.dbapi_connection is not None:
                await greenlet_spawn(record.invalidate)
                self.held.returned(record)  # which nobody does any more


def _give_up(record: Any, error: BaseException) -> None:
    """Throw the connection of a pool's `record` away because of `error`, in the middle of its return. Raises the first
    kill of both, once its place is given back: what called us would do that, and is ended by the kill."""
    kill = kill_of(error)
    try:
        record.invalidate(error)
    except BaseException as another:
        kill = kill or kill_of(another)
    if kill is not None:
        record.checkin(_fairy_was_created=False)
        raise kill from None


def _backend_of(config: DatabaseConfig, stats: Stats) -> Backend:
    kind = kind_of(config.url)
    if kind is MySQL:
        return AsyncMySQL(config, stats)
    if kind is SQLite:
        return AioSQLite(config)
    driver = driver_of(config.url) if kind is PostgreSQL else None
    try:
        if driver == "psycopg":
            from dbsession.aio.postgresql.psycopg import AsyncPsycopg

            return AsyncPsycopg(config, stats)
        if driver == "asyncpg":
            from dbsession.aio.postgresql.asyncpg import AsyncAsyncpg

            return AsyncAsyncpg(config, stats)
    except ImportError:  # an extra that is missing: create_async_engine says so
        pass
    return kind(config)
