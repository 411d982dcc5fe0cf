"""The guard: a Session is one unit of work's own, and who else uses it is named."""

from __future__ import annotations

import functools
import logging
import sys
import weakref
from collections.abc import Callable
from typing import Any

from dbsession.core.pool import callsites
from dbsession.errors import ForeignSession
from dbsession.green import ident, scope

logger = logging.getLogger("dbsession.guard")

# What works with the session or its connection. Not close() and what is akin to it: our teardown comes from anywhere.
GUARDED = (
    *("add", "add_all", "begin", "begin_nested", "bulk_insert_mappings", "bulk_save_objects", "bulk_update_mappings"),
    *("commit", "connection", "delete", "delete_all", "execute", "expire", "expire_all", "expunge", "flush", "get"),
    *("get_one", "merge", "merge_all", "prepare", "query", "refresh", "rollback", "scalar", "scalars"),
)


class Opened:
    """Who opened a session, and where. Lives as long as the session; keeps nobody alive."""

    __slots__ = ("_greenlet", "_opened_at", "_thread", "told")

    def __init__(self) -> None:
        self._greenlet = weakref.ref(ident.current())
        self._thread = ident.thread()
        self._opened_at = callsites.users(callsites.outwards(sys._getframe(1)), 1)
        self.told = False

    def __str__(self) -> str:
        (site,) = callsites.written(self._opened_at) or (callsites.UNKNOWN,)
        return f"{ident.name_of(self._greenlet(), self._thread)} at {site}"


def guarded(session_class: type[Any], database: str, mode: str) -> type[Any]:
    """Return `session_class` with its sessions guarded; `mode` is "warn" or "raise"."""
    methods = {name: getattr(session_class, name, None) for name in GUARDED}
    checked = {name: _checked(method, database, mode) for name, method in methods.items() if method is not None}
    return type(session_class.__name__, (session_class,), checked)


def _checked(method: Callable[..., Any], database: str, mode: str) -> Callable[..., Any]:
    @functools.wraps(method)
    def checked(session: Any, *args: Any, **kwargs: Any) -> Any:
        owner = session._scope() if session._scope is not None else None
        # Anywhere in the stack: the session of an outer scope may be used inside an inner one. That of a scope that has
        # ended is closed, and says so itself.
        if owner is not None and not owner.ended and owner not in scope.stack_here():
            _found(session, owner, method.__name__, database, mode)
        return method(session, *args, **kwargs)

    return checked


def _found(session: Any, owner: scope.Scope, verb: str, database: str, mode: str) -> None:
    opened: Opened = session._opened
    if mode == "warn" and opened.told:
        return
    opened.told = True
    foreign = ForeignSession(
        f"Database {database!r}: the session of {owner.label}, opened by {opened}, was used ({verb}) by {Opened()}. "
        "Two who use one session get each other's rows and transactions. Take the session with get_dbsession() in the "
        "greenlet or thread that uses it, and hand over keys or values in place of its objects."
    )
    if mode == "raise":
        raise foreign
    logger.warning("A session is used by two: %s", foreign)
