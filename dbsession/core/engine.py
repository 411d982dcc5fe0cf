"""Databases: what both halves know of a named engine, and who is told of new ones.

    Database   base of green.engine.ProcessDatabase, one per process, and aio.engine.LoopDatabase, one per event loop
    _live      {weak reference to a Database}   all of this process, in whichever half or loop, earlier ones included
    listeners  [function]                       what on_engine_created() was given

`_live` is written when a Database is made or goes, one set operation each: a WeakSet cannot be read while another
thread adds to it. `listeners` grows only.
"""

from __future__ import annotations

import inspect
import logging
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

from sqlalchemy.engine import URL, Engine
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import AsyncAdaptedQueuePool, Pool, QueuePool

from dbsession.core import backends
from dbsession.core.backends.base import Backend
from dbsession.core.config import DatabaseConfig, shown
from dbsession.core.functions import name_of, runs_later
from dbsession.core.keys import refuse_misspelt, refused_option
from dbsession.core.pool.holders import HeldConnections
from dbsession.errors import ConfigError, describe, raised_at

logger = logging.getLogger("dbsession.created")

E = TypeVar("E", bound=Engine | AsyncEngine)

Listener = Callable[[str, Engine], object]

listeners: list[Listener] = []

_live: set[weakref.ref[Database]] = set()


class Database:
    """A named engine with its session factory, and the key under which a scope keeps that engine's session.

    Lives as long as its configuration, and as long as somebody uses it after that. `engine` is the Engine; in asyncio
    the AsyncEngine that stands for it. In a forked child it is `inherited`: not a byte goes to its connections. Once
    another configuration has taken its place, or its manager was disposed of, it is `retired`; in the second case it is
    `succeeded`, too: another Database stands for the same engine.
    """

    def __init__(self, config: DatabaseConfig, owner: Any, engine: Any, factory: Any, held: HeldConnections) -> None:
        self.config = config
        self.name = config.name
        self.owner = owner
        """The SessionManager that finds it by its name."""
        self.engine = engine
        self.factory = factory
        self.held = held
        self.stats = held.stats
        self.inherited = self.retired = self.succeeded = False
        self.listeners = EngineListeners(config.name, self.sync_engine)
        _live.add(weakref.ref(self, _live.discard))

    @property
    def sync_engine(self) -> Engine:
        """The Engine; in asyncio the one that the AsyncEngine stands for."""
        found: Engine = getattr(self.engine, "sync_engine", self.engine)
        return found


def all_databases(succeeded: bool = False) -> list[Database]:
    """List the databases of this process, of both halves, in no order; with those `succeeded`, if that is said."""
    known = (reference() for reference in list(_live))
    return [each for each in known if each is not None and (succeeded or not each.succeeded)]


def discard_earlier(url: URL, opened_s: float) -> None:
    """Have every connection that leads where `url` does, and was opened before `opened_s`, in seconds since the epoch,
    replaced at its next checkout, whatever its database's name, half or loop. Waits for nothing."""
    for database in all_databases():
        if _address(database.config.url) == _address(url):
            # What SQLAlchemy itself sets to discard all that there are: private, see tests/unit/test_private_names.py
            pool: Any = database.sync_engine.pool
            pool._invalidate_time = max(pool._invalidate_time, opened_s)


def _address(url: URL) -> tuple[object, ...]:
    return url.get_backend_name(), url.host, url.port, url.query.get("unix_socket")


class EngineListeners:
    """Which listeners know of one engine. Lives as long as the engine, through forks."""

    def __init__(self, name: str, engine: Engine) -> None:
        self._name = name
        self._engine = engine
        self._known: dict[int, object] = {}  # by id(); written by `setdefault`, one step
        self.closed = False
        """Nobody else is told: another configuration has taken its place, or it is a parent process's."""

    def notify(self) -> None:
        """Call every listener that does not know the engine yet."""
        for listener in list(listeners):
            self.notify_one(listener)

    def notify_one(self, listener: Listener) -> None:
        """Call `listener` with the engine, if it has not been. What it raises is logged, unless it is a kill."""
        token = object()
        if self._known.setdefault(id(listener), token) is not token:
            return
        try:
            listener(self._name, self._engine)
        except Exception as error:
            logger.warning(
                "Database %r: the on_engine_created function %s failed with %s at %s; the engine is used as it is.",
                self._name,
                name_of(listener),
                describe(error),
                raised_at(error),
            )


