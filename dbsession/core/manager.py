"""What the SessionManagers of both halves share: their proxies, and which sessions of a scope are theirs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

from dbsession.core.engine import Database
from dbsession.core.scope import BaseScope
from dbsession.core.teardown import Sessions
from dbsession.core.unsaved import must_be_finished, refuse_unsaved
from dbsession.errors import UnknownDatabase, describe, is_url

Proxy = TypeVar("Proxy", bound=Any)


class BaseSessionManager(Generic[Proxy]):
    """Named databases and their scoped sessions, the proxies: one per name, for ever.

    Who writes: `_proxies` grows by `setdefault`, one step; `ready` is replaced in one step by configure(), and grows
    by `_proxy()`, which may write to the one that was replaced meanwhile.
    """

    def __init__(self, proxy: Callable[[Any, str], Proxy]) -> None:
        self._new_proxy = proxy
        self._proxies: dict[str, Proxy] = {}
        self.ready: dict[str, Proxy] = {}
        """The proxies, of `_proxies`, whose names were found right under the present configuration."""

    def get(self, name: str = "default") -> Proxy:
        """Return the scoped session of `name`; see the half's `get_dbsession`."""
        try:
            return self.ready[name]
        except (KeyError, TypeError):
            pass  # and not from here: a KeyError shows the name, which may be a URL
        ready = self.ready
        self._look_up(name)
        return self._proxy(ready, name)

    def _look_up(self, name: str) -> None:
        """Raise UnknownDatabase for a name that the present configuration does not have, if there is one."""
        raise NotImplementedError

    def _proxy(self, ready: dict[str, Proxy], name: str) -> Proxy:
        """The proxy of `name`, which was found right; `ready` is the dict of the configuration that knew it.

        Raises UnknownDatabase for what is no name, which nothing has looked up before configure().
        """
        if not isinstance(name, str) or not name or is_url(name):
            raise UnknownDatabase.named(name, (), "A name is a text, and given before configure() were")
        proxy = self._proxies.get(name) or self._proxies.setdefault(name, self._new_proxy(self, name))
        ready[name] = proxy
        return proxy

    def forget(self) -> None:
        """Resolve every name anew at its next use: after a configure(), after a fork. From any thread; cannot fail."""
        for proxy in list(self._proxies.values()):
            proxy.registry.forget()

    def _only_read(self, scopes: Iterable[BaseScope]) -> list[tuple[BaseScope, Database]]:
        """List the sessions, by scope and database, whose transactions on a database that is no more in force have
        only read, so that they may be ended."""
        return [
            (scope, database)
            for scope in list(scopes)
            for database, session in list(scope.sessions.items())
            if database.owner is self and not self._in_force(database) and session.in_transaction()
            if not must_be_finished(session, scope)
        ]

    def _in_force(self, database: Any) -> bool:
        """Return whether a database is of the present configuration, and was not disposed of."""
        return not database.retired

    def _take(self, current: BaseScope) -> Sessions:
        """Take this manager's sessions out of the scope; they are then the caller's to close."""
        mine = [database for database in list(current.sessions) if database.owner is self]
        return {database: current.sessions.pop(database) for database in mine}

    def _to_release(self, current: BaseScope | None, names: Iterable[str]) -> list[tuple[Database, Any]]:
        """List the sessions of the scope whose transactions `release()` ends. Raises UnsavedWork."""
        found = [
            (database, session)
            for database, session in (current.sessions.items() if current else ())
            if database.owner is self and (not names or database.name in names) and session.in_transaction()
        ]
        for database, session in found:
            refuse_unsaved(database.name, getattr(session, "sync_session", session))
        return found


def report_release(logger: logging.Logger, database: Database, error: Exception) -> None:
    """Log that the rollback failed which was to give a connection back."""
    logger.warning(
        "Database %r: the transaction ended with %s when its connection was released; the connection was discarded.",
        database.name,
        describe(error),
    )
