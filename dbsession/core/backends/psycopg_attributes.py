"""What a psycopg 3 connection has besides its session at the server: how its transactions begin, and its cursors.
Whatever its user changes of that is taken back, in either half.

The names with an underscore are psycopg's; each has its line in tests/unit/test_private_names.py.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from dbsession.core.backends.postgresql_sent import Sent
from dbsession.core.connection_info import OPENING, USED

_NAMES = (
    *("_autocommit", "_isolation_level", "_read_only", "_deferrable"),
    *("row_factory", "cursor_factory", "server_cursor_factory"),
)
_of = attrgetter(*_NAMES)


class SentOn(Sent):
    """What was sent on one connection, and its attributes at first. Lives as `Sent` says."""

    __slots__ = ("at_first", "notice_handlers", "unseen")

    def __init__(self) -> None:
        super().__init__()
        self.at_first: tuple[Any, ...] | None = None
        """Its attributes as its first user got it."""
        self.notice_handlers = 0
        """How many handlers of notices it had then."""
        self.unseen = False
        """Something was sent on it, as it was opened by listeners of the user's, of which nobody has seen the text."""

    def note_unseen(self) -> None:
        """Note that a text is about to be sent which nobody sees: by a cursor that is not ours."""
        if self.phase is USED:
            self.changed = True
        elif self.phase is OPENING:
            self.unseen = True

    def taken(self, connection: Any) -> None:
        self.phase = USED
        if self.unseen:
            self.settings, self.unseen = None, False
        if self.at_first is None:
            self.at_first = _of(connection)
            self.notice_handlers = len(connection._notice_handlers)

    def take_back(self, connection: Any) -> None:
        """Give a connection in no transaction the attributes that it had at first. Sends nothing."""
        first = self.at_first
        if first is None:
            return
        if _of(connection) != first:
            for name, value in zip(_NAMES, first, strict=True):
                setattr(connection, name, value)
            connection._begin_statement = b""
        if len(connection._notice_handlers) > self.notice_handlers:
            del connection._notice_handlers[self.notice_handlers :]