def on_created(listener: Listener) -> None:
    """Call `listener` for each engine that there is and each that will be built, once. Raises TypeError."""
    if not callable(listener):
        raise TypeError(f"on_engine_created() was given a {type(listener).__qualname__}: give it a function.")
    if runs_later(listener):
        raise TypeError(
            f"on_engine_created() cannot use {name_of(listener)}: its body runs after its call has returned, when the "
            "engine is in use already. Make it a plain function."
        )
    listeners.append(listener)  # first, so that none that is being built now is missed
    for database in all_databases():
        if not database.listeners.closed:
            database.listeners.notify_one(listener)


def made(
    backend: Backend, create: Callable[..., E], stock_pool: type[Any], fair_pool: type[Any], install: str, hint: str
) -> E:
    """Make the engine that a configuration describes. Imports the driver; no connection is made.

    Args:
        backend: of the configuration.
        create: `create_engine`, or its like.
        stock_pool: the pool class in whose place ours is put, `fair_pool`.
        install: what to do where the driver is missing, for the error's text.
        hint: what may be wrong with `options`, for the error's text.

    Raises:
        ConfigError: [DBS-CONFIG] a missing driver, an option that `create` refuses.
    """
    config = backend.config
    name, options = config.name, dict(config.options)
    defaults = _defaults(backend, options, stock_pool, fair_pool)
    connect_args = {**defaults.pop("connect_args", {}), **options.pop("connect_args", {})}
    try:
        engine = create(config.url, **{**defaults, **options, "connect_args": connect_args})
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"Database {name!r}: the driver of {config.url.drivername!r} is not installed (no module {error.name!r}). "
            f"{install}"
        ) from None
    except ImportError as error:
        raise ConfigError(
            f"Database {name!r}: the driver of {config.url.drivername!r} is there, but cannot be imported: {error}. "
            "Install a version of it that fits the other libraries."
        ) from error
    except Exception as error:  # each option has its own way to refuse a value
        raise refused_option(name, error, create.__name__, hint) from None
    refuse_misspelt(config, engine.dialect, engine.url)
    return engine


def driver_of(config: DatabaseConfig, examples: str) -> str:
    """Return the name of the driver, the dialect's default one where the URL names none.

    Raises:
        ConfigError: [DBS-CONFIG] SQLAlchemy has no such dialect; its text gives the `examples`.
    """
    driver = backends.driver_of(config.url)
    if driver is None:
        raise ConfigError(
            f"Database {config.name!r}: SQLAlchemy has no dialect {shown(config.url.drivername)}: check the spelling "
            f"({examples}), or install the package that has it."
        )
    return driver


def _defaults(backend: Backend, options: dict[str, Any], stock_pool: type[Any], fair_pool: type[Any]) -> dict[str, Any]:
    """Return the arguments below the user's own, as far as the pool class in use takes them."""
    config = backend.config
    if not isinstance(options.get("connect_args", {}), dict):
        raise ConfigError(f"Database {config.name!r}: `connect_args` in `options` must be a mapping.")
    defaults = backend.engine_options()
    if config.readonly:
        # No transaction is ever open: nothing to roll back.
        defaults |= {"isolation_level": "AUTOCOMMIT", "skip_autocommit_rollback": backend.knows_autocommit}
    if "pool" in options:
        return defaults  # a ready-made pool has its sizes already
    poolclass = options.get("poolclass")
    if poolclass is None:
        dialect: Any = config.url.get_dialect()
        if stock_pool is AsyncAdaptedQueuePool:
            dialect = dialect.get_async_dialect_cls(config.url)  # psycopg has two under one name
        poolclass = dialect.get_pool_class(config.url)
        if poolclass is stock_pool:
            poolclass = defaults["poolclass"] = fair_pool
            defaults |= backend.fair_pool_options()
    if not (inspect.isclass(poolclass) and issubclass(poolclass, Pool)):
        raise ConfigError(f"Database {config.name!r}: `poolclass` in `options` must be a sqlalchemy.pool.Pool class.")
    defaults |= {"pool_recycle": 3600, "pool_pre_ping": True}
    if issubclass(poolclass, QueuePool):
        defaults |= {"pool_size": 20, "max_overflow": 0}
    return defaults
