"""A database's sessions: their sessionmaker, and the scoped_session whose registry is the current scope."""

from __future__ import annotations

import logging
import weakref
from typing import TYPE_CHECKING, Any, NoReturn

from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from dbsession.core import fork
from dbsession.core.config import DatabaseConfig
from dbsession.core.engine import Database
from dbsession.core.fork import KNOWN
from dbsession.core.registry import BaseScopeRegistry, report_unfinished
from dbsession.core.session import check_arguments, managed_class
from dbsession.core.unsaved import must_be_finished
from dbsession.errors import ScopeEnded
from dbsession.green import hub, ident, scope, teardown
from dbsession.green.guard import Opened, guarded

logger = logging.getLogger("dbsession.manager")


class SessionFactory(sessionmaker[Any]):
    """A sessionmaker whose call without arguments, which every first use in a scope makes, copies none."""

    def __call__(self, **arguments: Any) -> Any:
        return super().__call__(**arguments) if arguments else self.class_(**self.kw)


def make_factory(config: DatabaseConfig, engine: Engine) -> sessionmaker[Any]:
    """The sessionmaker of one database, bound to its engine.

    Raises:
        ConfigError: [DBS-CONFIG] an argument in `session` that the session class refuses.
    """
    arguments = {"autoflush": False, "close_resets_only": False, **config.session}
    managed: type[Any] = managed_class(config.name, arguments.pop("class_", Session))
    if config.guard != "off":
        managed = guarded(managed, config.name, config.guard)
    factory = SessionFactory(bind=engine, class_=managed, **arguments)
    check_arguments(config, factory)
    return factory


class ScopeRegistry(BaseScopeRegistry):
    """Finds and opens the session of one database in the caller's current scope. Lives as long as its proxy."""

    __slots__ = ()

    def __call__(self) -> Any:
        """The current scope's session. No I/O; the first use of a name may switch greenlets."""
        if not KNOWN[0]:
            fork.found_out()
        try:  # as scope.current(), without its call
            current = ident.current()._dbsession_scopes[-1]
        except (AttributeError, IndexError):
            return self.open(None)
        session = current.sessions.get(self.database)
        return self.open(current) if session is None else session

    def _current(self) -> scope.Scope | None:
        return scope.current()

    def set(self, obj: Any) -> None:
        """Make `obj`, a session of `session_factory`, the current scope's; one that was there before is closed."""
        current = scope.current_or_implicit()
        database = self._current_database()
        earlier = self.take()
        if earlier is not None:
            teardown.close_all(dict([earlier]), current.label)
        self._store(current, database, obj)

    def open(self, current: scope.Scope | None) -> Any:
        """The session of the current scope, which may be `current`; opened here unless it has one."""
        if current is None or current.ended:
            current = scope.current_or_implicit()
        earlier = self._find(current) if current.sessions else None
        if earlier is not None:
            # Opened under an earlier configuration, perhaps, or before a fork or a dispose(). Unsaved work is finished
            # where it began; half of it on each of two databases would be no transaction.
            session = current.sessions[earlier]
            if not earlier.inherited:
                why = must_be_finished(session, current)
                if why and earlier.retired:
                    report_unfinished(logger, earlier, session, current.label, why)
                if why or earlier is self._current_database() or self._goes_on(current, earlier, session):
                    return session
            teardown.close_all({earlier: current.sessions.pop(earlier)}, current.label)
        database = self._current_database()
        return self._store(current, database, database.factory())

    def _goes_on(self, current: scope.Scope, earlier: Database, session: Any) -> bool:
        """End what the session has read after a dispose(), and keep it for the successor of its database. Returns
        whether that is so. May switch greenlets."""
        database = self._current_database()
        if database.engine is not earlier.engine:
            return False
        try:
            session.rollback()  # expires every object, and keeps it attached
        except Exception:
            return False  # it is closed instead, whatever it takes
        if current.sessions.pop(earlier, None) is not session:
            return False
        session._database = database
        current.sessions[database] = session
        return True

    def _store(self, current: scope.Scope, database: Database, session: Any) -> Any:
        session._database = database
        session._scope = weakref.ref(current)  # last: a snapshot() looks at what has one
        if database.config.guard != "off":
            session._opened = Opened()
        if current.owner_hub is None:
            current.owner_hub = hub.here()
        current.sessions[database] = session
        if current.ended:  # by another thread, since we looked
            current.clear()
            raise ScopeEnded(f"{current.label} was ended by another thread while a session was opened in it.")
        return session

    def _current_database(self) -> Database:
        while True:
            database: Database = self.database or self._owner.database(self._name)
            self.database = database
            # configure() in another thread marks the old databases first and resets the registries then: whichever
            # way the two interleave, an old one is seen either here or there.
            if not (database.retired or database.inherited):
                return database
            self.database = None


class ScopedSession(scoped_session[Any]):
    """The `scoped_session` of one name. Lives as long as its manager; may be kept at module level and used from any
    greenlet or thread: every use goes to the session of the caller's current scope."""

    registry: ScopeRegistry

    def __init__(self, owner: Any, name: str) -> None:
        self.name = name
        self.registry = ScopeRegistry(owner, name)

    def __call__(self, **kw: Any) -> Any:
        """The current scope's session, opened if need be; `kw` as for SQLAlchemy's."""
        if kw:
            return super().__call__(**kw)
        if not KNOWN[0]:
            fork.found_out()
        try:  # as the registry's own, without the call
            current = ident.current()._dbsession_scopes[-1]
        except (AttributeError, IndexError):
            return self.registry.open(None)
        session = current.sessions.get(self.registry.database)
        return self.registry.open(current) if session is None else session

    if not TYPE_CHECKING:  # which sees that it is no context manager

        def __enter__(self) -> NoReturn:
            raise TypeError(
                "get_dbsession() gives the session of the current scope, which `with` neither opens nor ends. Write "
                "`with session_scope():` round the unit of work, use get_dbsession() in it, and call its commit(); or "
                "`with get_dbsession().begin():`, which commits at the end."
            )

        def __exit__(self, *_: object) -> None: ...

    @property
    def session_factory(self) -> sessionmaker[Any]:  # type: ignore[override]  # an attribute there, followed here
        """The sessionmaker of the database as it is configured now."""
        factory: sessionmaker[Any] = self.registry._current_database().factory
        return factory

    def remove(self) -> None:
        """Close the current scope's session of this name, if there is one; the next use gets a fresh one.

        As `clear_dbsession()`: a session that fails to close is discarded and logged; only a kill is raised.
        """
        taken = self.registry.take()
        if taken is not None:
            teardown.close_all(dict([taken]), f"a remove() of {self.name!r}")

    def __repr__(self) -> str:
        return f"<ScopedSession {self.name!r}>"
