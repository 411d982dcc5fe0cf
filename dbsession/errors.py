"""Every exception of the package. Each text is a sentence or two (what happened, with which values, what to do)
and ends in a stable code, so that it can be searched for whatever the wording becomes."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any

from sqlalchemy import exc

DISTRIBUTION = "gevent-dbsession"
"""What is installed. On the package index, `dbsession` is another project."""


def to_install(extra: str) -> str:
    """Return the command that installs one of our extras, for an error's text."""
    return f"pip install '{DISTRIBUTION}[{extra}]'"


class DBSessionError(Exception):
    """Base of every error raised by dbsession. `code` is stable across releases."""

    code = "DBS-ERROR"

    def __init__(self, message: str) -> None:
        code = f"[{self.code}]"
        super().__init__(message if message.endswith(code) else f"{message} {code}")  # unpickled, it has it already

    def __str__(self) -> str:
        return str(self.args[0])  # without what SQLAlchemy's errors add to theirs


class ConfigError(DBSessionError, ValueError):
    """The configuration cannot be used. Names the database, the key and the fix; nothing was applied."""

    code = "DBS-CONFIG"


class UnknownDatabase(DBSessionError, LookupError):
    """No database of that name is configured. Lists the names that are."""

    code = "DBS-UNKNOWN"

    @classmethod
    def named(cls, name: object, known: Iterable[str], origin: str) -> UnknownDatabase:
        """The error for `name`, where `origin` says where `known` comes from."""
        names = sorted(masked(str(each)) for each in known)
        what = repr(masked(name)) if isinstance(name, str) else f"by a {type(name).__qualname__} as its name"
        text = f"No database {what} is configured. {origin}: {', '.join(map(repr, names)) or 'none'}."
        if is_url(name):
            return cls(f"{text} A URL is no name: give configure() {{'default': url}}, and ask for 'default'.")
        return cls(text + did_you_mean(name, names))


class UsedInHub(DBSessionError, RuntimeError):
    """A session was used in the gevent Hub itself, where nothing may wait."""

    code = "DBS-HUB"


class ScopeRequired(DBSessionError, RuntimeError):
    """A session was used where no end can be seen that would close it: open a scope around the work."""

    code = "DBS-SCOPE-REQUIRED"


class ScopeEnded(DBSessionError, RuntimeError):
    """A session was asked for in a unit of work that is already over."""

    code = "DBS-SCOPE-ENDED"


class LoopRequired(DBSessionError, RuntimeError):
    """No event loop runs here, or the one given is not in a state in which the work can be done."""

    code = "DBS-LOOP"


class RecursiveUse(DBSessionError, RuntimeError):
    """Something was asked for by its own making or closing, which could only wait for itself."""

    code = "DBS-RECURSION"


class UnusableArgument(DBSessionError, TypeError):
    """An argument that cannot be told from others, or that the function does not take."""

    code = "DBS-ARGUMENT"


class ExitUnfinished(DBSessionError, TimeoutError):
    """The exit of a resource did not end within its time, or was cancelled before its end."""

    code = "DBS-EXIT-UNFINISHED"


class ForeignSession(DBSessionError, RuntimeError):
    """A session was used by another greenlet or thread than the one whose unit of work it is of (`guard="raise"`)."""

    code = "DBS-FOREIGN"


class UsedByTwo(DBSessionError, exc.InvalidRequestError, exc.DontWrapMixin):
    """Two tasks, greenlets or threads used one connection at once, mostly by one session. Nothing was sent for the one
    that gets this. The other one goes on, but where this one was to end their transaction: then it has lost its
    connection."""

    code = "DBS-TWO"

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what} was begun on a connection on which another one is under way: two tasks, greenlets or threads use "
            "one session at once. Let each take its own, by get_dbsession() or a session_scope() inside it, or do one "
            "after the other."
        )
        self._what = what

    def __reduce__(self) -> Any:
        return UsedByTwo, (self._what,)


class UnsavedWork(DBSessionError, RuntimeError):
    """`release_dbsession()` would have thrown away work that was not committed. Nothing was changed."""

    code = "DBS-UNSAVED"


class ResultCut(DBSessionError, exc.ResourceClosedError):
    """A result was read on after something had ended it before its last row: a commit, a rollback, the end of its
    session or scope, another statement on its connection, a kill or a lost connection. The text says what."""

    code = "DBS-RESULT-CUT"

    @classmethod
    def because(cls, why: str) -> ResultCut:
        """The error for a result that `why` has ended."""
        return cls(
            f"This result has more rows, which are lost: {why}. Read it to its end before that, or fetch all of it at "
            "once, or do the other work in a session_scope() of its own."
        )


class RollbackRequired(DBSessionError, exc.PendingRollbackError):
    """The transaction has lost a part of its work and refuses to do the rest. On MySQL and MariaDB to a deadlock, or to
    a lock timeout with innodb_rollback_on_timeout=ON: roll back to its beginning (a savepoint is not enough). On
    PostgreSQL to any error of the server's, where a ROLLBACK TO SAVEPOINT is enough; a COMMIT would be a ROLLBACK."""

    code = "DBS-ROLLBACK"


