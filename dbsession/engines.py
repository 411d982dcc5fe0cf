"""Engines: one per name, built exactly once per process, abandoned after a fork."""

from __future__ import annotations

import inspect
import re
import weakref
from collections import deque
from functools import lru_cache
from typing import Any

from sqlalchemy import create_engine, event
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import ArgumentError, NoSuchModuleError
from sqlalchemy.orm import sessionmaker
from sqlalchemy.pool import Pool, QueuePool

from dbsession import fork, ident, mysql, sqlite
from dbsession.config import DatabaseConfig, Source
from dbsession.errors import ConfigError
from dbsession.hub import Waiter
from dbsession.pool import ScopePool, pool_defaults
from dbsession.sessions import DatabaseOwner, make_factory

# Keys in a connection's `info`, which SQLAlchemy empties when it reconnects.
GENERATION = "dbsession.generation"
WROTE = "dbsession.wrote"


class Database:
    """A named engine with its session factory, and the key under which a scope keeps that engine's session.

    Lives as long as its configuration. In a forked child it is `inherited` and succeeded by another one round the
    same Engine (whose listeners the user may have set); after configure() or dispose() of its manager it is `retired`.
    """

    def __init__(self, config: DatabaseConfig, owner: DatabaseOwner, engine: Engine, links: ConnectionLinks) -> None:
        self.config = config
        self.name = config.name
        self.owner = owner
        self.engine = engine
        self.factory: sessionmaker[Any] = make_factory(config, engine)
        self.inherited = False
        self.retired = False
        self._links = links

    def dispose(self) -> None:
        """Close the idle connections; those in use finish, and are closed on their return. Does I/O, but waits for
        nobody who holds a connection."""
        self._links.generation += 1
        self.engine.dispose()

    def retire(self) -> None:
        """As `dispose()`, for good: whatever is still opened by somebody who kept the Engine is closed on return."""
        self.retired = True
        self._links.closing = True
        self.dispose()

    def succeed(self) -> Database:
        """In a forked child: abandon what was inherited, and return the Database that takes over. No I/O."""
        self.inherited = True
        self._links.abandon()
        self.engine.dispose(close=False)
        return Database(self.config, self.owner, self.engine, self._links)


class ConnectionLinks:
    """What we know of an engine's open connections. Lives as long as the engine, through forks.

    `generation` is raised by a dispose(), and a connection of an older one is closed on its return. Written only by
    the pool's events (one operation each) and by the disposing caller.
    """

    def __init__(self, config: DatabaseConfig) -> None:
        self.generation = 0
        self.closing = False
        self._config = config
        self._line: deque[sqlite.Connection] = deque()
        self._records: weakref.WeakKeyDictionary[Any, weakref.ref[Any]] = weakref.WeakKeyDictionary()

    def listen(self, engine: Engine) -> None:
        event.listen(engine, "connect", self._connected)
        event.listen(engine, "checkin", self._returned)
        event.listen(engine, "before_cursor_execute", _note_write)

    def _connected(self, connection: Any, record: Any) -> None:
        try:
            self._records[connection] = weakref.ref(record)
        except TypeError:
            pass  # a driver without weak references: after a fork its pool is replaced, and that is all
        record.info[GENERATION] = self.generation
        if self._config.backend == "sqlite":
            sqlite.set_up(connection, self._config.busy_timeout_s, self._line)

    def _returned(self, connection: Any, record: Any) -> None:
        if connection is None:
            return  # invalidated while it was out
        record.info.pop(WROTE, None)
        if self.closing or record.info.get(GENERATION) != self.generation:
            record.close()

    def abandon(self) -> None:
        inherited = [(connection, record()) for connection, record in self._records.items()]
        self._records = weakref.WeakKeyDictionary()
        self._line = deque()
        fork.abandon(inherited)


def _note_write(connection: Connection, _cursor: Any, statement: str, *_: object) -> None:
    """Remember that something was written, so that `release_dbsession()` does not throw it away."""
    verb = _reading_verb(statement[:200])
    if not verb or (verb == "with" and _WRITES.search(statement)):
        connection.info[WROTE] = True


