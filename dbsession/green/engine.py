"""Engines: one per name, built exactly once per process, abandoned after a fork."""

from __future__ import annotations

import inspect
from typing import Any

from sqlalchemy import create_engine
from sqlalchemy.engine import Engine
from sqlalchemy.exc import NoSuchModuleError
from sqlalchemy.orm import sessionmaker
from sqlalchemy.pool import Pool, QueuePool

from dbsession.core.backends import sqlite as sqlite_files
from dbsession.core.config import DatabaseConfig, refused_option, shown
from dbsession.core.engine import Database, all_databases
from dbsession.core.sources import Source
from dbsession.errors import ConfigError
from dbsession.green import ident, sqlite
from dbsession.green.connections import ConnectionLinks
from dbsession.green.hub import Waiter
from dbsession.green.mysql import connector
from dbsession.green.pool import FairPool
from dbsession.green.session import make_factory


class ProcessDatabase(Database):
    """A database whose engine serves every greenlet and thread of the process. Lives as `Database` does; in a forked
    child it is succeeded by another one round the same Engine, whose listeners the user may have set."""

    engine: Engine
    factory: sessionmaker[Any]

    def __init__(
        self, config: DatabaseConfig, owner: Any, engine: Engine, factory: sessionmaker[Any], links: ConnectionLinks
    ) -> None:
        super().__init__(config, owner, engine, factory, links.held)
        self._links = links
        links.database = self

    def dispose(self) -> None:
        """Close the idle connections; those in use finish, and are closed on their return (by our own pool; another
        `poolclass` does as it does). Does I/O, but waits for nobody who holds a connection."""
        self.engine.dispose()

    def retire(self) -> None:
        """As `dispose()`, for good: whatever is still opened by somebody who kept the Engine is closed on return."""
        self.retired = self.listeners.closed = True
        self._links.closing = True
        self.dispose()

    def successor(self) -> ProcessDatabase:
        """In a forked child: the database that takes over the engine and the session factory, with their listeners."""
        successor = ProcessDatabase(self.config, self.owner, self.engine, self.factory, self._links)
        successor.listeners = self.listeners
        return successor

    def abandon(self) -> None:
        """In a forked child: give up the parent's connections, and give the engine a new pool. No I/O."""
        self._links.abandon()
        self.engine.dispose(close=False)


def process_databases() -> list[ProcessDatabase]:
    """List the databases of this half, in no order."""
    return [each for each in all_databases() if isinstance(each, ProcessDatabase)]


def close_idle_sqlite_files() -> None:
    """Before a fork: SQLite keeps its locks per process and file, and a child that inherits an open file would believe
    that it holds what its parent holds (https://www.sqlite.org/howtocorrupt.html). An in-memory database is left."""
    for database in process_databases():
        url = database.config.url
        if database.config.backend == "sqlite" and not sqlite_files.is_memory(url):
            database.dispose()


def build(config: DatabaseConfig, owner: Any) -> ProcessDatabase:
    """The engine of `config`. Imports the driver; no connection is made.

    Raises:
        ConfigError: [DBS-CONFIG] a missing driver, an option that create_engine refuses.
    """
    name, url, options = config.name, config.url, dict(config.options)
    try:
        url.get_dialect()
    except NoSuchModuleError:
        raise ConfigError(
            f"Database {name!r}: SQLAlchemy has no dialect {shown(url.drivername)}: check the spelling "
            "('mysql+pymysql://', 'sqlite:///', 'postgresql+psycopg://'), or install the package that has it."
        ) from None
    defaults = _defaults(config, options)
    connect_args = {**defaults.pop("connect_args", {}), **options.pop("connect_args", {})}
    arguments = {**defaults, **options, "connect_args": connect_args}
    try:
        engine = create_engine(url, **arguments)
    except ImportError as error:
        raise ConfigError(
            f"Database {name!r}: the driver of {url.drivername!r} is not installed (no module {error.name!r}). Install "
            "it, or name another one in the URL, such as 'mysql+pymysql://'."
        ) from None
    except Exception as error:  # each option has its own way to refuse a value
        raise refused_option(name, error, "create_engine", "what a pool takes depends on `poolclass`") from None
    if connector.uses_pymysql(config):
        connector.warn_of_what_is_bypassed(config, engine)
    links = ConnectionLinks(config)
    links.listen(engine)
    database = ProcessDatabase(config, owner, engine, make_factory(config, engine), links)
    database.listeners.notify()
    return database


