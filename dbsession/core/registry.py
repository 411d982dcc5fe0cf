"""The registry of a scoped session: the session of one database in the caller's current scope. Both halves' base."""

from __future__ import annotations

import logging
from typing import Any

from sqlalchemy.util import ScopedRegistry

from dbsession.core.engine import Database
from dbsession.core.scope import BaseScope


def report_unfinished(logger: logging.Logger, database: Database, session: Any, label: str, why: str) -> None:
    """Log, once a session, that its transaction goes on on a database that another configuration has replaced."""
    session = getattr(session, "sync_session", session)
    if not database.succeeded and not session._told_unfinished:
        session._told_unfinished = True
        logger.warning(
            "Database %r: configure() was called in the middle of a transaction of %s (%s). It goes on where it began, "
            "on the earlier database. Call commit(), rollback() or clear_dbsession() before configure().",
            database.name,
            label,
            why,
        )


class BaseScopeRegistry(ScopedRegistry[Any]):
    """Finds the session of one database in the current scope. Lives as long as its proxy."""

    __slots__ = ("_name", "_owner", "database")

    def __init__(self, owner: Any, name: str) -> None:
        self._owner = owner
        """The SessionManager."""
        self._name = name
        self.database: Any = None
        """The key of this name's sessions, as it was resolved last. Written in one step by whoever resolves it; emptied
        by `forget()`. In asyncio another loop finds nothing under it, and looks for its own."""

    def forget(self) -> None:
        """Resolve the name anew at the next use: after configure(), after a fork."""
        self.database = None

    def _current(self) -> BaseScope | None:
        """The caller's current scope, or None when it has none."""
        raise NotImplementedError

    def _find(self, current: BaseScope | None) -> Any:
        """The database of this name that has a session in `current`, or None: another than `database` where that was
        resolved under an earlier configuration, before a fork, or in another loop."""
        if current is not None:
            for database in list(current.sessions):
                if database.name == self._name and database.owner is self._owner:
                    return database
        return None

    def has(self) -> bool:
        return self._find(self._current()) is not None

    def clear(self) -> None:
        self.take()

    def take(self) -> tuple[Database, Any] | None:
        """Take the session out of the current scope, if it is there; it is then the caller's to close."""
        return self.take_from(self._current())

    def take_from(self, current: BaseScope | None) -> tuple[Database, Any] | None:
        """Take the session out of the scope `current`, if it is there; it is then the caller's to close."""
        database = self._find(current)
        if current is None or database is None:
            return None
        session = current.sessions.pop(database, None)
        return None if session is None else (database, session)
