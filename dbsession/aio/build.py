"""The async engine of one database in one event loop."""

from __future__ import annotations

import asyncio
import random
import sqlite3
import weakref
from collections.abc import Callable
from time import monotonic
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import ExecutionContext
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool, Pool
from sqlalchemy.util import await_, greenlet_spawn

from dbsession.aio import leaks
from dbsession.aio.connections import JustEnded
from dbsession.aio.holders import HeldByTasks
from dbsession.aio.mysql import timeouts
from dbsession.aio.mysql.kill import Killer
from dbsession.aio.pool import FairPool
from dbsession.aio.sqlite import Threads
from dbsession.core.backends import sqlite
from dbsession.core.config import DatabaseConfig, refused_option
from dbsession.core.connection_info import COMMITTING, DOOMED, SCOPE
from dbsession.core.outcome import TransactionWatch
from dbsession.core.pool.holders import watched
from dbsession.core.pool.leaks import LeakWatch
from dbsession.core.pool.stats import Stats
from dbsession.core.retry import is_sqlite_busy
from dbsession.errors import ConfigError

_RETRY_S = (0.001, 0.003)  # random, so that two processes do not ask in step


class Links:
    """What we know of an engine's open connections. Lives as long as the engine. Written by the pool's events, one
    operation each."""

    def __init__(self, config: DatabaseConfig) -> None:
        self.stats = Stats()
        self.held = HeldByTasks(config.name, config.backend, self.stats)
        self.closing = False  # whatever comes back is closed; set by whoever retires the engine
        self.threads = Threads()
        self._ended = JustEnded()
        self._config = config
        self._leaks = LeakWatch(config, self.held, leaks.watches)  # for its life only
        self._watch = TransactionWatch(config)
        is_mysql = config.backend in ("mysql", "mariadb")
        self._killer = Killer(config.name, self.stats) if is_mysql and config.kill_abandoned else None
        self._records: weakref.WeakSet[Any] = weakref.WeakSet()

    def listen(self, engine: AsyncEngine) -> None:
        sync = engine.sync_engine
        dialect: Any = sync.dialect  # the engine's own, and that of the engines made from it by execution_options()
        event.listen(sync, "connect", self._connected)
        if self._config.backend == "sqlite":
            # First of all, because SQLAlchemy's own listeners await, and may be cancelled.
            event.listen(sync, "connect", self._opened, insert=True)
            dialect.do_terminate = self.threads.terminate(dialect.do_terminate)
            dialect.do_ping = self.threads.ping(dialect.do_ping)
        dialect.reset_isolation_level = self._level_taken_back(dialect.reset_isolation_level)
        event.listen(sync, "checkin", self._returned)
        event.listen(sync, "invalidate", self._invalidated)
        event.listen(sync, "do_execute", self._executing)
        event.listen(sync, "do_executemany", self._executing)
        event.listen(sync, "do_execute_no_params", self._executing_without_parameters)
        self._watch.listen(sync)
        for name in ("do_execute", "do_executemany", "do_execute_no_params"):
            setattr(dialect, name, watched(getattr(dialect, name)))
        if self._config.backend in ("mysql", "mariadb"):
            timeouts.listen(sync, self._config, self._killer)
        self._ended.listen(dialect)
        if isinstance(sync.pool, FairPool):
            sync.pool.held = self.held
        else:
            self.held.listen(sync)

    def _opened(self, connection: Any, _: Any) -> None:
        self.threads.watch(connection.driver_connection)

    def _connected(self, connection: Any, record: Any) -> None:
        self.stats.connects += 1
        leaks.watch()
        self._records.add(record)
        if self._config.backend == "sqlite":
            self._set_pragmas(connection)
        elif self._config.readonly and self._config.backend in ("mysql", "mariadb"):
            cursor = connection.cursor()
            cursor.execute("SET SESSION TRANSACTION READ ONLY")
            cursor.close()
        if self._killer is not None:
            self._killer.note(connection, record.info)

    def _set_pragmas(self, connection: Any) -> None:
        # SQLite's own wait does not hold for the change of a new file to WAL: of two that do it at once one is refused.
        end = monotonic() + self._config.busy_timeout_s
        while True:
            try:
                sqlite.set_pragmas(connection, self._config.readonly)
                return
            except sqlite3.OperationalError as error:
                if not is_sqlite_busy(error) or monotonic() > end:
                    raise
            await_(asyncio.sleep(random.uniform(*_RETRY_S)))

    def _returned(self, connection: Any, record: Any) -> None:
        if connection is None:
            return  # invalidated while it was out
        for key in (SCOPE, COMMITTING, DOOMED):
            record.info.pop(key, None)
        if self.closing:
            try:
                record.close()
            except BaseException as error:  # a cancellation, or a listener of the user's
                _give_up(record, error)

    def _level_taken_back(self, reset: Callable[[Any], None]) -> Callable[[Any], None]:
        """What SQLAlchemy calls when a connection with an isolation level of its own comes back. It calls it where
        nobody expects an error: that, or a cancellation, would cost a place in the pool."""

        def taken_back(connection: Any) -> None:
            try:
                reset(connection)
            except BaseException as error:
                record = next((each for each in list(self._records) if each.dbapi_connection is connection), None)
                if record is None:
                    raise
                _give_up(record, error)

        return taken_back

    def _invalidated(self, *_: object) -> None:
        self.stats.invalidated += 1

    def _executing_without_parameters(self, cursor: Any, statement: str, context: ExecutionContext) -> bool:
        self._ended.forget()
        return self._watch.executing(cursor, statement, context)

    def _executing(self, cursor: Any, statement: str, _: Any, context: ExecutionContext) -> bool:
        self._ended.forget()
        return self._watch.executing(cursor, statement, context)

    async def cut(self) -> None:
        """Close what is open still, whoever uses it: the loop ends, and nobody runs in it any more."""
        for record in list(self._records):
            if record.dbapi_connection is not None:
                await greenlet_spawn(record.invalidate)
                self.held.returned(record)  # which nobody does any more


