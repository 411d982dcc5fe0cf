"""What was sent on a connection to MySQL or MariaDB, and what is known from that.

What we know beats what we are told: proxies and compatible servers do not set the status bits of their answers truly
(SERVER_STATUS_IN_TRANS above all). So a COMMIT or ROLLBACK is left out only where nothing was sent since the last one
was answered, or, in an autocommit mode that we have set ourselves, nothing but statements that by their text leave no
transaction open. What the server says may only make us send more.

A text also tells whether it changes the session: what the connection's user has set is taken back when it returns, and
what was set as it was opened, by listeners of the user's too, is set again.
"""

from __future__ import annotations

import re
from typing import Any

from dbsession.core.connection_info import OPENING, USED

INIT_DB, QUERY, PING, CHANGE_USER, PREPARE, EXECUTE, SET_OPTION, RESET_CONNECTION = (
    *(0x02, 0x03, 0x0E, 0x11),
    *(0x16, 0x17, 0x1B, 0x1F),
)
"""Commands of the protocol, by their numbers. The last one: MySQL 5.7.3, MariaDB 10.2.4."""
MULTI_STATEMENTS = 0x10000
"""The client's flag by which one text may hold several statements."""

_MOST_SETTINGS = 50

_COMMENTS = rb"--[^\n]*(?:\n|\Z)|\#[^\n]*(?:\n|\Z)"
# What may stand before a statement; in the first without comments whose content is executed, /*! and /*M!.
_SPACE = rb"(?:[\s(]|/\*(?!M?!).*?\*/|" + _COMMENTS + rb")*+"
_START = rb"(?:[\s(;]|/\*M?!\d*|\*/|/\*.*?\*/|" + _COMMENTS + rb")*+"


def _compiled(pattern: bytes) -> re.Pattern[bytes]:
    return re.compile(pattern, re.IGNORECASE | re.DOTALL)


_CONTENT_IS_EXECUTED = _compiled(rb"/\*M?!")
# In autocommit these are transactions of their own. Group 1 may set nothing of the session.
_WHOLE = _compiled(
    _SPACE + rb"(?:(insert|update|delete|replace)|select|with|show|explain|desc|describe|values|table|do)\b"
)
# These leave the autocommit mode as it is, unless they name it.
_KEEPS_AUTOCOMMIT = _compiled(
    _SPACE + rb"(?:set|start|begin(?!\s*not\b)|commit|rollback|savepoint|release|use|lock|unlock|flush|create|drop|"
    rb"alter|truncate|rename|kill|xa|handler|prepare|deallocate|load|analyze|optimize|check|grant|revoke)\b"
)
_SETS_AUTOCOMMIT = _compiled(
    _SPACE + rb"set\s*(?:(?:session|local)\s+|@@(?:(?:session|local)\s*\.\s*)?)?`?autocommit`?\s*:?=\s*"
    rb"'?(?:(1|on|true)|0|off|false)'?[\s;]*\Z"
)
# These commit what was written before them.
_COMMITS = _compiled(
    _START + rb"(?:alter|analyze|begin|check|commit|create(?!\s+temporary)|drop(?!\s+temporary)|flush|grant|install|"
    rb"lock|optimize|rename|repair|revoke|set\s+password|start\s+transaction|truncate|uninstall)\b"
)
# SET TRANSACTION is over with the next transaction, SET STATEMENT with its statement.
_CHANGES = (
    rb"(?:set(?!\s+(?:transaction|statement)\b)|use|lock|flush|prepare|execute|handler|backup|"
    rb"create\s+(?:or\s+replace\s+)?temporary|begin\s+not|if|case|loop|while|repeat|for|declare)\b"
)
_CHANGES_FIRST = _compiled(_START + _CHANGES)
# Of the statements after the first one. The text may be somebody's upload: no byte is looked at twice, so what may
# follow a separator holds none. The end of a comment counts as one; that of a line, where comments may end with it.
_CHANGES_WITHIN = _compiled(rb"(?:;|/\*M?!\d*+|\*/)[\s(]*+" + _CHANGES)
_CHANGES_IN_A_LINE = _compiled(rb"\n[ \t\r\f\v(]*+" + _CHANGES)
# Comments of some length only: nobody's upload makes this slow.
_INTO_VARIABLE = _compiled(rb"\binto(?>\s|/\*.{0,20}?\*/|(?:--|\#)[^\n]{0,20}\n)*+@")
_MOVES = _compiled(rb"\buse\b")
_ONE_VALUE = _compiled(_SPACE + rb"(use|set\s+(?:names|role|character\s+set))\b[^;,]*\Z")  # what they set
_TAKES_ROLE = _compiled(rb"\brole\b")


