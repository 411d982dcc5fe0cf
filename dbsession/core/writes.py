"""What a transaction has written and not committed yet, as the verbs of its statements tell.

    wrote        {Connection: its last statement that wrote}    none: nothing to lose
    by_itself    Connections on which something was committed without a commit()
    _savepoints  {Connection: {name: what `wrote` had for it}}  for ROLLBACK TO

All are written by an engine's events, one operation at a time, and only by whoever uses the connection.
"""

from __future__ import annotations

import re
import weakref
from functools import lru_cache

from sqlalchemy.engine import Connection

from dbsession.core.backends.base import Backend

wrote: weakref.WeakKeyDictionary[Connection, str] = weakref.WeakKeyDictionary()
"""Connections on which something was written in their last transaction, and the last statement that did it."""

by_itself: weakref.WeakSet[Connection] = weakref.WeakSet()
"""Connections on which something was committed by itself in their last transaction: in autocommit, or by DDL, say."""

_savepoints: weakref.WeakKeyDictionary[Connection, dict[str, str | None]] = weakref.WeakKeyDictionary()

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


def note(connection: Connection, statement: str, kind: str, autocommit: bool) -> None:
    """Note a statement that is about to be sent, of any kind but READS."""
    if kind == SAVEPOINT:
        _note_savepoint(connection, statement)
    elif kind == ENDS:
        by_itself.add(connection)
        forget(connection)
    elif kind == WRITES or _changes(statement):
        if autocommit:
            by_itself.add(connection)
        else:
            wrote[connection] = statement


def _changes(statement: str) -> bool:
    """Whether a statement of which the verb does not tell changes rows, by its words."""
    return any(found["changes"] is not None for found in _CHANGES.finditer(statement))


def begin(connection: Connection) -> None:
    """Note that a transaction begins on a connection, whoever used it before."""
    by_itself.discard(connection)
    if wrote.pop(connection, None) is not None:  # as forget(), without its call
        _savepoints.pop(connection, None)


def forget(connection: Connection) -> None:
    """Note that a transaction has ended on a connection."""
    if wrote.pop(connection, None) is not None:
        _savepoints.pop(connection, None)


def _note_savepoint(connection: Connection, statement: str) -> None:
    name = _LAST_WORD.search(statement)
    match = _VERB.match(statement)
    if name is None or match is None:
        return
    if match["verb"].lower() == "savepoint":
        _savepoints.setdefault(connection, {})[name[1]] = wrote.get(connection)
    elif match["verb"].lower() == "rollback":
        before = _savepoints.get(connection, {}).get(name[1], wrote.get(connection))
        if before is None:
            wrote.pop(connection, None)
        else:
            wrote[connection] = before
