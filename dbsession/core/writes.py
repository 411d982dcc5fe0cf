"""What a transaction has written and not committed yet, as the verbs of its statements tell.

They are attributes of SQLAlchemy's Connection, which lives as long as a transaction at least: a weak dictionary of them
would take eight calls for each transaction that writes.

    _dbsession_wrote        its last statement that wrote; None: nothing to lose
    _dbsession_by_itself    something was committed without a commit(): in autocommit, or by DDL, say
    _dbsession_savepoints   {name: what the first had then}, for ROLLBACK TO

All are written by an engine's events, one operation at a time, and only by whoever uses the connection.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from dbsession.core.backends.base import Backend

READS, WRITES, WITH, ENDS, SAVEPOINT = "", "writes", "with", "ends", "savepoint"
"""Kinds of statements: READS changes no row, ENDS the transaction, WITH may be either; SAVEPOINT sets one, releases it
or rolls back to it."""

_VERB = re.compile(
    r"(?:\s|\(|--[^\n]*\n|#[^\n]*\n|/\*.*?\*/)*+"  # white space, parentheses and comments come first
    r"(?P<verb>[a-z]+)\b(?P<rest>.*)",
    re.IGNORECASE | re.DOTALL,
)
_READING = frozenset({"select", "show", "explain", "describe", "desc", "pragma", "values", "table", "set", "use"})
_TO_SAVEPOINT = re.compile(r"\s+(?:(?:work|transaction)\s+)?to\b", re.IGNORECASE)
_TEMPORARY = re.compile(r"\s+(?:or\s+replace\s+)?temp(?:orary)?\b", re.IGNORECASE)
# Neither a lock (FOR UPDATE) nor the functions INSERT() and REPLACE().
_CHANGES = re.compile(
    r"\bfor\s+(?:no\s+key\s+)?update\b|\b(?:(?:insert|replace)\b(?!\()|(?:update|delete|merge)\b)(?P<changes>)",
    re.IGNORECASE,
)
_LAST_WORD = re.compile(r"(\S+?)[\s;]*\Z")


@lru_cache(maxsize=2048)
def kind_of(beginning: str, rules: type[Backend]) -> str:
    """Return the kind of a statement that begins so, on a database with these rules; WRITES for what is not known."""
    match = _VERB.match(beginning)
    if match is None:
        return WRITES
    verb, rest = match["verb"].lower(), match["rest"]
    if verb in _READING or verb in rules.NEUTRAL:
        return ENDS if verb == "set" and rules.commits_by_setting(beginning) else READS
    if verb == "with":
        return WITH
    if verb in ("savepoint", "release"):
        return SAVEPOINT
    if verb == "rollback":
        return SAVEPOINT if _TO_SAVEPOINT.match(rest) else ENDS
    if verb in rules.ENDS:
        return READS if verb in ("create", "drop") and _TEMPORARY.match(rest) else ENDS
    return WRITES


def wrote(connection: Any) -> str | None:
    """Return the last statement that wrote something in the connection's last transaction; None if none has."""
    statement: str | None = getattr(connection, "_dbsession_wrote", None)
    return statement


def committed_by_itself(connection: Any) -> bool:
    """Return whether something was committed by itself in the connection's last transaction."""
    return getattr(connection, "_dbsession_by_itself", False)


def note_by_itself(connection: Any) -> None:
    """Note that something was committed by itself on a connection."""
    connection._dbsession_by_itself = True


def note(connection: Any, statement: str, kind: str, autocommit: bool) -> None:
    """Note a statement that is about to be sent, of any kind but READS."""
    if kind == SAVEPOINT:
        _note_savepoint(connection, statement)
    elif kind == ENDS:
        note_by_itself(connection)
        forget(connection)
    elif kind == WRITES or _changes(statement):
        if autocommit:
            note_by_itself(connection)
        else:
            connection._dbsession_wrote = statement


def _changes(statement: str) -> bool:
    """Whether a statement of which the verb does not tell changes rows, by its words."""
    return any(found["changes"] is not None for found in _CHANGES.finditer(statement))


def begin(connection: Any) -> None:
    """Note that a transaction begins on a connection, whoever used it before."""
    # committed_by_itself() and forget(), without their calls in each transaction.
    if getattr(connection, "_dbsession_by_itself", False):
        connection._dbsession_by_itself = False
    if getattr(connection, "_dbsession_wrote", None) is not None:
        connection._dbsession_wrote = connection._dbsession_savepoints = None


def forget(connection: Any) -> None:
    """Note that a transaction has ended on a connection."""
    if wrote(connection) is not None:
        connection._dbsession_wrote = connection._dbsession_savepoints = None


def _note_savepoint(connection: Any, statement: str) -> None:
    name = _LAST_WORD.search(statement)
    match = _VERB.match(statement)
    if name is None or match is None:
        return
    known = getattr(connection, "_dbsession_savepoints", None) or {}
    if match["verb"].lower() == "savepoint":
        connection._dbsession_savepoints = {**known, name[1]: wrote(connection)}
    elif match["verb"].lower() == "rollback":
        connection._dbsession_wrote = known.get(name[1], wrote(connection))