def _defaults(config: DatabaseConfig, options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of create_engine below the user's own, as far as the pool class in use takes them."""
    if not isinstance(options.get("connect_args", {}), dict):
        raise ConfigError(f"Database {config.name!r}: `connect_args` in `options` must be a mapping.")
    defaults: dict[str, Any] = {}
    if config.readonly:
        # No transaction is ever open: nothing to roll back.
        defaults |= {"isolation_level": "AUTOCOMMIT", "skip_autocommit_rollback": True}
    if config.backend == "sqlite":
        defaults |= sqlite.engine_options(config.name, config.url, options)
    elif config.backend in ("mysql", "mariadb"):
        defaults |= connector.engine_options(config)
    if "pool" in options:
        return defaults  # a ready-made pool has its sizes already
    poolclass = options.get("poolclass")
    if poolclass is None:
        dialect: Any = config.url.get_dialect()
        poolclass = dialect.get_pool_class(config.url)
        if poolclass is QueuePool:
            poolclass = defaults["poolclass"] = FairPool
            if connector.uses_pymysql(config) and "creator" not in options:
                # Our pool cleans what comes back, and what the server calls clean costs no round trip.
                defaults["pool_reset_on_return"] = None
    if not (inspect.isclass(poolclass) and issubclass(poolclass, Pool)):
        raise ConfigError(f"Database {config.name!r}: `poolclass` in `options` must be a sqlalchemy.pool.Pool class.")
    return defaults | _pool_defaults(poolclass)


def _pool_defaults(poolclass: type[Any]) -> dict[str, Any]:
    """The sizes that an engine gets by default, as far as `poolclass` takes them."""
    defaults: dict[str, Any] = {"pool_recycle": 3600, "pool_pre_ping": True}
    if issubclass(poolclass, QueuePool):
        defaults |= {"pool_size": 20, "max_overflow": 0}
    return defaults


class _Flight:
    """One build under way. Lives until it ends; the others who want the same name wait for it.

    No lock guards it, since a lock made before a monkey patch would not be the one used after it: `setdefault` on the
    table of flights decides who builds, and a waiter puts itself on the list before it looks whether it still has to.
    """

    def __init__(self) -> None:
        self.builder = ident.current()
        self.ended = False
        self._waiters: list[Waiter] = []

    def wait(self) -> None:
        waiter = Waiter()
        self._waiters.append(waiter)
        try:
            if not self.ended:
                waiter.wait()
        finally:
            self._waiters.remove(waiter)

    def end(self) -> None:
        self.ended = True
        for waiter in list(self._waiters):
            waiter.wake()


class EngineCache:
    """name -> Database, from one configuration. Lives until the next one.

    `_built` is written by whoever won the flight of a name, `_flights` by `setdefault` and `pop`: one step each.
    """

    def __init__(self, source: Source, owner: Any) -> None:
        self.source = source
        self._owner = owner
        self._built: dict[str, ProcessDatabase] = {}
        self._flights: dict[str, _Flight] = {}
        self._retired = False

    def build_all(self) -> None:
        """Build every engine that is known, so that what is wrong with one is said at once. No connection is made."""
        for name in self.source.known():
            self._build(name)

    def known(self) -> list[str]:
        """The names that are known to exist, sorted: of a callable, those that it was asked for."""
        return sorted(self.source.known())

    def get(self, name: str) -> ProcessDatabase:
        """The Database of `name`, built on first use: once, however many ask at once. May switch greenlets then.

        A build that fails or is killed leaves nothing behind; the next caller builds.

        Raises:
            UnknownDatabase, ConfigError: as the configuration says.
        """
        while True:
            found = self._built.get(name)
            if found is not None:
                return found
            mine = _Flight()
            flight = self._flights.setdefault(name, mine)
            if flight is mine:
                try:
                    # Somebody may have built it between our look and our setdefault.
                    return self._built.get(name) or self._build(name)
                finally:
                    self._flights.pop(name, None)
                    flight.end()
            if flight.builder is mine.builder:
                raise ConfigError(f"Database {name!r}: the callable that is asked for its entry asks for its session.")
            flight.wait()

    def _build(self, name: str) -> ProcessDatabase:
        database = build(self.source.lookup(name), self._owner)
        self._built[name] = database
        if self._retired:  # while it was being built, so whoever retired the others did not see it
            database.retire()
        return database

    def databases(self) -> list[ProcessDatabase]:
        """Those built so far."""
        return list(self._built.values())

    def retire(self) -> None:
        """Mark everything as replaced by another configuration. No I/O: `dispose()` each database afterwards."""
        self._retired = True
        for database in self.databases():
            database.retired = True

    def succeed(self) -> None:
        """In a forked child: put a successor in each Database's place; builds under way are forgotten with their
        builders."""
        self._flights = {}
        self._built = {name: database.successor() for name, database in self._built.items()}