class CommitOutcomeUnknown(exc.OperationalError, DBSessionError):
    """The connection was lost, killed or timed out at COMMIT: the transaction may have been committed, or not.

    Raised where SQLAlchemy would raise its own OperationalError; `orig` is the driver's error as there. Nothing of
    ours tries the work again: look in the database first.
    """

    code = "DBS-COMMIT-UNKNOWN"
    __str__ = DBSessionError.__str__

    def __init__(self, database: str, orig: BaseException, connection_invalidated: bool = False) -> None:
        super().__init__(None, None, orig, connection_invalidated=connection_invalidated)
        self._arguments = (database, orig, connection_invalidated)
        self.database = database
        self.args = (f"Database {database!r}: {MAYBE_COMMITTED} ({describe(orig)}). [{self.code}]",)

    def __reduce__(self) -> Any:
        return CommitOutcomeUnknown, self._arguments


class PoolTimeout(DBSessionError, exc.TimeoutError):
    """No connection came free in time. Says who holds those there are, longest first.

    Raised where SQLAlchemy would raise its own TimeoutError. `holders` has a `Holder` for each connection in use,
    of which the text shows the first 10; where there are more, those who time out together get the same tuple.
    `database` is None for a pool that no SessionManager made. Where the server refuses as many connections as the pool
    may have, its error stands in the text.
    """

    code = "DBS-POOL-TIMEOUT"

    def __init__(
        self,
        database: str | None,
        size: int,
        overflow: int,
        in_use: int,
        waiting: int,
        waited_s: float,
        holders: Sequence[Any] = (),
        refusal: str = "",
    ) -> None:
        self._arguments = (database, size, overflow, in_use, waiting, waited_s, tuple(holders), refusal)
        self.database = database
        self.size = size
        self.in_use = in_use
        self.waiting = waiting
        self.waited_s = waited_s
        self.holders = tuple(holders)
        whose = "A pool" if database is None else f"Database {database!r}"
        reached = f"QueuePool limit of size {size} overflow {overflow} reached"
        if refusal:
            reached = f"the server refuses more connections ({refusal})"
        waited = f"connection timed out after {waited_s:.2f} s with {in_use} in use and {waiting} others waiting."
        lines = [f"{whose}: {reached}, {waited}"]
        if holders:
            lines[0] += " Held, longest first:"
            lines += [f"  {holder}" for holder in holders[:SHOWN_HOLDERS]]
            if len(holders) > SHOWN_HOLDERS:
                lines.append(f"  and {len(holders) - SHOWN_HOLDERS} more")
        others = in_use - len(holders)
        if others > 0 and database is not None:
            lines.append(f"  {others} more being opened at this moment")
        remedy = "what the server allows (`dbsession check` adds up)" if refusal else "`pool_size`"
        lines.append(
            "Give connections back earlier (commit, release_dbsession(), a shorter session_scope()), or raise "
            f"{remedy} or `pool_timeout` in `options`. [{self.code}]"
        )
        super().__init__("\n".join(lines))

    def __reduce__(self) -> Any:
        return PoolTimeout, self._arguments


SHOWN_HOLDERS = 10

MAYBE_COMMITTED = (
    "COMMIT was under way and its answer did not come, so the transaction may have been committed or not: look in the "
    "database before doing the work again"
)
"""What an exception at COMMIT, whatever it is, says in its text or in a note."""


def plain(value: object) -> str:
    """Return the text as one line of printable characters; others, such as those that forge a log line or command a
    terminal, as escapes."""
    text = str(value)
    return text if text.isprintable() else "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


# Greedy, since a password that nobody has encoded may have any character in it.
_SECRETS = (
    (re.compile(r"(:(?://)?).*@", re.DOTALL), r"\1***@"),  # what a URL has before its host
    (re.compile(r"(://[^/:@]*:)(?!\d{1,5}(?!\d)).*", re.DOTALL), r"\1***"),  # a URL that ends before its host
    # In a URL's query, in a connection string.
    (
        re.compile(r"((?:pass|pwd|secret|token|credential|(?:ssl|api|private)_?key)\w*\s*=).*", re.DOTALL | re.I),
        r"\1***",
    ),
)


def masked(text: str) -> str:
    """Return `text` for whoever may read it: without what may be a password, if it is a URL or a connection string, or
    has one in it."""
    for pattern, instead in _SECRETS:
        text = pattern.sub(instead, text)
    return text


def is_url(name: object) -> bool:
    """Return whether what was given as a name is a URL or a connection string."""
    return isinstance(name, str) and ("://" in name or masked(name) != name)


def did_you_mean(word: object, known: Iterable[str], quote: str = "'", likeness: float = 0.6) -> str:
    """The question, with a space before it, whether `word` is a misspelling of one of `known`; "" if it is like none.
    Capitals do not count; `likeness` is difflib's, from 0 to 1."""
    names = {each.casefold(): each for each in known}
    close = get_close_matches(str(word).casefold(), list(names), n=1, cutoff=likeness)
    return f" Did you mean {quote}{names[close[0]]}{quote}?" if close else ""


def raised_at(error: BaseException) -> str:
    """Return `file:line` of where an error was raised."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{place.filename}:{place.lineno}"


def describe(error: BaseException, number: int | str | None = None) -> str:
    """Return `error` for a log line: its type and its `number`, else, where the driver gave one, the driver's.

    Never its text: that of a database error carries statements and parameter values.
    """
    number, name = number or driver_number(error), type(error).__name__
    return name if number is None else f"{name} ({number})"


def driver_number(error: BaseException) -> int | str | None:
    """The number that a driver gave this error, or the one that SQLAlchemy wrapped; PostgreSQL's give the SQLSTATE."""
    raised = getattr(error, "orig", None) or error
    number = next(iter(getattr(raised, "args", ())), None)
    if not isinstance(number, int):
        number = getattr(raised, "sqlstate", None) or getattr(raised, "pgcode", None)
    return number if isinstance(number, (int, str)) else None
