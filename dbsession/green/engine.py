"""Engines: one per name, built exactly once per process, abandoned after a fork."""

from __future__ import annotations

from typing import Any

from sqlalchemy import create_engine
from sqlalchemy.engine import Engine
from sqlalchemy.orm import sessionmaker
from sqlalchemy.pool import QueuePool

from dbsession.core import fork
from dbsession.core.config import DatabaseConfig
from dbsession.core.engine import Database, all_databases, driver_of, made
from dbsession.core.entries import refuse_useless_keys
from dbsession.core.sources import Source
from dbsession.errors import ConfigError, to_install
from dbsession.green import ident
from dbsession.green.connections import GreenConnections
from dbsession.green.hub import Waiter
from dbsession.green.pool import FairPool
from dbsession.green.session import make_factory


class ProcessDatabase(Database):
    """A database whose engine serves every greenlet and thread of the process. Lives as `Database` does; in a forked
    child it is succeeded by another one round the same Engine, whose listeners the user may have set."""

    engine: Engine
    factory: sessionmaker[Any]

    def __init__(
        self,
        config: DatabaseConfig,
        owner: Any,
        engine: Engine,
        factory: sessionmaker[Any],
        connections: GreenConnections,
    ) -> None:
        super().__init__(config, owner, engine, factory, connections.held)
        self._connections = connections
        connections.database = self

    def dispose(self) -> None:
        """Close the idle connections; those in use finish, and are closed on their return (by our own pool; another
        `poolclass` does as it does). Does I/O, but waits for nobody who holds a connection."""
        self.engine.dispose()

    def retire(self) -> None:
        """Dispose of the engine for good: what somebody who kept it still opens is closed on return."""
        self.retired = self.listeners.closed = True
        self._connections.closing = True
        self.dispose()

    def successor(self) -> ProcessDatabase:
        """Return the database that, in a forked child and after a dispose(), takes over the engine and the session
        factory, with their listeners."""
        successor = ProcessDatabase(self.config, self.owner, self.engine, self.factory, self._connections)
        successor.listeners = self.listeners
        return successor

    def abandon(self) -> None:
        """Give up, in a forked child, the parent's connections, and give the engine a new pool. No I/O."""
        self._connections.abandon()
        self.engine.dispose(close=False)

    def close_before_fork(self) -> None:
        """Close the idle connections, where a child may not inherit them. Of those in use it has to take over the locks
        before they can be closed here."""
        if self._connections.backend.close_before_fork():
            self.dispose()
            if self.held.notes():
                fork.wait_for_child()


def process_databases(succeeded: bool = False) -> list[ProcessDatabase]:
    """List the databases of this half, in no order; with those `succeeded`, if that is said."""
    return [each for each in all_databases(succeeded) if isinstance(each, ProcessDatabase)]


def close_before_fork() -> None:
    """Close the idle connections that a forked child may not inherit; see `Backend.close_before_fork`."""
    fork.look()  # or they are the parent's
    for database in process_databases():
        database.close_before_fork()


def build(config: DatabaseConfig, owner: Any) -> ProcessDatabase:
    """Build the engine of `config`. Imports the driver; no connection is made.

    Raises:
        ConfigError: [DBS-CONFIG] a missing driver, a key that would do nothing by it, an option that create_engine
            refuses; or eventlet has patched this process.
    """
    ident.refuse_eventlet()
    driver = driver_of(config, "'mysql+pymysql://', 'sqlite:///', 'postgresql+psycopg://'")
    refuse_useless_keys(config, driver)
    connections = GreenConnections(config)
    engine = made(
        connections.backend,
        create_engine,
        QueuePool,
        FairPool,
        install=f"Install it (`{to_install('postgresql')}` brings psycopg), or name another one in the URL, such as "
        "'mysql+pymysql://'.",
        hint="what a pool takes depends on `poolclass`",
    )
    connections.follow(engine)
    database = ProcessDatabase(config, owner, engine, make_factory(config, engine), connections)
    database.listeners.notify()
    return database


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
        fork.look()  # or we might wait for a builder that there is in the parent only
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
        """The databases built so far."""
        return list(self._built.values())

    def retire(self) -> None:
        """Mark everything as replaced by another configuration. No I/O: `dispose()` each database afterwards."""
        self._retired = True
        for database in self.databases():
            database.retired = True

    def succeed_disposed(self) -> None:
        """Put a successor in each Database's place, so that the sessions that are open on it are looked at, each at its
        next use. No I/O."""
        for name, database in list(self._built.items()):
            self._built[name] = database.successor()
            database.succeeded = True
            database.retired = True  # last: whoever sees it finds the successor

    def succeed(self) -> None:
        """Put, in a forked child, a successor in each Database's place; builds under way are forgotten with their
        builders."""
        self._flights = {}
        self._built = {name: database.successor() for name, database in self._built.items()}
