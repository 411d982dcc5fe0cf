"""SessionManager: named databases and the verbs of the public contract."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable
from typing import Any, TypeVar, overload

from sqlalchemy.engine import Engine

from dbsession.core import config, fork, sources
from dbsession.core.functions import F
from dbsession.core.manager import BaseSessionManager, report_release
from dbsession.errors import describe
from dbsession.green import engine as engines
from dbsession.green import ident, scope, teardown, transaction
from dbsession.green.block import SessionScope, session_scope
from dbsession.green.engine import EngineCache, ProcessDatabase
from dbsession.green.session import ScopedSession

logger = logging.getLogger("dbsession.manager")

T = TypeVar("T")

# Every manager of this process, for the fork hooks. Written when one is made.
_managers: weakref.WeakSet[SessionManager] = weakref.WeakSet()


class SessionManager(BaseSessionManager[ScopedSession]):
    """Named databases and their sessions. Lives as long as the process, or until the last reference goes.

    Scopes belong to the ident and not to a manager: one unit of work may use the sessions of several.

    Who writes: `_engines`, and after it `ready`, are replaced by configure() in one step each; the fork hooks run in a
    child that has no other thread yet.

    Args:
        databases: see `configure`.
    """

    def __init__(self, databases: config.Databases | None = None) -> None:
        super().__init__(ScopedSession)
        self._configured = False
        self._engines = EngineCache(sources.source_of(None), self)
        _managers.add(self)
        if databases is not None:
            self.configure(databases)

    def configure(self, databases: config.Databases | None = None) -> None:
        """Set the databases, in place of what was configured before.

        Everything is checked first, and nothing is applied when something is wrong. A mapping's engines are built
        here (no connection is made); those of a callable or the environment on first use. The engines of an earlier
        configuration are disposed: their idle connections are closed now, those in use when they are given back. A
        transaction with unsaved work, or one begun by begin(), finishes where it began, which is logged; one that has
        only read is ended and its session closed, the caller's now, others' at their next use. May switch greenlets.

        Args:
            databases: a mapping `name -> URL string | sqlalchemy.URL | {"url": ..., "options": ..., ...}` (all keys:
                `config.DatabaseConfig`); or a callable `name -> entry`, asked once per name on first use, for which
                None, `{}` or LookupError means unknown; or None: the environment, `DBSESSION_URL` (the database
                `default`) and `DBSESSION_<NAME>_URL`, read on first use.

        Raises:
            ConfigError: [DBS-CONFIG] naming the database, the key and the fix.
        """
        found = sources.source_of(databases)
        cache = EngineCache(found, self)
        if isinstance(found, sources.MappingSource):
            cache.build_all()
        replaced, self._engines, self._configured = self._engines, cache, True
        self.ready = {}
        replaced.retire()
        self.forget()
        for current, ended in self._only_read([] if ident.in_hub() else scope.stack_here()):
            teardown.close_all({ended: current.sessions.pop(ended)}, current.label)
        for database in replaced.databases():
            database.retire()

    @property
    def source(self) -> sources.Source:
        """Where the present configuration comes from."""
        return self._engines.source

    def _look_up(self, name: str) -> None:
        if self._configured:
            self._engines.get(name)

    def known(self) -> list[str]:
        """The names that are known to exist, sorted: of a mapping or the environment all, of a callable those that it
        was asked for so far. No I/O."""
        return self._engines.known()

    def database(self, name: str) -> ProcessDatabase:
        """Return the named database, built on first use. Raises UnknownDatabase, ConfigError."""
        return self._engines.get(name)

    def engine(self, name: str = "default") -> Engine:
        """Return the engine of `name`, built on first use; the same object until the next configure()."""
        database = self.database(name)
        while database.retired:  # by a configure() during its build
            database = self.database(name)
        return database.engine

    @overload
    def scope(self, label: F, *, read_timeout_s: float | None = None) -> F: ...
    @overload
    def scope(self, label: str | None = None, *, read_timeout_s: float | None = None) -> SessionScope: ...
    def scope(self, label: Any = None, *, read_timeout_s: float | None = None) -> Any:
        """Open a new scope nested in the current one; see `dbsession.session_scope`."""
        return session_scope(label, read_timeout_s=read_timeout_s)

    def clear(self) -> None:
        """Close this manager's sessions in the current scope; see `dbsession.clear_dbsession`."""
        current = scope.current()
        if current is not None and current.sessions:
            for database in list(current.sessions):
                if database.owner is not self:
                    teardown.close_all(self._take(current), current.label)
                    break
            else:
                teardown.close_all(current.sessions, current.label)

    def release(self, *names: str) -> None:
        """Give this scope's connections back; see `dbsession.release_dbsession`."""
        for name in names:
            self._engines.get(name)
        for database, session in self._to_release(scope.current(), names):
            try:
                session.rollback()  # expires every object, and keeps it attached
            except Exception as error:
                report_release(logger, database, error)

    def run_in_transaction(
        self,
        fn: Callable[..., T],
        *,
        name: str = "default",
        attempts: int = 3,
        backoff_s: float = 0.05,
        label: str | None = None,
    ) -> T:
        """Run and commit a whole unit of work; see `dbsession.run_in_transaction`."""
        return transaction.run(self, fn, name=name, attempts=attempts, backoff_s=backoff_s, label=label)

    def transactional(self, func: Callable[..., Any] | None = None, **options: Any) -> Any:
        """Decorate a function whose calls are whole units of work; see `dbsession.transactional`."""
        return transaction.transactional(self, func, options)

    def dispose(self) -> None:
        """Close every engine's connections: the idle ones now, those in use when they are given back. The engines
        stay usable, and connect anew on their next use. Transactions that have only read are rolled back, the caller's
        now, others' at their next use; their sessions stay usable. May switch greenlets."""
        databases = self._engines.databases()
        self._engines.succeed_disposed()
        self.forget()
        for current, database in self._only_read([] if ident.in_hub() else scope.stack_here()):
            try:
                current.sessions[database].rollback()
            except Exception as error:
                report_release(logger, database, error)
        for each in databases:
            each.dispose()

    def after_fork(self) -> None:
        """Forget, in a forked child, what the engines inherited and what every name was resolved to. Cannot fail."""
        self._engines.succeed()
        self.forget()


def _after_fork_in_child() -> None:
    inherited = engines.process_databases(succeeded=True)
    for database in inherited:
        database.inherited = True
    for manager in list(_managers):
        manager.after_fork()
    for database in inherited:
        try:
            database.abandon()
        except Exception as error:
            logger.warning("Database %r could not be abandoned after a fork: %s.", database.name, describe(error))


os.register_at_fork(before=engines.close_before_fork)
fork.in_child(_after_fork_in_child)
