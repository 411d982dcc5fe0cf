"""The databases of one manager in one event loop: each an engine with its sessions, built at its first use there.

An asyncio connection belongs to the loop that opened it, so every loop has engines of its own. They live in the loop's
storage and are closed with what else it holds; see `loop_local`. All of it is written in the loop's own thread, and
nothing here awaits between reading and writing, except `close`.
"""

from __future__ import annotations

import asyncio
import logging
from contextvars import Context
from typing import Any

from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool

from dbsession.aio import loop_local, teardown
from dbsession.aio.connections import LoopConnections
from dbsession.aio.pool import FairPool
from dbsession.aio.session import make_factory
from dbsession.core import fork
from dbsession.core import teardown as core_teardown
from dbsession.core.config import DatabaseConfig
from dbsession.core.engine import Database, all_databases, made
from dbsession.core.sources import Source
from dbsession.errors import ConfigError, describe, to_install

logger = logging.getLogger("dbsession.aio.databases")

# Seconds that closing tasks have at the loop's end, before the connections they use are cut off and after it. Less than
# theirs, and together less than what an exit has there: loop_local.shutdown.EXIT_TIMEOUT_S.
_SETTLE_S = 3.5
_LAST_S = 0.5


class LoopDatabase(Database):
    """A database whose engine serves the tasks of one event loop. Lives as `Database` does, at most as long as its
    loop."""

    engine: AsyncEngine
    factory: async_sessionmaker[Any]

    def __init__(self, owner: Any, source: Source, parts: _Parts) -> None:
        self._parts = parts
        config, engine, self.connections, factory = parts
        super().__init__(config, owner, engine, factory, self.connections.held)
        self.source = source
        self.loop = asyncio.get_running_loop()
        self.bounds = teardown.Bounds()

    def successor(self) -> LoopDatabase:
        """Return the database that, after a dispose(), takes over the engine and the session factory, with their
        listeners."""
        successor = LoopDatabase(self.owner, self.source, self._parts)
        successor.listeners = self.listeners
        return successor

    def retire(self) -> None:
        """Have each connection that comes back from now on closed."""
        self.retired = self.connections.closing = self.listeners.closed = True

    async def dispose(self) -> None:
        """Close the idle connections; those in use finish, and are closed on their return."""
        await self.engine.dispose()
        await self.connections.backend.closed()

    async def close(self) -> None:
        """Close everything, at the loop's end."""
        self.retire()
        try:
            await self.engine.dispose()
        finally:
            await self.connections.cut()
            await self.connections.backend.closed()


_Parts = tuple[DatabaseConfig, AsyncEngine, LoopConnections, async_sessionmaker[Any]]


def _parts(config: DatabaseConfig) -> _Parts:
    """Make what a LoopDatabase consists of. Imports the driver; no connection is made.

    Raises:
        ConfigError: [DBS-CONFIG] a missing driver, one that is not for asyncio, an option that create_async_engine
            refuses.
    """
    dialect: Any = config.url.get_dialect()
    if not dialect.get_async_dialect_cls(config.url).is_async:
        raise ConfigError(
            f"Database {config.name!r}: the driver of {config.url.drivername!r} is not for asyncio. Give "
            "aio.configure() one that is, such as 'mysql+asyncmy://', 'sqlite+aiosqlite:///' or "
            "'postgresql+asyncpg://'."
        )
    connections = LoopConnections(config)
    engine = made(
        connections.backend,
        create_async_engine,
        AsyncAdaptedQueuePool,
        FairPool,
        install=f"Install it: `{to_install('aio')}` brings aiosqlite and asyncmy; others come by their own names.",
        hint="a `poolclass` has to be one for asyncio",
    )
    connections.follow(engine.sync_engine)
    return config, engine, connections, make_factory(config, engine)


def check(config: DatabaseConfig) -> None:
    """Raise ConfigError if no engine or no session can be made of `config`. Imports the driver; no connection is
    made, and no loop has to run."""
    _parts(config)


