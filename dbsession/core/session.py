"""The sessions: a Session that tells its scope when it is closed, and what became of its transaction."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Connection
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.orm import Session, SessionTransaction

# Private, and the only way to end a session without the sweep that close() is; see ManagedSession.close.
# tests/unit/test_private_names.py fails loudly when the name goes.
from sqlalchemy.orm.session import _SessionCloseState as _State

from dbsession.core import teardown
from dbsession.core.config import DatabaseConfig
from dbsession.core.connection_info import READ_TIMEOUT, SCOPE, KnownConnection
from dbsession.core.engine import Database
from dbsession.core.keys import refused_session
from dbsession.core.unsaved import report_dropped
from dbsession.core.writes import begin, committed_by_itself, wrote
from dbsession.errors import ConfigError

# The connections of the transactions under way in scopes. SQLAlchemy's own finalizer would roll one back wherever the
# collector happens to find it, in the Hub or in somebody else's request; pinned here it stays for the scope's end.
# Written by each session for its own connections, one set operation at a time.
_pinned: set[Connection] = set()

# Looked up once: Python 3.11 takes 40 times as long for an enum's member as for a name of the module.
_ACTIVE, _CLOSED, _CLOSE_IS_RESET = _State.ACTIVE, _State.CLOSED, _State.CLOSE_IS_RESET


class ManagedSession(Session):
    """A Session that lives in one scope, at most as long as it. Used after its end it raises
    `sqlalchemy.exc.InvalidRequestError` (close_resets_only=False) instead of checking a connection out again."""

    # Defaults of the class: a session that nothing is done with costs as little as SQLAlchemy's own.
    _scope: weakref.ref[Any] | None = None  # the Scope
    _database: Database
    _open_connections: tuple[Connection, ...] = ()  # those of the transaction under way
    _committed = False  # the transaction under way
    _given_up = False  # it could not be closed, perhaps because a connection was being opened for it
    _told_unfinished = False  # it was logged that another configuration has replaced its database
    _of: tuple[str, bool] | None = None  # when it is closed aside: its scope's label, and whether that has failed
    _in_loop = False  # it is asyncio's, where no driver's connection is of a class of ours
    _failing = False  # in asyncio: whoever closes it handles an exception
    _always_closes = False  # the user's class has a close() or an expunge_all() of its own

    def close(self) -> None:
        """Close the session and drop it from its scope, so that the proxy's next use gets a fresh one. If that fails,
        its connections are discarded before the error goes on."""
        self._leave_scope()
        if self._always_closes or self._open_connections or self.in_transaction() or len(self.identity_map):
            unsaved = not self._is_clean()
            for held in self._open_connections:
                unsaved = unsaved or wrote(held) is not None
            if unsaved:
                report_dropped(self, self._failing or sys.exception() is not None)
            self._close_or_discard(super().close)
        elif self._close_state is _ACTIVE:
            # Nothing to give back and no object to detach (an object comes in by a transaction, and a new one leaves
            # with it): all that SQLAlchemy's close() would change.
            self._close_state = _CLOSED

    def reset(self) -> None:
        """Reset the session as `Session.reset` does; if that fails, its connections are discarded before the error goes
        on."""
        self._close_or_discard(super().reset)

    def invalidate(self) -> None:
        """Close the session as `close()` does, and discard its connections."""
        self._leave_scope()
        self._close_or_discard(super().invalidate)

    def _leave_scope(self) -> None:
        if self._close_state is _CLOSE_IS_RESET:
            return  # it is as good as new afterwards
        scope = self._scope() if self._scope is not None else None
        if scope is not None:
            held = scope.sessions.get(self._database)
            if held is self or getattr(held, "sync_session", None) is self:  # the AsyncSession round it, in asyncio
                scope.sessions.pop(self._database, None)  # another thread may end the scope just now

    def _close_or_discard(self, close: Callable[[], None]) -> None:
        # SQLAlchemy forgets its connections before it closes them (SessionTransaction.close has no try/finally), so a
        # second close() would do nothing, and the pool's slots would be gone.
        connections = self._open_connections
        for held in () if self._in_loop else connections:
            driver = _known_connection(held)
            if driver is not None:  # the bound of teardown, for a close() of the user's own and where no timer runs
                held.info.setdefault(READ_TIMEOUT, driver.read_within_at_most(teardown.BOUND_S))
        try:
            close()
        except BaseException as error:
            kill = teardown.discard(connections)
            if kill is not None and isinstance(error, Exception):
                raise kill from error
            raise
        finally:
            _pinned.difference_update(connections)


def managed_class(name: str, base: Any) -> type[ManagedSession]:
    """Make the session class `base` of the database `name` one that lives in scopes.

    Raises:
        ConfigError: [DBS-CONFIG] it is no session class.
    """
    if not (isinstance(base, type) and issubclass(base, Session)):
        raise ConfigError(f"Database {name!r}: `class_` in `session` must be a subclass of sqlalchemy.orm.Session.")
    managed = base if issubclass(base, ManagedSession) else ManagedSession
    if not issubclass(managed, base):
        stock = base.close is Session.close and base.expunge_all is Session.expunge_all
        own = {"_always_closes": not stock}
        managed = type(f"Managed{base.__name__}", (ManagedSession, base), own)
    return managed


def check_arguments(config: DatabaseConfig, factory: Callable[[], Any]) -> None:
    """Open and close one session of `factory`, to see that its class takes what `session` says.

    Raises:
        ConfigError: [DBS-CONFIG] it refuses an argument.
    """
    if config.session:
        try:
            session = factory()
            getattr(session, "sync_session", session).close()
        except (TypeError, ValueError, LookupError) as error:
            raise refused_session(config.name, error) from error


def _connection_in_use(session: ManagedSession, _: SessionTransaction, connection: Connection) -> None:
    if session._given_up:
        teardown.discard((connection,))  # else it would stay out until the session is garbage collected
        raise InvalidRequestError(
            f"Database {session._database.name!r}: this session's unit of work is over, and it was given up. Another "
            "task or thread was using it: each has to take one of its own by get_dbsession()."
        )
    if connection not in session._open_connections:
        session._open_connections += (connection,)
        session._committed = False
        begin(connection)  # it may be the user's own, from an earlier transaction
        scope = session._scope() if session._scope is not None else None
        if scope is not None:
            _pinned.add(connection)
            connection.info[SCOPE] = session._scope
            if scope.read_timeout_s is not None:
                driver = _known_connection(connection)
                if driver is not None:
                    before = driver.read_within(scope.read_timeout_s)
                    connection.info.setdefault(READ_TIMEOUT, before)


def _known_connection(connection: Connection) -> KnownConnection | None:
    if connection.closed or connection.invalidated:
        return None
    driver = connection.connection.dbapi_connection
    return driver if isinstance(driver, KnownConnection) else None


def _committed(session: ManagedSession) -> None:
    # Before the connection goes back, where a kill may land: that it was committed is known from here on.
    if not session.in_nested_transaction():
        session._committed = True
        _note_outcome(session, "committed")


def _note_outcome(session: ManagedSession, outcome: str) -> None:
    scope = session._scope() if session._scope is not None else None
    if scope is None or not session._open_connections:
        return
    lasting = False
    level = session._database.config.isolation_level
    for held in session._open_connections:
        written = wrote(held) is not None
        if not written and (held.get_execution_options().get("isolation_level") or level) == "AUTOCOMMIT":
            return
        if outcome == "rolled back" and committed_by_itself(held):
            return
        lasting = lasting or written
    if scope.outcomes:
        scope.note_outcome(session._database.name, outcome, lasting)
    else:  # as note_outcome() does for a scope's first transaction, without its call
        scope.outcomes = {session._database.name: outcome}


def _connections_returned(session: ManagedSession, transaction: SessionTransaction) -> None:
    if transaction.parent is None:
        if not session._committed:
            _note_outcome(session, "rolled back")
        for held in () if session._in_loop else session._open_connections:
            driver = _known_connection(held)
            if driver is not None and READ_TIMEOUT in held.info:  # the user's own, which goes on
                driver.read_within(held.info.pop(READ_TIMEOUT))
        _pinned.difference_update(session._open_connections)
        session._open_connections = ()


# Of the class itself, once: SQLAlchemy never forgets the listeners of a class, and asyncio makes classes for each loop.
event.listen(ManagedSession, "after_begin", _connection_in_use)
event.listen(ManagedSession, "after_commit", _committed)
event.listen(ManagedSession, "after_transaction_end", _connections_returned)
