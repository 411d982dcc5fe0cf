"""What is known of an engine's open connections under gevent: their hub, and what a forked child gives up."""

from __future__ import annotations

import weakref
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Engine

from dbsession.core import fork
from dbsession.core.backends import driver_of, kind_of
from dbsession.core.backends.base import Backend
from dbsession.core.backends.mysql import MySQL
from dbsession.core.backends.postgresql import PostgreSQL
from dbsession.core.backends.sqlite import SQLite
from dbsession.core.config import DatabaseConfig
from dbsession.core.interceptors import EngineConnections
from dbsession.core.pool.leaks import LeakWatch
from dbsession.core.pool.stats import Stats
from dbsession.green import hub, ident
from dbsession.green.cleaning import Cleans
from dbsession.green.holders import HeldByGreenlets, leak_watches, watch_leaks
from dbsession.green.mysql.backend import PyMySQL
from dbsession.green.owner_hub import OWNER_HUB, await_first_in_any_hub, owner_hub_of
from dbsession.green.pool import FairPool
from dbsession.green.sqlite import PySQLite


class GreenConnections(EngineConnections):
    """The open connections of one engine, and its backend. Lives as long as the engine, through forks.

    `_records` grows with each connection and loses those that are collected, one step each.
    """

    def __init__(self, config: DatabaseConfig) -> None:
        held = HeldByGreenlets(config.name, config.backend)
        backend = _backend_of(config, held.stats)
        super().__init__(backend, held)
        self.database: object = None
        """Kept alive as long as the engine: after configure() somebody may still hold a connection of it."""
        self._leaks = LeakWatch(config, held, leak_watches)  # for its life only
        # Each connection's record, and what its socket is. A dict of its own in a child.
        self._records: weakref.WeakKeyDictionary[Any, tuple[weakref.ref[Any], Any]] = weakref.WeakKeyDictionary()

    def follow(self, engine: Engine) -> None:
        """Follow a new engine, and its pool."""
        self.install(engine, FairPool)
        await_first_in_any_hub(engine.pool)
        if not isinstance(engine.pool, FairPool):  # which sees to the pools that come after it by itself
            event.listen(engine, "engine_disposed", lambda engine: await_first_in_any_hub(engine.pool))
        backend = self.backend
        if isinstance(backend, Cleans):
            backend.made(engine, cleans=isinstance(engine.pool, FairPool))
            if isinstance(engine.pool, FairPool):
                engine.pool.cleaning = backend.cleaning

    def on_connect(self, connection: Any, record: Any) -> None:
        """Note a connection that was opened, and set it up."""
        ident.refuse_eventlet()  # which may have patched after the import, as in a preloaded worker
        try:
            self._records[connection] = weakref.ref(record), fork.identity(connection)
        except TypeError:
            pass  # a driver without weak references: after a fork its pool is replaced, and that is all
        watch_leaks()
        fork.prepare()
        hub.watch_forks()
        record.info[OWNER_HUB] = owner_hub_of(connection)
        super().on_connect(connection, record)

    def abandon(self) -> None:
        """Give up, in a forked child, the parent's connections. No I/O."""
        inherited = [(connection, record(), opened_as) for connection, (record, opened_as) in self._records.items()]
        self._records = weakref.WeakKeyDictionary()
        self.backend.abandon([connection for connection, *_ in inherited])
        self.held.forget()
        self.stats.reset()
        fork.abandon(inherited)


def _backend_of(config: DatabaseConfig, stats: Stats) -> Backend:
    kind, driver = kind_of(config.url), driver_of(config.url)
    if kind is MySQL and driver == "pymysql":
        return PyMySQL(config, stats)
    if kind is SQLite:
        return PySQLite(config)
    if kind is PostgreSQL and driver == "psycopg":
        try:
            import psycopg  # noqa: F401
        except ImportError:  # an extra that is missing: create_engine says so
            return kind(config)
        from dbsession.green.postgresql.backend import Psycopg

        return Psycopg(config, stats)
    if kind is PostgreSQL and driver == "psycopg2":
        try:
            import psycopg2  # noqa: F401
        except ImportError:
            return kind(config)
        from dbsession.green.postgresql.psycopg2_backend import Psycopg2

        return Psycopg2(config, stats)
    return kind(config)