class LoopDatabases:
    """The databases of one manager in one loop. Lives in the loop's storage, until the loop's resources are closed."""

    def __init__(self, owner: Any) -> None:
        self._owner = owner
        self._source: Source | None = None
        self._built: dict[str, LoopDatabase] = {}
        self._retired: list[LoopDatabase] = []
        self._loop = asyncio.get_running_loop()

    def get(self, name: str, source: Source) -> LoopDatabase:
        """The Database of `name` under the configuration `source`, built on first use. Raises UnknownDatabase,
        ConfigError."""
        if source is not self._source:
            self._succeed(source)
        found = self._built.get(name)
        if found is None or found.inherited:
            found = self._build(name, source)
        return found

    def _build(self, name: str, source: Source) -> LoopDatabase:
        database = LoopDatabase(self._owner, source, _parts(source.lookup(name)))
        self._built[name] = database
        database.listeners.notify()  # who may ask for it
        return database

    def _succeed(self, source: Source) -> None:
        """Retire the databases of the configuration before. Their idle connections are closed by a task of ours."""
        self._source = source
        for database in self._built.values():
            database.retire()
            self._retired.append(database)
            teardown.run_aside(self._dispose(database), core_teardown.BOUND_S)
        self._built = {}

    async def _dispose(self, database: LoopDatabase) -> None:
        """Dispose of one database; log an error instead of raising it."""
        try:
            async with asyncio.timeout(core_teardown.BOUND_S):
                await database.dispose()
        except Exception as error:
            logger.warning("Database %r: its engine failed to close: %s.", database.name, describe(error))

    def succeed_disposed(self) -> None:
        """Put a successor in each database's place, so that the sessions that are open on it are looked at, each at its
        next use. No I/O."""
        for name, database in list(self._built.items()):
            if not database.inherited:
                self._built[name] = database.successor()
                database.succeeded = database.retired = True

    async def dispose(self) -> None:
        """Close the idle connections of every engine, whatever fails; errors come together in an ExceptionGroup."""
        await teardown.settle(self._loop)
        await self._each(LoopDatabase.dispose)

    async def dispose_and_log(self) -> None:
        """Close the idle connections of every engine, which has BOUND_S seconds each; errors are logged."""
        await teardown.settle(self._loop)
        await self._each(self._dispose)

    async def close(self) -> None:
        """Close everything, at the loop's end: first the sessions whose scopes have ended."""
        # Older exits that use a session get databases that are closed after them.
        loop_local.storage().pop(self._owner, None)
        try:
            await teardown.settle(self._loop, _SETTLE_S)
            await self._each(LoopDatabase.close)
            await teardown.settle(self._loop, _LAST_S)  # whose connections were cut off just now
        except asyncio.CancelledError:  # out of time: what did not answer is no reason to leave the others open
            for database in self._ours():
                await database.connections.cut()
            for database in self._ours():
                await database.connections.backend.closed()
            raise
        finally:
            self._built, self._retired = {}, []
            self._owner.forget()  # a proxy's shortcut would keep this loop alive

    def _ours(self) -> list[LoopDatabase]:
        """List all that this process has built, and not its parent."""
        return [each for each in [*self._retired, *self._built.values()] if not each.inherited]

    async def _each(self, close: Any) -> None:
        errors: list[Exception] = []
        for database in self._ours():
            try:
                await close(database)
            except Exception as error:
                errors.append(error)
        if errors:
            raise ExceptionGroup("Engines of dbsession.aio failed to close.", errors)


def of_this_loop(owner: Any) -> LoopDatabases:
    """The databases of `owner` in the running loop. Raises LoopRequired."""
    storage = loop_local.storage()
    found: LoopDatabases | None = storage.get(owner)
    if found is None:
        found = storage[owner] = LoopDatabases(owner)
        # In an empty context: that of the first request would be kept until the loop's end.
        Context().run(loop_local.at_close, found.close)
    return found


async def dispose_here() -> None:
    """Close the idle connections of every manager's engines in the running loop, which stay usable. Never fails: errors
    are logged."""
    for each in list(loop_local.storage().values()):
        if isinstance(each, LoopDatabases):
            await each.dispose_and_log()


_kept: list[LoopDatabase] = []  # in a forked child, the parent's: never closed, nor collected


def _after_fork_in_child() -> None:
    for database in all_databases(succeeded=True):
        if isinstance(database, LoopDatabase):
            database.inherited = database.listeners.closed = True
            database.held.forget()
            _kept.append(database)


fork.in_child(_after_fork_in_child)
