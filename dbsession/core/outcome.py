"""What becomes of a transaction: doomed by a deadlock, committed, rolled back, or nobody knows.

SQLAlchemy leaves a session usable after a deadlock, though the server has thrown away its work; and an error at COMMIT
looks like any other. Both end here. An engine's events tell of every transaction on it, whether a Session or a
Connection began it.

The ends of transactions are seen in the dialect's methods for them, and not by ConnectionEvents: a single listener for
one of those makes SQLAlchemy join two dispatchers, event by event, for each Connection (30 us a request).
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import Any

from sqlalchemy.engine import Connection, ExceptionContext, ExecutionContext
from sqlalchemy.exc import DisconnectionError

from dbsession.core import backends, fork, writes
from dbsession.core.backends.base import Backend, Verdict
from dbsession.core.connection_info import (
    CHECKOUT,
    COMMITTING,
    DETACHED_USER,
    DOOMED,
    SCOPE,
    UNTOLD,
    KnownConnection,
    nobody,
)
from dbsession.core.fork import KNOWN
from dbsession.errors import MAYBE_COMMITTED, CommitOutcomeUnknown, RollbackRequired, UsedByTwo, describe, driver_number

_TWO_PHASE = ("XA COMMIT", "COMMIT PREPARED")


def remembered(error: BaseException) -> Any:
    """Return a copy of a driver's error, whose traceback would keep everything alive; with its number, which only some
    drivers have among the arguments."""
    copy: Any = type(error)(*error.args)
    number = driver_number(error)
    if driver_number(copy) != number:
        copy.sqlstate = number
    return copy


def is_autocommit(connection: Connection, backend: Backend) -> bool:
    """Return whether each statement on a connection is a transaction of its own."""
    known = backend.autocommits(connection.connection)
    if known is None:
        level = connection.get_execution_options().get("isolation_level") or backend.config.isolation_level
        known = level == "AUTOCOMMIT"
    return known


class TransactionWatch:
    """Watches one engine's transactions. Lives as long as the engine; `interceptors.install` finds its methods.

    A transaction's state is kept in its connection's `info`, which the greenlet that uses the connection writes.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._rules: Any = backends.kind_of(backend.config.url)
        self._config = backend.config
        self._name = backend.config.name
        self._ever_doomed = False  # so that no statement looks for what nearly never is there
        if backend.in_process:
            self.on_handle_error = None  # type: ignore[assignment]  # not listened to

    # Before each statement. By events, since a listener of the user's may execute it in the dialect's place.

    def on_do_execute(self, cursor: Any, statement: str, parameters: Any, context: ExecutionContext) -> bool:
        """Refuse what must not be sent, and remember that something was written, so that `release_dbsession()` does not
        throw it away. True: the statement is not to be executed any more."""
        connection = context.root_connection
        if self._ever_doomed and DOOMED in connection.info and self._is_doomed(connection.connection):
            if self._backend.savepoints_hold and statement[:8].upper() == "ROLLBACK":
                connection.info.pop(DOOMED)
            elif statement.startswith("ROLLBACK TO SAVEPOINT"):
                # Of a block that the error goes through: its savepoint may be gone, and all is rolled back anyway.
                cursor.execute(self._backend.no_op)
                return True
            self._refuse_if_doomed(connection.info)
        kind = writes.kind_of(statement[:200], self._rules)
        if not kind and ";" in statement:  # several in one text, perhaps: what its first word says is not all
            kind = writes.WITH
        if kind:
            # In autocommit it is committed already.
            writes.note(connection, statement, kind, is_autocommit(connection, self._backend))
        return False

    on_do_executemany = on_do_execute

    def on_do_execute_no_params(self, cursor: Any, statement: str, context: ExecutionContext) -> bool:
        """Refuse or remember a statement without parameters; see `on_do_execute`."""
        return self.on_do_execute(cursor, statement, None, context)

    def _is_doomed(self, connection: Any) -> bool:
        """Return whether the transaction that was to go on must not; may ask the server. `connection` is the proxy."""
        cause = connection.info.get(DOOMED)
        if cause is not None and not hasattr(cause, UNTOLD) and self._backend.undid_statement_only(cause, connection):
            connection.info.pop(DOOMED, None)
            cause = None
        return cause is not None

    def _refuse_if_doomed(self, info: dict[Any, Any]) -> None:
        cause = info.get(DOOMED)
        if cause is not None:
            raise RollbackRequired(
                f"Database {self._name!r}: {describe(cause)} has undone a part of this transaction at the server, so "
                f"the rest is refused. Roll back {self._backend.has_to_go} and do it again; run_in_transaction() does "
                "that, where another try may help."
            ) from cause

    # The ends of transactions.

    def around_do_commit(self, inner: Callable[[Any], None]) -> Callable[[Any], None]:
        if self._backend.in_process:
            return inner

        def do_commit(dbapi_connection: Any) -> None:
            if not KNOWN[0]:
                fork.found_out()
            info = dbapi_connection.info
            if DOOMED in info and self._is_doomed(dbapi_connection):
                self._refuse_commit(info, self._roll_back, dbapi_connection)
            info[COMMITTING] = True
            note = (dbapi_connection.record_info or {}).get(CHECKOUT)
            if note is not None:  # else it was detached from the pool
                note.changed = monotonic()
            inner(dbapi_connection)
            info.pop(COMMITTING, None)

        return do_commit

    def around_do_commit_twophase(self, inner: Callable[..., None]) -> Callable[..., None]:
        if self._backend.in_process:
            return inner

        def do_commit_twophase(
            connection: Connection, xid: Any, is_prepared: bool = True, recover: bool = False
        ) -> None:
            info = connection.info
            if DOOMED in info and self._is_doomed(connection.connection):
                self._refuse_commit(info, self._roll_back_twophase, connection, xid, is_prepared, recover)
            info[COMMITTING] = True
            inner(connection, xid, is_prepared, recover)  # XA COMMIT, a statement like others
            info.pop(COMMITTING, None)

        return do_commit_twophase

    def _refuse_commit(self, info: dict[Any, Any], roll_back: Callable[..., None], *arguments: Any) -> None:
        try:
            self._refuse_if_doomed(info)
        finally:
            # After a commit() that failed, SQLAlchemy sends no ROLLBACK any more.
            del info[DOOMED]  # or the XA statements would be refused, too
            roll_back(*arguments)

    def around_do_rollback(self, inner: Callable[[Any], None]) -> Callable[[Any], None]:
        if self._backend.in_process:
            return inner
        self._roll_back = inner

        def do_rollback(dbapi_connection: Any) -> None:
            if not KNOWN[0]:
                fork.found_out()
            try:
                info = dbapi_connection.info
            except NotImplementedError:  # SQLAlchemy's own, while it asks a new server what it can
                inner(dbapi_connection)
                return
            info.pop(COMMITTING, None)
            info.pop(DOOMED, None)
            if self._backend.may_have_kept(dbapi_connection) and (user := _user_of(dbapi_connection)) is not None:
                writes.note_by_itself(user)
            driver = dbapi_connection.dbapi_connection
            if isinstance(driver, KnownConnection) and driver.unread and not driver.finish_at_hand():
                reader = _user_of(dbapi_connection)
                if reader is not None and reader.in_transaction():
                    reader.invalidate()  # not read on for a ROLLBACK; the server rolls back what it has lost
                    return
            inner(dbapi_connection)

        return do_rollback

    def around_do_rollback_twophase(self, inner: Callable[..., None]) -> Callable[..., None]:
        if self._backend.in_process:
            return inner
        self._roll_back_twophase = inner

        def do_rollback_twophase(
            connection: Connection, xid: Any, is_prepared: bool = True, recover: bool = False
        ) -> None:
            connection.info.pop(COMMITTING, None)
            connection.info.pop(DOOMED, None)
            driver: Any = connection.connection.dbapi_connection
            if isinstance(driver, KnownConnection) and driver.unread and not driver.finish_at_hand():
                connection.invalidate()
            else:
                inner(connection, xid, is_prepared, recover)

        return do_rollback_twophase

    # What an error means.

    def on_handle_error(self, context: ExceptionContext) -> BaseException | None:
        """Judge an error, and replace it where it leaves open what became of a COMMIT."""
        connection, error = context.connection, context.original_exception
        if connection is None or connection.closed or connection.invalidated:
            if context.is_pre_ping and self._backend.classify(error) is not Verdict.FATAL:
                context.is_disconnect = True
                if not self._backend.discards.due():
                    return DisconnectionError("this one only")  # else SQLAlchemy discards all
            return None
        from_driver = isinstance(error, context.dialect.loaded_dbapi.Error)
        driver: Any = connection.connection.dbapi_connection
        verdict = self._backend.classify(error) if from_driver else Verdict.FATAL
        if self._config.readonly and verdict is Verdict.FAILOVER:
            verdict = Verdict.FATAL  # a write, which is refused as it should be
        self._judge_connection(context, connection, driver, verdict, from_driver)
        # In this order: while SQLAlchemy asks a new server what it can, the connection has no `info`.
        statement = context.statement
        if (statement is None or statement.startswith(_TWO_PHASE)) and connection.info.pop(COMMITTING, False):
            if isinstance(error, UsedByTwo) or (
                statement is None and isinstance(driver, KnownConnection) and not driver.commit_sent
            ):
                return None  # it was not sent
            return self._judge_commit(context, connection, error, from_driver)
        undone = verdict is Verdict.RETRY or (from_driver and self._backend.undoes_more(error))
        if undone and connection.in_transaction() and not is_autocommit(connection, self._backend):
            connection.info[DOOMED] = remembered(error)
            self._ever_doomed = True
        return None

    def _judge_connection(
        self, context: ExceptionContext, connection: Connection, driver: Any, verdict: Verdict, from_driver: bool
    ) -> None:
        """Tell SQLAlchemy whether the connection is of no use any more, and whether those opened before it are."""
        if isinstance(driver, KnownConnection) and driver.gave_up:
            context.is_disconnect = True
            context.invalidate_pool_on_disconnect = False
        elif verdict is Verdict.DISCONNECT:
            context.is_disconnect = True
            context.invalidate_pool_on_disconnect = self._backend.discards.due()
        elif verdict is Verdict.FAILOVER:
            self._judge_refusal(context, connection)
        elif not from_driver and not isinstance(driver, KnownConnection):
            # Whether a driver that we do not know is still in step with its server, nobody can say.
            ours = isinstance(context.original_exception, RollbackRequired | UsedByTwo)  # nothing was sent
            context.is_disconnect = context.is_disconnect or (context.execution_context is not None and not ours)
            context.invalidate_pool_on_disconnect = False

    def _judge_refusal(self, context: ExceptionContext, connection: Connection) -> None:
        """Discard all connections to a server that takes no writes; if they are known to be new, have the next one that
        is used replaced, and it asks what it has found."""
        discards = self._backend.discards
        self._backend.write_refused(context.original_exception, connection.connection)
        if not discards.due() or not self._backend.is_failover(context.original_exception, connection.connection):
            return
        first, discards.refused = not discards.refused, True
        replace_next = getattr(connection.engine.pool, "replace_next", None)  # of our own pools
        context.is_disconnect = first or replace_next is None or not replace_next()
        context.invalidate_pool_on_disconnect = first

    def _judge_commit(
        self, context: ExceptionContext, connection: Connection, error: BaseException, from_driver: bool
    ) -> BaseException | None:
        if from_driver:
            unknown = self._backend.may_have_committed(error, context.is_disconnect)
            if self._backend.classify(error) is Verdict.RETRY:
                try:
                    connection.dialect.do_rollback(connection.connection)  # SQLAlchemy will not, after a commit()
                except Exception:
                    context.is_disconnect = True
        else:
            unknown = True
        if not unknown:
            return None
        scope = connection.info.get(SCOPE, nobody)()
        if scope is not None:
            scope.note_outcome(self._name, "unknown")
        if from_driver:
            return CommitOutcomeUnknown(self._name, error, context.is_disconnect)
        error.add_note(f"Database {self._name!r}: {MAYBE_COMMITTED}.")
        return None


def _user_of(dbapi_connection: Any) -> Connection | None:
    """Return the Connection that has executed something on a proxied DBAPI connection, also after it was detached."""
    note = (dbapi_connection.record_info or {}).get(CHECKOUT)
    reference = dbapi_connection.info.get(DETACHED_USER) if note is None else note.connection
    user: Connection | None = None if reference is None else reference()
    return user
