"""The AsyncSession that lives in a scope, and the async_scoped_session whose registry is the task's current scope."""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import sys
import weakref
from _thread import get_ident
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, NoReturn

from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_scoped_session, async_sessionmaker
from sqlalchemy.orm import Session

from dbsession.aio import scope, teardown
from dbsession.aio.scope import current_task, here, task_in
from dbsession.core import fork
from dbsession.core import teardown as core_teardown
from dbsession.core.config import DatabaseConfig
from dbsession.core.fork import KNOWN
from dbsession.core.functions import awaited
from dbsession.core.registry import BaseScopeRegistry, report_unfinished
from dbsession.core.session import ManagedSession, check_arguments, managed_class
from dbsession.core.unsaved import must_be_finished
from dbsession.errors import ConfigError

logger = logging.getLogger("dbsession.aio.manager")


class ManagedAsyncSession(AsyncSession):
    """An AsyncSession that lives in one scope, at most as long as it. Used after its end it raises
    `sqlalchemy.exc.InvalidRequestError` instead of checking a connection out again."""

    sync_session: ManagedSession
    _own_close = False  # the user's class has a close() of its own, or its sync_session_class has
    _committer: asyncio.Task[Any] | None = None  # the task in the middle of a commit()
    _commit_ended: asyncio.Future[None] | None = None  # for whoever waits for that

    async def commit(self) -> None:
        """Commit as `AsyncSession.commit` does. When its scope ends meanwhile, since another task runs this one by
        `asyncio.shield()`, say, the end waits for it."""
        if self._committer is not None:
            await super().commit()  # SQLAlchemy's error
            return
        self._committer = current_task()
        try:
            await super().commit()
        finally:
            self._committer = None
            if self._commit_ended is not None:
                self._commit_ended.cancel()
                self._commit_ended = None

    def commits_elsewhere(self) -> bool:
        """Whether another task than the calling one is in the middle of a commit()."""
        return self._committer is not None and self._committer is not current_task()

    async def commit_elsewhere_ended(self) -> None:
        """Wait for the end of a commit() in another task."""
        while self.commits_elsewhere():
            if self._commit_ended is None:
                self._commit_ended = asyncio.get_running_loop().create_future()
            await asyncio.wait((self._commit_ended,))

    def close_at_once(self) -> bool:
        """Close the session if nothing has to be awaited for that: no connection is in use, and nobody commits. Returns
        whether it did."""
        if self.sync_session._open_connections or self._own_close:
            return False
        if self._committer is not None and self.commits_elsewhere():
            return False
        self.sync_session.close()
        return True

    async def close(self) -> None:
        """Close the session and drop it from its scope, so that the proxy's next use gets a fresh one. If that fails or
        is cancelled, its connections are discarded before the error goes on."""
        # Without a call of close_at_once() where that would do nothing.
        if self.sync_session._open_connections or not self.close_at_once():
            self.sync_session._failing = sys.exception() is not None  # not seen in the greenlet that closes it
            await super().close()

    def discard(self) -> None:
        """Throw the session's connections away, and close it. Waits for nobody, and never fails. A connection that
        somebody waits for with it is given back as soon as it is there."""
        self.sync_session._given_up = True
        core_teardown.discard(self.sync_session._open_connections)
        try:
            self.sync_session.invalidate()
        except Exception:
            pass  # its places in the pool are free by now, and what became of its objects is of no interest


class SessionFactory(async_sessionmaker[Any]):
    """An async_sessionmaker whose call without arguments, which every first use in a scope makes, copies none."""

    def __call__(self, **arguments: Any) -> Any:
        return super().__call__(**arguments) if arguments else self.class_(**self.kw)


def make_factory(config: DatabaseConfig, engine: AsyncEngine) -> async_sessionmaker[Any]:
    """The async_sessionmaker of one database, bound to its engine. `class_` in `session` may be an AsyncSession class,
    or a Session class, which then becomes its `sync_session_class`.

    Raises:
        ConfigError: [DBS-CONFIG] an argument in `session` that the session class refuses.
    """
    arguments = {"autoflush": False, "close_resets_only": False, "expire_on_commit": False, **config.session}
    base = arguments.pop("class_", AsyncSession)
    sync = arguments.pop("sync_session_class", None)
    if isinstance(base, type) and issubclass(base, Session):
        base, sync = AsyncSession, base
    if not (isinstance(base, type) and issubclass(base, AsyncSession)):
        raise ConfigError(
            f"Database {config.name!r}: `class_` in `session` must be a subclass of "
            "sqlalchemy.ext.asyncio.AsyncSession or sqlalchemy.orm.Session."
        )
    managed_sync = managed_class(config.name, base.sync_session_class if sync is None else sync)
    bases = (ManagedAsyncSession,) if base is AsyncSession else (ManagedAsyncSession, base)
    own_close = base.close is not AsyncSession.close or managed_sync._always_closes
    managed: Any = type(f"Managed{base.__name__}", bases, {"sync_session_class": managed_sync, "_own_close": own_close})
    factory = SessionFactory(bind=engine, class_=managed, **arguments)
    check_arguments(config, factory)
    return factory


