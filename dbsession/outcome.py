"""What becomes of a transaction: doomed by a deadlock, committed, rolled back, or nobody knows.

SQLAlchemy leaves a session usable after a deadlock or a lock timeout, though the server has thrown away a part of its
work; and an error at COMMIT looks like any other. Both end here. An engine's events tell of every transaction on it,
whether a Session or a Connection began it.
"""

from __future__ import annotations

import weakref

from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine, ExceptionContext

from dbsession.config import DatabaseConfig
from dbsession.errors import MAYBE_COMMITTED, CommitOutcomeUnknown, RollbackRequired, describe
from dbsession.mysql import codes
from dbsession.mysql.connection import Connection as MySQLConnection

wrote: weakref.WeakSet[Connection] = weakref.WeakSet()
"""Connections on which something was written in their last transaction. Written by the engine's events."""

_COMMITTING = "dbsession.committing"


def is_autocommit(connection: Connection, config: DatabaseConfig) -> bool:
    """Whether each statement on it is a transaction of its own."""
    level = connection.get_execution_options().get("isolation_level") or config.isolation_level
    return level == "AUTOCOMMIT"


class TransactionWatch:
    """Watches one engine's transactions. Lives as long as the engine.

    `_doomed` is written by the events of the connection that it is about, in the greenlet that uses it.
    """

    def __init__(self, config: DatabaseConfig) -> None:
        self._name = config.name
        self._backend = config.backend
        self._config = config
        self._readonly = config.readonly
        self._is_mysql = config.backend in ("mysql", "mariadb")
        self._doomed: weakref.WeakKeyDictionary[Connection, BaseException] = weakref.WeakKeyDictionary()

    def listen(self, engine: Engine) -> None:
        if self._backend == "sqlite":
            return  # in this process: nothing is lost on the way, and nothing undone behind our back
        event.listen(engine, "begin", self._begin)
        event.listen(engine, "begin_twophase", self._begin)
        event.listen(engine, "commit", self._commit)
        event.listen(engine, "commit_twophase", self._commit)  # XA COMMIT, a statement like others
        event.listen(engine, "rollback", self._rollback)
        event.listen(engine, "rollback_twophase", self._rollback)
        event.listen(engine, "handle_error", self._judge)

    def is_doomed(self, connection: Connection) -> bool:
        """Whether the transaction under way has lost a part of its work."""
        return bool(self._doomed) and connection in self._doomed

    def refuse_if_doomed(self, connection: Connection) -> None:
        """Raise RollbackRequired if the transaction under way has lost a part of its work."""
        if self.is_doomed(connection):
            cause = self._doomed[connection]
            raise RollbackRequired(
                f"Database {self._name!r}: {describe(cause)} has undone a part of this transaction at the server, so "
                "the rest is refused. Roll back the whole transaction (a savepoint is not enough) and do it again; "
                "run_in_transaction() does that."
            ) from cause

    def _begin(self, connection: Connection, *_: object) -> None:
        connection.info.pop(_COMMITTING, None)

    def _commit(self, connection: Connection, *_: object) -> None:
        try:
            self.refuse_if_doomed(connection)
        except RollbackRequired:
            # After a commit() that failed, SQLAlchemy sends no ROLLBACK any more.
            connection.dialect.do_rollback(connection.connection)
            del self._doomed[connection]
            raise
        connection.info[_COMMITTING] = True

    def _rollback(self, connection: Connection, *_: object) -> None:
        self._doomed.pop(connection, None)
        if not connection.invalidated:
            connection.info.pop(_COMMITTING, None)
            driver = connection.connection.dbapi_connection
            if isinstance(driver, MySQLConnection) and driver.unread:
                connection.invalidate()  # not read on for a ROLLBACK; the server rolls back what it has lost

    def _judge(self, context: ExceptionContext) -> BaseException | None:
        connection, error = context.connection, context.original_exception
        if connection is None or connection.closed or connection.invalidated:
            if context.is_pre_ping and self._is_mysql and codes.classify(error) is not codes.Verdict.FATAL:
                context.is_disconnect = True
            return None
        from_driver = isinstance(error, context.dialect.loaded_dbapi.Error)
        driver = connection.connection.dbapi_connection
        verdict = codes.classify(error) if from_driver and self._is_mysql else codes.Verdict.FATAL
        if self._readonly and verdict is codes.Verdict.FAILOVER:
            verdict = codes.Verdict.FATAL  # a write, which is refused as it should be
        if isinstance(driver, MySQLConnection) and driver.gave_up:
            context.is_disconnect = True
            context.invalidate_pool_on_disconnect = False
        elif verdict in (codes.Verdict.DISCONNECT, codes.Verdict.FAILOVER):
            context.is_disconnect = True
        elif not from_driver and not isinstance(driver, MySQLConnection):
            # Whether a driver that we do not know is still in step with its server, nobody can say.
            context.is_disconnect = context.is_disconnect or context.cursor is not None
            context.invalidate_pool_on_disconnect = False
        # In this order: while SQLAlchemy asks a new server what it can, the connection has no `info`.
        statement = context.statement
        if (statement is None or statement.startswith("XA COMMIT")) and connection.info.get(_COMMITTING):
            if statement is None and isinstance(driver, MySQLConnection) and not driver.commit_sent:
                return None
            return self._judge_commit(context, connection, error, from_driver)
        if verdict is codes.Verdict.RETRY and not is_autocommit(connection, self._config):
            # A copy: the error's traceback would keep everything alive that this is only to be remembered for.
            self._doomed[connection] = type(error)(*error.args)
        return None

    def _judge_commit(
        self, context: ExceptionContext, connection: Connection, error: BaseException, from_driver: bool
    ) -> BaseException | None:
        if from_driver and self._is_mysql:
            unknown = codes.commit_may_have_happened(error)
            if codes.classify(error) is codes.Verdict.RETRY:
                try:
                    connection.dialect.do_rollback(connection.connection)  # SQLAlchemy will not, after a commit()
                except Exception:
                    context.is_disconnect = True
        else:
            unknown = context.is_disconnect or not from_driver
        if not unknown:
            return None
        scope = connection.info.get(SCOPE, _nobody)()
        if scope is not None:
            scope.note_outcome(self._name, "unknown")
        if from_driver:
            return CommitOutcomeUnknown(self._name, error, context.is_disconnect)
        error.add_note(f"Database {self._name!r}: {MAYBE_COMMITTED}.")
        return None


SCOPE = "dbsession.scope"
"""Key in a connection's `info`: a weak reference to the scope of the session that uses it."""


def _nobody() -> None:
    return None
