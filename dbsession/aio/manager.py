"""SessionManager in asyncio: named databases and the verbs of the public contract."""

from __future__ import annotations

import logging
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, overload

from sqlalchemy.ext.asyncio import AsyncEngine

from dbsession.aio import scope, teardown, transaction
from dbsession.aio.drivers import TwinSource
from dbsession.aio.engine import LoopDatabase, check, of_this_loop
from dbsession.aio.scope import Scope, SessionScope
from dbsession.aio.session import AsyncScopedSession
from dbsession.core import config, fork, sources
from dbsession.core.functions import F, awaited
from dbsession.core.manager import BaseSessionManager, report_release

logger = logging.getLogger("dbsession.aio.manager")

# Every manager of this process that is still referenced. Written when one is made or goes, one set operation each: a
# WeakSet cannot be read while another thread adds to it.
_managers: set[weakref.ref[SessionManager]] = set()


class SessionManager(BaseSessionManager[AsyncScopedSession]):
    """Named databases and their sessions, in every event loop of the process. Lives as long as the last reference to
    it, or as the last loop that used it.

    Who writes: `_source`, and after it `ready`, are replaced by configure() in one step each.

    Args:
        databases: see `configure`.
    """

    def __init__(self, databases: config.Databases | None = None) -> None:
        super().__init__(AsyncScopedSession)
        self._source: TwinSource | None = None
        self._of_process: TwinSource | None = None
        _managers.add(weakref.ref(self, _managers.discard))
        if databases is not None:
            self.configure(databases)

    def configure(self, databases: config.Databases | None = None) -> None:
        """Set the databases, for every event loop, in place of what was configured before.

        Takes what `dbsession.SessionManager.configure` takes, and raises its ConfigError; a driver that would stop the
        loop is replaced by its asyncio twin. Engines are built in each loop on first use. Those of an earlier
        configuration are closed when a loop next asks for a session. A transaction with unsaved work, or one begun by
        begin(), finishes where it began, which is logged; one that has only read is ended and its session closed, the
        calling task's now, others' at their next use.
        """
        found = TwinSource(sources.source_of(databases))
        if isinstance(found.of, sources.MappingSource):
            for name in found.known():
                check(found.lookup(name))
        self._source = found
        self.ready = {}
        self.forget()
        for current, database in self._only_read(scope.stack_of_caller()):
            teardown.close_aside({database: current.sessions.pop(database)}, current.label)

    def present(self) -> TwinSource:
        """The configuration in force: our own, or the process's."""
        if self._source is not None:
            return self._source
        found = self._of_process
        if found is None or found.of is not sources.process_wide:
            found = self._of_process = TwinSource(sources.process_wide)
        return found

    def _in_force(self, database: Any) -> bool:
        # `retired` once its loop has asked for a session.
        return not database.retired and database.source is self.present()

    def _look_up(self, name: str) -> None:
        if self._source is not None:
            self._source.lookup(name)

    def database(self, name: str) -> LoopDatabase:
        """Return the named database of the running loop, built on first use. Raises UnknownDatabase, ConfigError,
        LoopRequired."""
        return of_this_loop(self).get(name, self.present())

    def engine(self, name: str = "default") -> AsyncEngine:
        """Return the engine of `name` in the running loop; the same object until the next configure()."""
        return self.database(name).engine

    @overload
    def scope(self, label: F, *, read_timeout_s: float | None = None) -> F: ...
    @overload
    def scope(self, label: str | None = None, *, read_timeout_s: float | None = None) -> SessionScope: ...
    def scope(self, label: Any = None, *, read_timeout_s: float | None = None) -> Any:
        """Open a new scope nested in the task's current one; see `dbsession.aio.session_scope`."""
        return scope.session_scope(label, read_timeout_s=read_timeout_s)

    @awaited
    def clear(self) -> Coroutine[Any, Any, None]:
        """Close this manager's sessions in the caller's current scope; see `dbsession.aio.clear_dbsession`."""
        return self._clear(scope.current())

    async def _clear(self, current: Scope | None) -> None:
        if current is not None:
            await teardown.close_all(self._take(current), current.label)

    @awaited
    def release(self, *names: str) -> Coroutine[Any, Any, None]:
        """Give the connections of the caller's current scope back; see `dbsession.aio.release_dbsession`."""
        return self._release(scope.current(), names)

    async def _release(self, current: Scope | None, names: tuple[str, ...]) -> None:
        for name in names:
            self.database(name)
        for database, session in self._to_release(current, names):
            try:
                await session.rollback()  # expires every object, and keeps it attached
            except Exception as error:
                report_release(logger, database, error)

    async def run_in_transaction(self, fn: Callable[..., Any], **options: Any) -> Any:
        """Run and commit a whole unit of work; see `dbsession.aio.run_in_transaction`."""
        return await transaction.run(self, fn, **options)

    def transactional(self, func: Callable[..., Any] | None = None, **options: Any) -> Any:
        """Decorate a function whose calls are whole units of work; see `dbsession.aio.transactional`."""
        return transaction.transactional(self, func, options)

    async def dispose(self) -> None:
        """Close the connections of this loop's engines: the idle ones now, those in use when they are given back. The
        engines stay usable, and connect anew on their next use. Sessions whose transactions have only read are closed,
        the calling task's now, others' at their next use."""
        databases = of_this_loop(self)
        databases.succeed_disposed()
        self.forget()
        for current, database in self._only_read(scope.stack_of_caller()):
            await teardown.close_all({database: current.sessions.pop(database)}, current.label)
        await databases.dispose()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Close the task's sessions and the loop's engines at the end of an `async with` block; see
        `dbsession.aio.running`."""
        try:
            yield
        finally:
            try:
                await self.clear()
            finally:
                await self.dispose()


def _forget_all() -> None:
    for reference in list(_managers):
        manager = reference()
        if manager is not None:
            manager.forget()


sources.followers.append(_forget_all)
fork.in_child(_forget_all)