_READS = re.compile(
    r"(?:\s|\(|--[^\n]*\n|#[^\n]*\n|/\*.*?\*/)*"  # white space, parentheses and comments come first
    r"(select|with|show|explain|describe|desc|pragma|values|table|set|use|savepoint|release|rollback)\b",
    re.IGNORECASE | re.DOTALL,
)
_WRITES = re.compile(r"\b(?:insert|update|delete|replace|merge)\b", re.IGNORECASE)


@lru_cache(maxsize=2048)
def _reading_verb(beginning: str) -> str:
    """The verb of a statement that begins so, if it changes no row; "" for what is not known to only read."""
    match = _READS.match(beginning)
    return match[1].lower() if match else ""


def build(config: DatabaseConfig, owner: DatabaseOwner) -> Database:
    """The engine of `config`. Imports the driver; no connection is made.

    Raises:
        ConfigError: [DBS-CONFIG] a missing driver, an option that create_engine refuses.
    """
    name, url, options = config.name, config.url, dict(config.options)
    try:
        url.get_dialect()
    except NoSuchModuleError:
        raise ConfigError(
            f"Database {name!r}: there is no dialect {url.drivername!r} for SQLAlchemy: check the URL's spelling "
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
    except (TypeError, ValueError, ArgumentError) as error:
        # The names of refused arguments; their values are not shown, they may be secrets.
        refused = re.findall(r"'(\w+)'", str(error).split(" sent to ")[0]) if "Invalid argument" in str(error) else []
        what = ", ".join(f"`{key}`" for key in refused) or "one of its values"
        raise ConfigError(
            f"Database {name!r}: create_engine refuses {what} in `options` "
            f"({type(error).__name__}). Remove or correct it; what a pool takes depends on `poolclass`."
        ) from None
    links = ConnectionLinks(config)
    links.listen(engine)
    return Database(config, owner, engine, links)


def _defaults(config: DatabaseConfig, options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of create_engine below the user's own, as far as the pool class in use takes them."""
    if not isinstance(options.get("connect_args", {}), dict):
        raise ConfigError(f"Database {config.name!r}: `connect_args` in `options` must be a mapping.")
    defaults: dict[str, Any] = {}
    if config.backend == "sqlite":
        defaults |= sqlite.engine_options(config.name, config.url, options)
    elif config.backend in ("mysql", "mariadb"):
        defaults |= mysql.engine_options(config.url)
    if "pool" in options:
        return defaults  # a ready-made pool has its sizes already
    poolclass = options.get("poolclass")
    if poolclass is None:
        dialect: Any = config.url.get_dialect()
        poolclass = dialect.get_pool_class(config.url)
        if poolclass is QueuePool:
            poolclass = defaults["poolclass"] = ScopePool
    if not (inspect.isclass(poolclass) and issubclass(poolclass, Pool)):
        raise ConfigError(f"Database {config.name!r}: `poolclass` in `options` must be a sqlalchemy.pool.Pool class.")
    return defaults | pool_defaults(poolclass)


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
        if self.ended:
            waiter.wake()
        waiter.wait()

    def end(self) -> None:
        self.ended = True
        for waiter in list(self._waiters):
            waiter.wake()


class EngineCache:
    """name -> Database, from one configuration. Lives until the next one.

    `_built` is written by whoever won the flight of a name, `_flights` by `setdefault` and `pop`: one step each.
    """

    def __init__(self, source: Source, owner: DatabaseOwner) -> None:
        self._source = source
        self._owner = owner
        self._built: dict[str, Database] = {}
        self._flights: dict[str, _Flight] = {}
        self._retired = False

    def build_all(self) -> None:
        """Build every engine that is known, so that what is wrong with one is said at once. No connection is made."""
        for name in self._source.known():
            self._build(name)

    def get(self, name: str) -> Database:
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

    def _build(self, name: str) -> Database:
        database = build(self._source.lookup(name), self._owner)
        database.retired = self._retired
        self._built[name] = database
        return database

    def databases(self) -> list[Database]:
        """Those built so far."""
        return list(self._built.values())

    def retire(self) -> None:
        """Mark everything as replaced by another configuration. No I/O: `dispose()` each database afterwards."""
        self._retired = True
        for database in self.databases():
            database.retired = True

    def succeed(self) -> None:
        """In a forked child: abandon every engine's connections; builds under way are forgotten with their builders."""
        self._flights = {}
        self._built = {name: database.succeed() for name, database in self._built.items()}
