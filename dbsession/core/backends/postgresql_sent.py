"""What was sent on a connection to PostgreSQL changes its session, or does not: by the text.

What the connection's user has set is taken back when it returns, and what was set as it was opened, by listeners of the
user's too, is set again. A function or a procedure of the user's own may change a session without a word of that in the
text: `reset="connection"` is for those.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

from dbsession.core.connection_info import OPENING, USED

_MOST_SETTINGS = 50


def _compiled(pattern: bytes) -> re.Pattern[bytes]:
    return re.compile(pattern, re.IGNORECASE | re.DOTALL)


# Comments nest in PostgreSQL; what is not seen of one that does is taken for a statement.
_SPACE = rb"(?:[\s(;]|--[^\n]*(?:\n|\Z)|/\*.*?\*/)*+"
_ROWS_ONLY = _compiled(
    _SPACE
    + rb"(?:select|with|insert|update|delete|merge|values|table|fetch|move|declare|close|copy|show|savepoint|release)\b"
)
_BEGINS = _compiled(_SPACE + rb"(?:begin|start)\b")
_COPIES = _compiled(_SPACE + rb"copy\b")
_CHANGES = (
    # SET LOCAL and SET TRANSACTION end with their transaction.
    rb"(?:set\b(?!\s+(?:local|transaction|constraints)\b)|reset\b|listen\b|unlisten\b|load\b|discard\b|deallocate\b|"
    rb"prepare\b(?!\s+transaction\b)|create\s+(?:or\s+replace\s+)?(?:(?:local|global)\s+)?temp|do\b|call\b)"
)
_CHANGES_FIRST = _compiled(_SPACE + _CHANGES)
# The run of blanks takes in nothing that such a run begins with: else a long text would take its length squared.
_CHANGES_WITHIN = _compiled(rb"[;/\n(][ \t\r]*+" + _CHANGES)
# Wherever it stands: a function, by a name that may be quoted; what is made in the schema of the session's own tables;
# SELECT INTO one of those; a cursor that outlives its transaction.
_ANYWHERE = _compiled(
    rb"\b(?:(?:set_config|pg_(?:try_)?advisory_lock(?:_shared)?|dblink_connect(?:_u)?)\"?(?:\s|/\*.{0,20}?\*/)*+\(|"
    rb"pg_temp\b|into\s+(?:(?:local|global)\s+)?temp|with\s+hold\b)"
)
_MOST_KEPT = 4096
"""Bytes of the longest text whose kind is remembered, as the text is with it."""


class Kind(NamedTuple):
    """What a text does besides reading and writing rows."""

    begins: bool
    """It begins with a BEGIN of its own."""
    rows_only: bool
    """It neither makes nor drops anything that a prepared statement may have been planned with."""
    changes: bool
    """It changes the session."""

    copies: bool
    """The text is a COPY."""


def kind_of(text: bytes | str) -> Kind:
    """Return what a statement does, or several in one text."""
    return _known(text) if len(text) <= _MOST_KEPT else _found(text)


def _found(text: bytes | str) -> Kind:
    if isinstance(text, str):
        text = text.encode()
    several = b";" in text
    changes = _CHANGES_FIRST.match(text) or _ANYWHERE.search(text) or (several and _CHANGES_WITHIN.search(text))
    return Kind(
        begins=_BEGINS.match(text) is not None,
        rows_only=_ROWS_ONLY.match(text) is not None and not several,
        changes=bool(changes),
        copies=_COPIES.match(text) is not None,
    )


_known = lru_cache(maxsize=2048)(_found)


class Sent:
    """What was sent on one connection. Lives as long as it; written by whoever sends, in steps that do not switch."""

    __slots__ = ("changed", "level_changed", "phase", "settings")

    def __init__(self) -> None:
        self.phase = OPENING
        self.settings: list[bytes] | None = []
        """What was set while it was opened, in its order; None: too much to be done again."""
        self.changed = False
        """What its user has sent changes the session."""
        self.level_changed = False
        """An isolation level of one checkout is to be taken back."""

    def note_change(self, text: bytes) -> None:
        """Note a text that changes the session and is about to be sent."""
        if self.phase is USED:
            self.changed = True
        elif self.phase is OPENING and self.settings is not None:
            if text in self.settings:
                self.settings.remove(text)
            self.settings.append(text)
            if len(self.settings) > _MOST_SETTINGS:
                self.settings = None

    def taken(self, _: object) -> None:
        """Note that from now on the connection's user sends."""
        self.phase = USED

    def returned(self) -> None:
        """Note that the connection is as at first, and will be somebody else's."""
        self.changed = self.level_changed = False
        self.phase = OPENING
