"""Every exception of the package. Each text is a sentence or two (what happened, with which values, what to do)
and ends in a stable code, so that it can be searched for whatever the wording becomes."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class DBSessionError(Exception):
    """Base of every error raised by dbsession. `code` is stable across releases."""

    code = "DBS-ERROR"

    def __init__(self, message: str) -> None:
        super().__init__(f"{message} [{self.code}]")


class ConfigError(DBSessionError, ValueError):
    """The configuration cannot be used. Names the database, the key and the fix; nothing was applied."""

    code = "DBS-CONFIG"


class UnknownDatabase(DBSessionError, LookupError):
    """No database of that name is configured. Lists the names that are."""

    code = "DBS-UNKNOWN"

    @classmethod
    def named(cls, name: object, known: Iterable[str], origin: str) -> UnknownDatabase:
        """The error for `name`, where `origin` says where `known` comes from."""
        names = sorted(known)
        text = f"No database {name!r} is configured. {origin}: {', '.join(map(repr, names)) or 'none'}."
        close = get_close_matches(str(name), names, n=1)
        if close:
            text += f" Did you mean {close[0]!r}?"
        return cls(text)


class UsedInHub(DBSessionError, RuntimeError):
    """A session was used in the gevent Hub itself, where nothing may wait."""

    code = "DBS-HUB"


class ScopeRequired(DBSessionError, RuntimeError):
    """A session was used where no end can be seen that would close it: open a scope around the work."""

    code = "DBS-SCOPE-REQUIRED"


class ScopeEnded(DBSessionError, RuntimeError):
    """A session was asked for in a unit of work that is already over."""

    code = "DBS-SCOPE-ENDED"


class UnsavedWork(DBSessionError, RuntimeError):
    """`release_dbsession()` would have thrown away work that was not committed. Nothing was changed."""

    code = "DBS-UNSAVED"


def describe(error: BaseException) -> str:
    """`error` for a log line: its type and, where the driver gave one, its number.

    Never its text: that of a database error carries statements and parameter values.
    """
    number = next(iter(getattr(getattr(error, "orig", error), "args", ())), None)
    name = type(error).__name__
    return f"{name} ({number})" if isinstance(number, int) else name
