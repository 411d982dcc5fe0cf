"""What an error of PostgreSQL means for the transaction, the connection and the pool: one table, by SQLSTATE."""

from __future__ import annotations

import re
from typing import Any

from dbsession.core.backends.base import Verdict
from dbsession.errors import RollbackRequired, describe

_REASONS: dict[str, tuple[Verdict, str]] = {
    # https://www.postgresql.org/docs/current/errcodes-appendix.html
    "25P03": (Verdict.DISCONNECT, "idle in a transaction for longer than the server's timeout"),
    "57P01": (Verdict.DISCONNECT, "terminated by an administrator, or by the server's shutdown"),
    "57P02": (Verdict.DISCONNECT, "terminated since another server process has crashed"),
    "57P03": (Verdict.DISCONNECT, "the server starts up, shuts down or recovers"),
    "57P05": (Verdict.DISCONNECT, "idle for longer than the server's timeout"),
    "25006": (Verdict.FAILOVER, "cannot write in a read-only transaction, as on a standby"),
    "40001": (Verdict.RETRY, "serialization failure"),
    "40P01": (Verdict.RETRY, "deadlock"),
    "55P03": (Verdict.RETRY, "a lock was not available: NOWAIT, or lock_timeout"),
}

FULL = "53300"
"""At connecting: too many connections, of the server, the database or the role."""
CURSOR_GONE = "34000"
"""A named cursor that its transaction's end has closed."""
CHANGED_RESULT, NOT_PREPARED = "0A000", "26000"
"""Of a prepared statement: its table was altered, so that its rows would be others; it is not there any more."""
STALE = frozenset({CHANGED_RESULT, NOT_PREPARED})

CLOSED_BEFORE_COMMIT = "the server has closed the connection before COMMIT was sent: nothing was committed"

_COMPLETION_UNKNOWN = "40003"

# "Too many connections" that libpq tells by its text only; and PgBouncer's.
_FULL_TEXT = re.compile(r"too many (clients|connections)|remaining connection slots|no more connections allowed")


def state(error: BaseException) -> str | None:
    """Return the SQLSTATE of a DBAPI error, or of SQLAlchemy's wrapper of one; None: the server has not sent it."""
    original: Any = getattr(error, "orig", None) or error
    for name in ("sqlstate", "pgcode"):  # psycopg and asyncpg; psycopg2
        found = getattr(original, name, None)
        if isinstance(found, str):
            return found
    return None


def classify(error: BaseException) -> Verdict:
    """What has to follow `error`, an error of psycopg, psycopg2 or asyncpg, or SQLAlchemy's wrapper of one."""
    code = state(error)
    if code is None:  # not the server's: libpq's and psycopg's of a connection that is lost or cannot be opened
        original: Any = getattr(error, "orig", None) or error
        lost = any(each.__name__ == "OperationalError" for each in type(original).__mro__)
        return Verdict.DISCONNECT if lost else Verdict.FATAL
    if code in _REASONS:
        return _REASONS[code][0]
    return Verdict.DISCONNECT if code.startswith("08") else Verdict.FATAL


def is_retryable(error: BaseException) -> bool:
    """Whether `error`, of any driver, is one after which the whole unit of work may be run again."""
    return classify(error) is Verdict.RETRY


def is_full(error: BaseException) -> bool:
    """Whether an error at connecting says that the server, or a pooler before it, has no room for one more."""
    return state(error) == FULL or _FULL_TEXT.search(str(error)) is not None


def commit_may_have_happened(error: BaseException, is_disconnect: bool) -> bool:
    """Whether a COMMIT that ended with `error` may have been carried out all the same."""
    return is_disconnect or state(error) == _COMPLETION_UNKNOWN or classify(error) is Verdict.DISCONNECT


def not_committed(database: str | None) -> RollbackRequired:
    """Return the error of a COMMIT that the server has answered with ROLLBACK."""
    return RollbackRequired(
        f"Database {database!r}: the server has rolled the transaction back where it was to be committed, since a "
        "statement of it had failed: nothing was committed. Roll back, to a savepoint at least, where an error is "
        "caught."
    )


def not_connected(failed: list[tuple[Any, Exception]]) -> Exception:
    """Return one error for all attempts to connect, of the last one's type, as psycopg has it."""
    last = failed[-1][1]
    if len(failed) == 1:
        return last.with_traceback(None)
    each = "; ".join(f"{one.get('host')} {one.get('hostaddr') or ''}: {describe(error)}" for one, error in failed)
    return type(last)(f"{last}. None of {len(failed)} addresses could be connected to: {each}")
