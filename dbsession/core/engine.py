"""Databases: what both halves know of a named engine, and who is told of new ones.

    Database   base of green.engine.ProcessDatabase, one per process, and aio.engine.LoopDatabase, one per event loop
    _live      {weak reference to a Database}   all of this process, in whichever half or loop, earlier ones included
    listeners  [function]                       what on_engine_created() was given

`_live` is written when a Database is made or goes, one set operation each: a WeakSet cannot be read while another
thread adds to it. `listeners` grows only.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import Any

from sqlalchemy.engine import Engine

from dbsession.core.config import DatabaseConfig
from dbsession.core.pool.holders import HeldConnections
from dbsession.errors import describe, raised_at

logger = logging.getLogger("dbsession.created")

Listener = Callable[[str, Engine], object]

listeners: list[Listener] = []

_live: set[weakref.ref[Database]] = set()


class Database:
    """A named engine with its session factory, and the key under which a scope keeps that engine's session.

    Lives as long as its configuration, and as long as somebody uses it after that. `engine` is the Engine; in asyncio
    the AsyncEngine that stands for it. In a forked child it is `inherited`: not a byte goes to its connections. Once
    another configuration has taken its place, or its manager was disposed of, it is `retired`.
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
        self.inherited = self.retired = False
        self.listeners = EngineListeners(config.name, self.sync_engine)
        _live.add(weakref.ref(self, _live.discard))

    @property
    def sync_engine(self) -> Engine:
        """The Engine; in asyncio the one that the AsyncEngine stands for."""
        found: Engine = getattr(self.engine, "sync_engine", self.engine)
        return found


def all_databases() -> list[Database]:
    """List the databases of this process, of both halves, in no order."""
    return [each for each in (reference() for reference in list(_live)) if each is not None]


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
                getattr(listener, "__qualname__", type(listener).__qualname__),
                describe(error),
                raised_at(error),
            )


def on_created(listener: Listener) -> None:
    """Call `listener` for each engine that there is and each that will be built, once."""
    listeners.append(listener)  # first, so that none that is being built now is missed
    for database in all_databases():
        if not database.listeners.closed:
            database.listeners.notify_one(listener)