def _give_up(record: Any, error: BaseException) -> None:
    """Throw the connection of a pool's `record` away because of `error`, in the middle of its return. Raises the first
    kill of both, once its place is given back: what called us would do that, and is ended by the kill."""
    kill = None if isinstance(error, Exception) else error
    try:
        record.invalidate(error)
    except BaseException as another:
        kill = kill or (None if isinstance(another, Exception) else another)
    if kill is not None:
        record.checkin(_fairy_was_created=False)
        raise kill from None


def build(config: DatabaseConfig) -> tuple[AsyncEngine, Links]:
    """The engine of `config`, for the running loop. Imports the driver; no connection is made.

    Raises:
        ConfigError: [DBS-CONFIG] a missing driver, one that is not for asyncio, an option that create_async_engine
            refuses.
    """
    name, options = config.name, dict(config.options)
    dialect: Any = config.url.get_dialect()
    if not dialect.get_async_dialect_cls(config.url).is_async:
        raise ConfigError(
            f"Database {name!r}: the driver of {config.url.drivername!r} is not for asyncio. Give aio.configure() one "
            "that is, such as 'mysql+asyncmy://', 'sqlite+aiosqlite:///' or 'postgresql+asyncpg://'."
        )
    defaults = _defaults(config, options)
    connect_args = {**defaults.pop("connect_args", {}), **options.pop("connect_args", {})}
    try:
        engine = create_async_engine(config.url, **{**defaults, **options, "connect_args": connect_args})
    except ImportError as error:
        raise ConfigError(
            f"Database {name!r}: the driver of {config.url.drivername!r} is not installed (no module {error.name!r}). "
            "Install it: `pip install 'dbsession[aio]'` brings aiosqlite and asyncmy; others come by their own names."
        ) from None
    except Exception as error:  # each option has its own way to refuse a value
        hint = "a `poolclass` has to be one for asyncio"
        raise refused_option(name, error, "create_async_engine", hint) from None
    links = Links(config)
    links.listen(engine)
    return engine, links


def _defaults(config: DatabaseConfig, options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of create_async_engine below the user's own, as far as the pool class in use takes them."""
    if not isinstance(options.get("connect_args", {}), dict):
        raise ConfigError(f"Database {config.name!r}: `connect_args` in `options` must be a mapping.")
    defaults: dict[str, Any] = {}
    if config.readonly:
        # No transaction is ever open: nothing to roll back.
        defaults |= {"isolation_level": "AUTOCOMMIT", "skip_autocommit_rollback": True}
    if config.backend == "sqlite":
        sqlite.refuse_memory(config.name, config.url, options)
        # The driver's own thread waits for the write lock, and not the loop.
        defaults["connect_args"] = {"timeout": config.busy_timeout_s}
    elif config.backend in ("mysql", "mariadb"):
        defaults["connect_args"] = timeouts.connect_args(config)
    poolclass = options.get("poolclass")
    if poolclass is None:
        dialect: Any = config.url.get_dialect()
        poolclass = dialect.get_pool_class(config.url)
        if poolclass is AsyncAdaptedQueuePool:
            poolclass = defaults["poolclass"] = FairPool
    if not (isinstance(poolclass, type) and issubclass(poolclass, Pool)):
        raise ConfigError(f"Database {config.name!r}: `poolclass` in `options` must be a sqlalchemy.pool.Pool class.")
    defaults |= {"pool_recycle": 3600, "pool_pre_ping": True}
    if issubclass(poolclass, AsyncAdaptedQueuePool):
        defaults |= {"pool_size": 20, "max_overflow": 0}
    return defaults
