"""The asyncio counterpart of dbsession: the same verbs, for tasks instead of greenlets.

    from dbsession import aio

    aio.configure({"default": "mysql+asyncmy://app@db/shop"})
    session = aio.get_dbsession("default")                # anywhere, also at module level
    application = aio.DBSessionMiddleware(application)    # ASGI

    async def view():
        order = await session.get(Order, 7)

Each task, and in it each unit of work, has its own AsyncSession; the middleware closes them at the request's end, and
a task that nobody wraps has its sessions closed when it is done. Engines are built for each event loop, and closed
before it ends. Nothing here imports gevent. `aio.loop_local` keeps other things per loop in the same way.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar, overload

from sqlalchemy.ext.asyncio import AsyncEngine

from dbsession.aio import loop_local
from dbsession.aio.asgi import DBSessionMiddleware
from dbsession.aio.engine import LoopDatabase
from dbsession.aio.manager import SessionManager
from dbsession.aio.scope import session_scope
from dbsession.aio.session import AsyncScopedSession
from dbsession.core.config import Databases
from dbsession.core.engine import Listener, on_created
from dbsession.core.functions import awaited
from dbsession.core.snapshot import Snapshot, snapshot_of
from dbsession.errors import (
    CommitOutcomeUnknown,
    ConfigError,
    DBSessionError,
    LoopRequired,
    PoolTimeout,
    ResultCut,
    RollbackRequired,
    ScopeEnded,
    ScopeRequired,
    UnknownDatabase,
    UnsavedWork,
)

__all__ = [
    "CommitOutcomeUnknown",
    "ConfigError",
    "DBSessionError",
    "DBSessionMiddleware",
    "LoopRequired",
    "PoolTimeout",
    "ResultCut",
    "RollbackRequired",
    "ScopeEnded",
    "ScopeRequired",
    "SessionManager",
    "Snapshot",
    "UnknownDatabase",
    "UnsavedWork",
    "clear_dbsession",
    "configure",
    "dispose",
    "get_dbsession",
    "get_engine",
    "loop_local",
    "on_engine_created",
    "release_dbsession",
    "run_in_transaction",
    "running",
    "session_scope",
    "snapshot",
    "transactional",
]

T = TypeVar("T")
L = TypeVar("L", bound=Listener)

manager = SessionManager()


def configure(databases: Databases | None = None) -> None:
    """Set the databases of the process's asyncio half; see `SessionManager.configure`. Without it, those of
    `dbsession.configure` and of the environment are used, each driver replaced by its asyncio twin (PyMySQL by asyncmy,
    pysqlite by aiosqlite).
    """
    manager.configure(databases)


def get_dbsession(name: str = "default") -> AsyncScopedSession:
    """Return the session of the database `name`, for the running task.

    What you get is a `sqlalchemy.ext.asyncio.async_scoped_session`, the same object for ever: keep it at module level,
    use it from any task of any loop. Every use goes to the AsyncSession of the task's current scope, opened at the
    first use there and closed when the scope ends: at the end of the request, of the `session_scope()`, or of the
    task. A child task (gather, TaskGroup, create_task) has a scope, and so a session, of its own.

    The task that calls a method counts, whoever awaits what it returns: `asyncio.shield(session.commit())` commits the
    caller's session. Two at once on one session raise UsedByTwo, or another InvalidRequestError of SQLAlchemy's.

    Never awaits. Raises, and checks the name, as `dbsession.get_dbsession`. Using the session may raise ScopeRequired
    (in a callback of the loop, or in a thread) and ScopeEnded.
    """
    try:
        return manager.ready[name]
    except (KeyError, TypeError):
        pass  # and not from here: a KeyError shows the name, which may be a URL
    return manager.get(name)


@awaited
def clear_dbsession() -> Coroutine[Any, Any, None]:
    """Close every session of the caller's current scope, which stays usable and empty. Idempotent. Waits for the server
    where a transaction is open, for at most 5 seconds.

    Errors are logged, as by `dbsession.clear_dbsession`; a cancellation is raised after the last session.
    """
    return manager.clear()


@awaited
def release_dbsession(*names: str) -> Coroutine[Any, Any, None]:
    """Give the connections of the caller's current scope (all, or those of the named databases) back before slow work
    that needs no database: its transactions are ended.

    The sessions stay usable and their objects attached but expired: `await session.refresh(one)` before it is read,
    which checks a connection out again. Raises as `dbsession.release_dbsession`, such as UnsavedWork.
    """
    return manager.release(*names)


def get_engine(name: str = "default") -> AsyncEngine:
    """Return the AsyncEngine of the database `name` in the running event loop: the same object there until the next
    `configure`. It connects on its first use, and is closed before the loop ends. Raises as `get_dbsession`, and
    LoopRequired where no event loop runs."""
    return manager.engine(name)


def snapshot() -> Snapshot:
    """Take a snapshot of the asyncio half of this process; `dbsession.snapshot()` has both halves.

    It has the databases of every event loop, each loop's by itself, who holds their connections, and the scopes of
    tasks with their sessions. From any thread, with or without a loop. Frozen; never waits and does no I/O.
    """
    return snapshot_of(LoopDatabase)


def on_engine_created(fn: L) -> L:
    """Call `fn(name, engine)` for each named engine of both halves of dbsession, as `dbsession.on_engine_created`. Of
    an async engine `fn` gets the `sync_engine`, on which event listeners and instrumentations are set."""
    on_created(fn)
    return fn


async def dispose() -> None:
    """Close the connections of every engine of the running loop: the idle ones now, those in use when they are given
    back. The engines stay usable, and connect anew.

    Raises:
        ExceptionGroup: what failed; every engine was seen to.
        LoopRequired: [DBS-LOOP] no event loop runs here.
    """
    await manager.dispose()


def running() -> AbstractAsyncContextManager[None]:
    """Close the task's sessions, and the connections of the running loop's engines as by `dispose()`, at the end of the
    block: `async with aio.running():` round a program's main work.

    Without it, they are closed when the loop ends (`asyncio.run` and others run the loop's `shutdown_asyncgens()`), or
    at the loop's `close()`.
    """
    return manager.running()


@overload
async def run_in_transaction(
    fn: Callable[..., Awaitable[T]],
    *,
    name: str = "default",
    attempts: int = 3,
    backoff_s: float = 0.05,
    label: str | None = None,
) -> T: ...
@overload
async def run_in_transaction(
    fn: Callable[..., T],
    *,
    name: str = "default",
    attempts: int = 3,
    backoff_s: float = 0.05,
    label: str | None = None,
) -> T: ...
async def run_in_transaction(
    fn: Callable[..., Any],
    *,
    name: str = "default",
    attempts: int = 3,
    backoff_s: float = 0.05,
    label: str | None = None,
) -> Any:
    """Run `fn`, a coroutine function or a function, as one unit of work in a scope of its own, commit its session of
    `name`, and return what it returned; run all of it again, up to `attempts` times, after a deadlock and the like.

    Arguments, errors and what is run again are those of `dbsession.run_in_transaction`. A cancellation rolls back and
    goes on, as any exception does that calls for no further attempt. Run inside a unit of work of the same task on the
    same database, `fn` joins it; in a child task, such as the one of Python 3.11's `asyncio.wait_for()`, it does not
    (`asyncio.timeout()` makes none).
    """
    return await manager.run_in_transaction(fn, name=name, attempts=attempts, backoff_s=backoff_s, label=label)


def transactional(func: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Decorator: each call of the coroutine function is a unit of work, as by `run_in_transaction`, whose arguments it
    takes by keyword: `@aio.transactional`, or `@aio.transactional(name="reports", attempts=5)`."""
    return manager.transactional(func, **options)
