"""Work of a session that a rollback would throw away: what it is, who refuses to drop it, and the line that says that
it was dropped."""

from __future__ import annotations

import logging
import sys
from time import monotonic
from typing import Any

from sqlalchemy import inspect
from sqlalchemy.engine import Connection
from sqlalchemy.orm import SessionTransactionOrigin

from dbsession.core import sql
from dbsession.core.backends import kind_of
from dbsession.core.pool import callsites
from dbsession.core.scope import BaseScope
from dbsession.core.writes import wrote
from dbsession.errors import UnsavedWork, plain

logger = logging.getLogger("dbsession.unsaved")

PAUSE_S = 60.0
"""Seconds between two lines about one database."""

_TABLES = 5  # that are named

_next: dict[str, tuple[float, int]] = {}
"""By a database's name when the next line may be written, and how many were left out since the last one. Written by
whoever drops work, one step each: two threads at once may leave one out of the number."""


def unsaved(session: Any) -> str:
    """Return what of the session's work a rollback would throw away, in words; "" if nothing."""
    for what, objects in unsaved_objects(session).items():
        if objects:
            return f"{len(objects)} {what} object{'s' if len(objects) > 1 else ''}"
    return "a write sent since the last commit" if unsaved_write(session) else ""


def unsaved_objects(session: Any) -> dict[str, list[Any]]:
    """The objects of the session that a flush would write. No I/O."""
    if session._is_clean():
        return {}
    changed = [each for each in session.dirty if session.is_modified(each)]
    return {"new": list(session.new), "dirty": changed, "deleted": list(session.deleted)}


def unsaved_write(session: Any) -> str | None:
    """The last statement that the session has sent and that a rollback would undo. No I/O."""
    if not session.is_active and not session.in_nested_transaction():
        return None  # a flush that failed has rolled it back, and raised
    for held in session._open_connections:
        statement = wrote(held)
        if statement is None or held.closed or held.invalidated:
            continue
        if kind_of(session._database.config.url).in_transaction(held.connection.dbapi_connection):
            return statement
    return None


def must_be_finished(session: Any, scope: BaseScope) -> str:
    """Return why the session's transaction has to go on where it began, in words; "" if it has only read, and may be
    ended."""
    session = getattr(session, "sync_session", session)
    transaction = session.get_transaction()
    if transaction is None:
        return ""
    if transaction.origin is SessionTransactionOrigin.BEGIN or session.in_nested_transaction():
        return "a transaction that it has begun itself"
    if (session._database.owner, session._database.name) in scope.transactions:
        return "a run_in_transaction()"
    return unsaved(session)


def refuse_unsaved(name: str, session: Any) -> None:
    """Raise UnsavedWork if giving the connection back would throw work of the session on `name` away."""
    what = unsaved(session)
    if what:
        raise UnsavedWork(
            f"Database {name!r}: the session has unsaved work ({what}), which releasing its connection would throw "
            "away. Call commit() or rollback() first; nothing was changed."
        )


def report_dropped(session: Any, failing: bool) -> None:
    """Log that closing the session drops unsaved work, unless its unit of work has failed, or is `failing`. No I/O;
    never fails."""
    try:
        scope: BaseScope | None = session._scope() if session._scope is not None else None
        label, failed = session._of or ((scope.label, scope.failed) if scope is not None else ("a unit of work", False))
        ended = scope is None or scope.ended or session._of is not None or bool(getattr(scope, "complete", None))
        if failed or (failing and not ended):
            return
        what = _in_words(session)
        if what:
            # Where a request or a task has ended, the server's code would be named, or ours.
            kind = "implicit" if scope is None else scope.kind
            how = "ended without an error" if ended else "closed its session without an error"
            if kind == "implicit" and ended:
                how = "ended"  # of a thread nobody knows how
            _report(session._database, f"{label} {how}", what, not ended or kind == "block")
    except Exception:  # a log handler of the user's, perhaps; the session is to be closed all the same
        pass


def _report(database: Any, who: str, what: str, sited: bool) -> None:
    now = monotonic()
    at, left_out = _next.get(database.name, (0.0, 0))
    if now < at:
        _next[database.name] = at, left_out + 1
        return
    _next[database.name] = now + PAUSE_S, 0
    site = ""
    if sited:
        found = callsites.written(callsites.users(callsites.outwards(sys._getframe(2)), 1))
        site = f", at {found[0]}" if found else ""
    logger.warning(
        "Database %r: %s and dropped %s. Nobody called commit(), or rollback() to say that it is meant.%s",
        database.name,
        who,
        what + site,
        f" {left_out} more did so since the last such line." if left_out else "",
    )


def _in_words(session: Any) -> str:
    parts = []
    for what, objects in unsaved_objects(session).items():
        if objects:
            tables = sorted({str(inspect(each).mapper.local_table.description) for each in objects})
            named = ", ".join([*tables[:_TABLES], *["..."][: len(tables) > _TABLES]])
            parts.append(f"{len(objects)} {what} object{'s' * (len(objects) > 1)} ({plain(named)})")
    # A connection of the program's own, as a test's, is not rolled back with the session.
    statement = None if isinstance(session.bind, Connection) else unsaved_write(session)
    if statement is not None:
        parts.append(f"a write sent since the last commit ({sql.masked(statement, session._database.config.backend)})")
    return " and ".join(parts)
