"""What was sent on a connection to MySQL or MariaDB, and what is known from that.

What we know beats what we are told: proxies and compatible servers do not set the status bits of their answers truly
(SERVER_STATUS_IN_TRANS above all). So a COMMIT or ROLLBACK is left out only where nothing was sent since the last one
was answered, or, in an autocommit mode that we have set ourselves, nothing but statements that by their text leave no
transaction open. What the server says may only make us send more.
"""

from __future__ import annotations

import re
from typing import Any

QUERY, PING, SET_OPTION = 0x03, 0x0E, 0x1B
"""Commands of the protocol, by their numbers."""
MULTI_STATEMENTS = 0x10000
"""The client's flag by which one text may hold several statements."""

# White space and comments before a statement; not those whose content is executed, /*! and /*M!.
_SPACE = rb"(?:[\s(]|/\*(?!M?!).*?\*/|--[^\n]*(?:\n|\Z)|\#[^\n]*(?:\n|\Z))*+"
_CONTENT_IS_EXECUTED = re.compile(rb"/\*M?!", re.IGNORECASE)
# In autocommit these are transactions of their own.
_WHOLE = re.compile(
    _SPACE + rb"(?:select|insert|update|delete|replace|with|show|explain|desc|describe|values|table|do)\b",
    re.IGNORECASE | re.DOTALL,
)
# These leave the autocommit mode as it is, unless they name it.
_KEEPS_AUTOCOMMIT = re.compile(
    _SPACE + rb"(?:set|start|begin(?!\s*not\b)|commit|rollback|savepoint|release|use|lock|unlock|flush|create|drop|"
    rb"alter|truncate|rename|kill|xa|handler|prepare|deallocate|load|analyze|optimize|check|grant|revoke)\b",
    re.IGNORECASE | re.DOTALL,
)


class Sent:
    """What was sent on one connection. Lives as long as it; written by whoever sends, in steps that do not switch."""

    __slots__ = ("_several", "autocommit", "count", "ended_at")

    def __init__(self, several: bool) -> None:
        self._several = several  # a text may hold several statements
        self.count = 0
        """How many commands were sent so far."""
        self.ended_at = -1
        """`count` when it was known that no transaction is open. As long as they are the same, that is known."""
        self.autocommit: bool | None = None
        """The autocommit mode that we have set, and that nothing sent since can have changed; None: not known."""

    def command(self, number: int, text: Any) -> None:
        """Note a command that is about to be sent, whatever becomes of it."""
        still_ended = self.ended_at == self.count
        self.count += 1
        if number == PING:
            if still_ended:
                self.ended_at = self.count
        elif number != QUERY:
            self.autocommit = None
            self._several = self._several or number == SET_OPTION
        elif self.autocommit is not None:
            sql = text.encode() if isinstance(text, str) else text
            if self._is_one(sql) and _WHOLE.match(sql):
                if still_ended and self.autocommit:
                    self.ended_at = self.count
            elif b"autocommit" in sql.lower() or not (self._is_one(sql) and _KEEPS_AUTOCOMMIT.match(sql)):
                self.autocommit = None

    def _is_one(self, sql: bytes) -> bool:
        """Whether the text is surely one statement, of which we see everything."""
        return not (self._several and b";" in sql) and not (b"/*" in sql and _CONTENT_IS_EXECUTED.search(sql))

    def ended(self, before: int) -> None:
        """Note that a COMMIT or ROLLBACK was answered, `before` which so many commands had been sent: if others were
        sent meanwhile, nobody knows what is open."""
        if self.count == before + 1:
            self.ended_at = self.count

    def autocommit_set(self, value: bool, before: int) -> None:
        """Note that our SET autocommit was answered, `before` which so many commands had been sent."""
        if self.count == before + 1:
            self.autocommit = value
