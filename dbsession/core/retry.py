"""When a unit of work is run again, after which pause, and what keeps it from being committed."""

from __future__ import annotations

import inspect
import random
import sqlite3
from collections.abc import Callable, Mapping
from typing import Any

from dbsession.core.backends import mysql_errors
from dbsession.core.config import positive_seconds
from dbsession.core.session import unsaved
from dbsession.errors import CommitOutcomeUnknown, ConfigError, RollbackRequired, UnsavedWork, describe

_LONGEST_BACKOFF_S = 2.0


def check(attempts: object, backoff_s: object) -> None:
    """Raise ConfigError if these are no arguments of `run_in_transaction`."""
    if isinstance(attempts, bool) or not isinstance(attempts, int) or attempts < 1:
        raise ConfigError(f"`attempts` of a transaction is {attempts!r}: give a whole number, 1 or more.")
    positive_seconds(backoff_s, "`backoff_s` of a transaction")


def pause_s(backoff_s: float, attempt: int) -> float:
    """Seconds to wait after the failed `attempt`, the first being 1."""
    # Full jitter: those that met at one row must not meet there again. Ten lines of tenacity would be one more package
    # to install, and it catches kills before it lets them go.
    return random.uniform(0, min(_LONGEST_BACKOFF_S, backoff_s * 2 ** (attempt - 1)))


def takes_session(fn: Callable[..., Any]) -> bool:
    """Whether `fn` cannot be called without an argument: then it gets the session."""
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):  # a builtin without one
        return False
    required = [each for each in parameters if each.default is each.empty]
    return any(each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD) for each in required)


def retryable(error: BaseException) -> bool:
    """Whether the database asks for the whole unit to be run again; never when it may have been committed."""
    if isinstance(error, CommitOutcomeUnknown):
        return False
    if isinstance(error, RollbackRequired):  # somebody went on after it
        return error.__cause__ is not None and retryable(error.__cause__)
    original = getattr(error, "orig", None) or error
    return mysql_errors.is_retryable(original) or is_sqlite_busy(original)


def is_sqlite_busy(error: BaseException) -> bool:
    """Whether another writer was quicker."""
    code: int = getattr(error, "sqlite_errorcode", 0)
    return isinstance(error, sqlite3.OperationalError) and code & 0xFF == sqlite3.SQLITE_BUSY


def failed_part(name: str, label: str, failed: BaseException) -> RollbackRequired:
    """The error when the unit `label` goes on after a part of it, joined to its transaction, has failed."""
    return RollbackRequired(
        f"Database {name!r}: {label} went on after a part of it, run in the same transaction, had failed with "
        f"{describe(failed)}. Nothing was committed: let the error pass, or give the part a session_scope() of "
        "its own."
    )


def refuse_other_work(manager: object, name: str, label: str, sessions: Mapping[Any, Any]) -> None:
    """Raise UnsavedWork if the unit `label`, on the database `name` of `manager`, leaves unsaved work in the session of
    another database. `sessions` is the used set of its scope."""
    for database, session in sessions.items():
        session = getattr(session, "sync_session", session)
        if (database.owner is manager and database.name == name) or not session.in_transaction():
            continue
        what = unsaved(session)
        if what:
            raise UnsavedWork(
                f"{label} is a transaction on {name!r}, but its session of {database.name!r} has unsaved work "
                f"({what}) that nobody would commit. Commit it yourself; nothing was committed."
            )
