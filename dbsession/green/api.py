"""The process-wide manager and its functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from sqlalchemy.engine import Engine

from dbsession.core import engine, sources
from dbsession.core.config import Databases
from dbsession.core.engine import Listener
from dbsession.green.manager import SessionManager
from dbsession.green.session import ScopedSession

T = TypeVar("T")
L = TypeVar("L", bound=Listener)

manager = SessionManager()


def configure(databases: Databases | None = None) -> None:
    """Set the process's databases; see `SessionManager.configure` for what may be given and what happens to engines
    that exist already.

    Raises:
        ConfigError: [DBS-CONFIG] naming the database, the key and the fix; nothing was applied.
    """
    manager.configure(databases)
    sources.replace_process_wide(manager.source)


def get_dbsession(name: str = "default") -> ScopedSession:
    """Return the session of the database `name`, for the calling greenlet or thread.

    What you get is a `sqlalchemy.orm.scoped_session`, the same object for ever: keep it at module level, use it from
    anywhere. Every use goes to the session of the caller's current scope, opened at the first use there and closed
    when the scope ends: at the end of the request, of the `session_scope()`, or of the greenlet or thread.

    Never does network I/O. Before `configure` the name is not checked until the first use. A callable given to
    `configure` is asked here, if it has not been; whether that switches greenlets is the callable's affair.

    Raises:
        UnknownDatabase: [DBS-UNKNOWN] no such name; the text lists those there are.
        ConfigError: [DBS-CONFIG] what the callable or the environment says of it cannot be used.

    Using the session may raise UsedInHub, ScopeRequired (see `session_scope`) and ScopeEnded.
    """
    try:
        return manager.ready[name]
    except (KeyError, TypeError):
        pass  # and not from here: a KeyError shows the name, which may be a URL
    return manager.get(name)


def clear_dbsession() -> None:
    """Close every session of the current scope, which stays usable and empty. Idempotent. May switch greenlets.

    A session that fails to close is discarded with its connection and logged, and raises nothing; a kill or timeout
    that lands on the way is raised after the last session. Objects loaded through a closed session are detached.
    """
    manager.clear()


def release_dbsession(*names: str) -> None:
    """Give the connections of the current scope (all, or those of the named databases) back before slow work that needs
    no database: its transactions are ended. May switch greenlets.

    The sessions stay usable and their objects attached but expired: reading one checks a connection out again. (Not
    inside `with session.begin():`, whose block owns the transaction.) A write is seen by its statement's verb: one sent
    by a raw DBAPI cursor, or made by a function called in a SELECT, is not.

    Raises:
        UnsavedWork: [DBS-UNSAVED] new, dirty or deleted objects, or a write sent since the last commit. Nothing was
            changed: commit or roll back first.
        UnknownDatabase: [DBS-UNKNOWN].
    """
    manager.release(*names)


def get_engine(name: str = "default") -> Engine:
    """Return the engine of the database `name`: the same object until the next `configure`.

    Nothing is sent: the engine connects on its first use. May switch greenlets, where another greenlet is building it.

    Raises:
        UnknownDatabase, ConfigError: as `get_dbsession`.
    """
    return manager.engine(name)


def on_engine_created(fn: L) -> L:
    """Call `fn(name, engine)` for each named engine when it is built, and at once for those that there are: of every
    manager, once each. For what has to see every engine, such as tracing. Also a decorator.

    It is called after dbsession has set up its own event listeners, before anybody else has the engine; under a
    `configure()` that is refused in the end, too. Never after a fork: engines keep their listeners. An exception in it
    is logged as a WARNING, and the engine is used as it is. May switch greenlets if `fn` does.

    Returns:
        `fn`.
    """
    engine.on_created(fn)
    return fn


def dispose() -> None:
    """Close the connections of every engine: the idle ones now, those in use when they are given back. The engines
    stay usable, and connect anew. May switch greenlets."""
    manager.dispose()


def run_in_transaction(
    fn: Callable[..., T],
    *,
    name: str = "default",
    attempts: int = 3,
    backoff_s: float = 0.05,
    label: str | None = None,
) -> T:
    """Run `fn` as one unit of work in a scope of its own, commit its session of `name`, and return what it returned.

    When the database says that the whole should be run again (a deadlock, a lock wait timeout, a Galera certification
    failure; MySQL's 1213, 1205, 1020, SQLite's SQLITE_BUSY), it is rolled back and run again after a pause with
    jitter. So `fn` may run several times: what it does outside the database has to bear that. Never after a COMMIT
    whose outcome is unknown. Any other exception rolls back and goes on.

    Called inside a unit of work on the same database, `fn` joins it: same scope, one commit, at the outer one's end.
    If it fails there, the whole is refused at the end, even if its error was caught. Switches greenlets.

    Args:
        fn: called with no argument, or with the session if it cannot be called without one.
        name: the database.
        attempts: how often to run it at most.
        backoff_s: the longest pause before the second attempt, doubled for each further one up to 2 s.
        label: what reports call the unit of work; by default the function's name.

    Raises:
        CommitOutcomeUnknown: [DBS-COMMIT-UNKNOWN] it may have been committed, or not.
        RollbackRequired: [DBS-ROLLBACK] a part of it failed, and it went on.
        UnsavedWork: [DBS-UNSAVED] another database's session has unsaved work that nobody would commit.
        ConfigError: [DBS-CONFIG] an argument is wrong.
        Otherwise what `fn` raised, after the last attempt.
    """
    return manager.run_in_transaction(fn, name=name, attempts=attempts, backoff_s=backoff_s, label=label)


def transactional(func: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Decorator: each call of the function is a unit of work, as by `run_in_transaction`, whose arguments it takes by
    keyword: `@transactional`, or `@transactional(name="reports", attempts=5)`."""
    return manager.transactional(func, **options)