class Sent:
    """What was sent on one connection. Lives as long as it; written by whoever sends, in steps that do not switch."""

    __slots__ = (
        "_mode",
        "_mode_told",
        "_several",
        "autocommit",
        "changed",
        "count",
        "ended_at",
        "kept",
        "level_changed",
        "mode_at_first",
        "moved",
        "phase",
        "settings",
        "told_at_first",
        "unsettable",
    )

    def __init__(self, several: bool) -> None:
        self._several = several  # a text may hold several statements
        self.count = 0
        """How many commands were sent so far."""
        self.ended_at = -1
        """`count` when it was known that no transaction is open. As long as they are the same, that is known."""
        self.autocommit: bool | None = None
        """The autocommit mode that we have set, and that nothing sent since can have changed; None: not known."""
        self._mode: bool | None = None  # the one that was set last, as far as we have seen
        self._mode_told: bool | None = None  # what the server said of it then
        self.kept = False
        """Something that was sent has committed what was written before it, since the last ROLLBACK."""
        self.phase = OPENING
        self.settings: dict[bytes, bytes] | None = {}
        """What was set while it was opened, in its order, by what it sets; None: too much to be done again."""
        self.told_at_first: bool | None = None
        """Whether its first user got it in autocommit, as the server said."""
        self.mode_at_first: bool | None = None
        """The autocommit mode that was set by then."""
        self.level_changed = False
        """An isolation level of one checkout is to be taken back."""
        self.changed = self.moved = self.unsettable = False
        """What its user has sent changes the session; its current database; its role, which no reset takes back."""

    def command(self, number: int, text: Any) -> None:
        """Note a command that is about to be sent, whatever becomes of it."""
        still_ended = self.ended_at == self.count
        self.count += 1
        if number == QUERY:
            if isinstance(text, str):
                if text == "COMMIT" or text == "ROLLBACK":
                    return
                text = text.encode()
            # In a str a look for one character takes a tenth of what one for two bytes takes: those come first.
            seen = text.decode("latin-1")
            one = not (self._several and ";" in seen) and not (
                "*" in seen and "/*" in seen and _CONTENT_IS_EXECUTED.search(text)
            )
            whole = _WHOLE.match(text)
            if whole is None or not one:
                self._note_other(text, one)
            else:
                if still_ended and self.autocommit:
                    self.ended_at = self.count
                # A statement that reads may leave a lock or a variable behind.
                if (
                    whole.lastindex is None
                    and not self.changed
                    and ("(" in seen or ":" in seen or "@" in seen)
                    and _leaves_something(seen, text)
                ):
                    self._note_change(text)
        elif number == PING:
            if still_ended:
                self.ended_at = self.count
        else:
            self._note_command(number, text)

    def _note_command(self, number: int, text: Any) -> None:
        if number == PREPARE:
            sql = text.encode() if isinstance(text, str) else text
            if _WHOLE.match(sql) is None:
                self._several = True  # as far as we see: what it executes, it does not say
                self._note_other(sql, one=False)
        elif number != EXECUTE or self._several:
            self.autocommit = None
        if number == SET_OPTION:
            self._several = True
        elif number == INIT_DB:
            name = text.encode() if isinstance(text, str) else bytes(text)
            self._note_change(b"USE `" + name.replace(b"`", b"``") + b"`")
        elif number == CHANGE_USER:
            self._note_change(b"role")

    def _note_other(self, sql: bytes, one: bool) -> None:
        if b"autocommit" in sql.lower() or not (one and _KEEPS_AUTOCOMMIT.match(sql)):
            self.autocommit = None
            found = _SETS_AUTOCOMMIT.match(sql)
            if found:
                self._mode, self._mode_told = bool(found[1]), None
                self.kept = self.kept or self._mode
        self.kept = self.kept or _COMMITS.match(sql) is not None
        if _CHANGES_FIRST.match(sql) or (not one and _changes_within(sql)):
            self._note_change(sql)

    def _note_change(self, sql: bytes) -> None:
        if self.phase is USED:
            self.changed = True
            self.moved = self.moved or _MOVES.search(sql) is not None
            self.unsettable = self.unsettable or _TAKES_ROLE.search(sql) is not None
        elif self.phase is OPENING and self.settings is not None and not _SETS_AUTOCOMMIT.match(sql):
            # By what stands before its value, so that a `checkout` listener adds nothing with another one.
            found = _ONE_VALUE.match(sql)
            key = sql.partition(b"=")[0] if found is None else b" ".join(found[1].lower().split())
            self.settings[key] = sql
            if len(self.settings) > _MOST_SETTINGS:
                self.settings = None

    def ended(self, before: int) -> None:
        """Note that a COMMIT or ROLLBACK was answered, `before` which so many commands had been sent: if others were
        sent meanwhile, nobody knows what is open."""
        self.kept = False
        if self.count == before + 1:
            self.ended_at = self.count

    def autocommit_set(self, value: bool, before: int, told: bool) -> None:
        """Note that our SET autocommit was answered, `before` which so many commands had been sent, and that the server
        has `told` of its mode in the answer."""
        self._mode, self._mode_told = value, told
        if self.count == before + 1:
            self.autocommit = value

    def autocommits(self, told: bool) -> bool:
        """Return whether each statement commits itself, where the server's last answer has `told` so: as it was set
        last, unless the server has changed its word since then. What a server that lies says is always the same."""
        if self._mode is None:
            return told
        if self._mode_told is None:
            self._mode_told = told
        return self._mode if told is self._mode_told else told

    # The connection's user.

    def taken(self, driver: Any) -> None:
        """Note that from now on the connection's user sends; `driver` is the connection."""
        if self.told_at_first is None:
            self.told_at_first, self.mode_at_first = driver.told_autocommit, self._mode
        self.phase, self.kept = USED, False

    def is_changed(self, told: bool) -> bool:
        """Return whether the connection's user has changed the session, by a text or by the server's word."""
        return self.changed or (self.phase is USED and told is not self.told_at_first and not self.level_changed)

    def returned(self) -> None:
        """Note that the connection is as at first, and will be somebody else's."""
        self.changed = self.moved = self.unsettable = self.level_changed = self.kept = False
        self.phase = OPENING


def sets_autocommit_on(statement: str) -> bool:
    """Whether a statement, which begins with SET, commits what was written and goes on in autocommit."""
    if "autocommit" not in statement.lower():
        return False
    found = _SETS_AUTOCOMMIT.match(statement.encode())
    return found is not None and found[1] is not None


def _leaves_something(seen: str, text: bytes) -> bool:
    """Return whether a text that reads may change the session: by GET_LOCK(), or by setting a variable."""
    return (
        ("(" in seen and "get_lock" in seen.lower())
        or (":" in seen and ":=" in seen)
        or ("@" in seen and "into" in seen.lower() and _INTO_VARIABLE.search(text) is not None)
    )


def _changes_within(sql: bytes) -> bool:
    """Whether a statement after the first one of a text may change the session."""
    return _CHANGES_WITHIN.search(sql) is not None or (
        (b"--" in sql or b"#" in sql) and _CHANGES_IN_A_LINE.search(sql) is not None
    )