class ScopeRegistry(BaseScopeRegistry):
    """Finds and opens the session of one database in the task's current scope. Lives as long as its proxy."""

    __slots__ = ()

    def __call__(self) -> Any:
        """The current scope's session. No I/O, no await."""
        return self.open(None)

    def _current(self) -> scope.Scope | None:
        return scope.current()

    def set(self, obj: Any) -> None:
        """Make `obj`, a session of `session_factory`, the current scope's; an earlier one is closed aside."""
        current = scope.current_or_implicit()
        database = self._owner.database(self._name)
        earlier = self.take()
        if earlier is not None:
            teardown.close_aside(dict([earlier]), current.label)
        self._store(current, database, obj)

    def open(self, current: scope.Scope | None) -> Any:
        """The session of the current scope, which may be `current`; opened here unless it has one."""
        if current is None or current.ended:
            current = scope.current_or_implicit()
        earlier = self._find(current) if current.sessions else None
        if earlier is not None and not earlier.inherited:
            session = current.sessions[earlier]
            if earlier.source is self._owner.present() and not earlier.retired:
                self._remember(earlier)
                return session
            why = must_be_finished(session, current)
            if why:  # finished where it began; not remembered, since the next one opens elsewhere
                report_unfinished(logger, earlier, session, current.label, why)
                return session
        database = self.database
        if database is None or database.loop is not current.loop or database.retired or database.inherited:
            database = self._owner.database(self._name)
            self._remember(database)
        if earlier is not None:
            session = current.sessions.pop(earlier)
            if earlier.engine is database.engine and not session.in_transaction():  # after dispose(): it goes on
                session.sync_session._database = database
                current.sessions[database] = session
                return session
            teardown.close_aside({earlier: session}, current.label)
        return self._store(current, database, database.factory())

    def _store(self, current: scope.Scope, database: Any, session: Any) -> Any:
        sync = session.sync_session
        sync._database = database
        sync._in_loop = True
        sync._scope = weakref.ref(current)  # last: a snapshot() looks at what has one
        current.sessions[database] = session
        return session

    def _remember(self, database: Any) -> None:
        self.database = database
        # configure() in another thread puts the new source in place first and empties the registries then: it is seen
        # either here or there.
        if database.source is not self._owner.present():
            self.database = None


class AsyncScopedSession(async_scoped_session[Any]):
    """The `async_scoped_session` of one name. Lives as long as its manager; may be kept at module level and used from
    any task of any loop: every use goes to the session of the task's current scope."""

    registry: ScopeRegistry

    def __init__(self, owner: Any, name: str) -> None:
        self.name = name
        self.registry = ScopeRegistry(owner, name)
        self._owner = owner

    def __call__(self, **kw: Any) -> Any:
        """The AsyncSession of the task's current scope, opened unless it has one; see `get_dbsession`.

        Args:
            kw: for the session class; only where the scope has no session yet.
        """
        if kw:
            return super().__call__(**kw)
        if not KNOWN[0]:
            fork.found_out()
        stack = here()  # as scope.current(), without its calls
        if stack is None or stack.thread != get_ident() or task_in(stack.loop) is not stack.task:
            return self.registry.open(None)
        session = stack.sessions.get(self.registry.database)
        if session is not None:
            return session
        return self.registry.open(stack.scopes[-1] if stack.scopes else None)

    @property
    def _proxied(self) -> Any:
        # Private, and what each method of the AsyncSession asks that is called here: SQLAlchemy's own is
        # `self.registry()`, a call more. tests/unit/test_private_names.py fails loudly when the name goes.
        return self()

    if not TYPE_CHECKING:  # which sees that it is no context manager

        async def __aenter__(self) -> NoReturn:
            raise TypeError(
                "get_dbsession() gives the session of the task's current scope, which `async with` neither opens nor "
                "ends. Write `async with session_scope():` round the unit of work, use get_dbsession() in it, and "
                "await its commit(); or `async with get_dbsession().begin():`, which commits at the end."
            )

        async def __aexit__(self, *_: object) -> None: ...

    @property
    def session_factory(self) -> async_sessionmaker[Any]:  # type: ignore[override]  # an attribute there
        """The async_sessionmaker of the database, as it is configured now in this loop."""
        factory: async_sessionmaker[Any] = self._owner.database(self.name).factory
        return factory

    @awaited
    def remove(self) -> Coroutine[Any, Any, None]:
        """Close the current scope's session of this name, if there is one; the next use gets a fresh one.

        As `clear_dbsession()`: a session that fails to close is discarded and logged; only a cancellation is raised.
        """
        return self._remove(scope.current())

    async def _remove(self, current: scope.Scope | None) -> None:
        taken = self.registry.take_from(current)
        if taken is not None:
            await teardown.close_all(dict([taken]), f"a remove() of {self.name!r}")

    def __repr__(self) -> str:
        return f"<AsyncScopedSession {self.name!r}>"


def _looked_up_at_call(name: str, stock: Callable[..., Any]) -> Callable[..., Any]:
    @awaited
    @functools.wraps(stock)
    def method(self: AsyncScopedSession, *arguments: Any, **more: Any) -> Any:
        stack = here()  # as in __call__(), without a call for each statement
        if KNOWN[0] and stack is not None and stack.thread == get_ident() and task_in(stack.loop) is stack.task:
            session = stack.sessions.get(self.registry.database)
            if session is not None:
                return getattr(session, name)(*arguments, **more)
        return getattr(self(), name)(*arguments, **more)

    return method


# SQLAlchemy's proxy looks its session up when it is awaited, and asyncio.shield(), create_task(), gather() and Python
# 3.11's wait_for() await it in a task of their own: its session, a new one, has nothing to commit.
for _name, _stock in list(vars(async_scoped_session).items()):
    if inspect.iscoroutinefunction(_stock) and _name not in vars(AsyncScopedSession):
        setattr(AsyncScopedSession, _name, _looked_up_at_call(_name, _stock))
