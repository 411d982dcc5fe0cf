"""What becomes of a transaction: doomed by a deadlock, committed, rolled back, or nobody knows.

SQLAlchemy leaves a session usable after a deadlock or a lock timeout, though the server has thrown away a part of its
work; and an error at COMMIT looks like any other. Both end here. An engine's events tell of every transaction on it,
whether a Session or a Connection began it.

The ends of transactions are seen in the dialect's methods for them, and not by ConnectionEvents: a single listener for
one of those makes SQLAlchemy join two dispatchers, event by event, for each Connection (30 us a request).
"""

from __future__ import annotations

import time
import weakref
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine, ExceptionContext, ExecutionContext

from dbsession.core.backends import mysql_errors
from dbsession.core.config import DatabaseConfig
from dbsession.core.connection_info import CHECKOUT, COMMITTING, DOOMED, SCOPE, KnownConnection
from dbsession.core.sql import writes
from dbsession.errors import MAYBE_COMMITTED, CommitOutcomeUnknown, RollbackRequired, describe

wrote: weakref.WeakSet[Connection] = weakref.WeakSet()
"""Connections on which something was written in their last transaction. Written by the engine's events."""


def is_autocommit(connection: Connection, config: DatabaseConfig) -> bool:
    """Whether each statement on it is a transaction of its own."""
    level = connection.get_execution_options().get("isolation_level") or config.isolation_level
    return level == "AUTOCOMMIT"


class TransactionWatch:
    """Watches one engine's transactions. Lives as long as the engine.

    A transaction's state is kept in its connection's `info`, which the greenlet that uses the connection writes.
    """

    def __init__(self, config: DatabaseConfig) -> None:
        self._name = config.name
        self._backend = config.backend
        self._config = config
        self._readonly = config.readonly
        self._is_mysql = config.backend in ("mysql", "mariadb")
        self._ever_doomed = False  # so that no statement looks for what nearly never is there

    def listen(self, engine: Engine) -> None:
        if self._backend == "sqlite" and not engine.dialect.is_async:
            return  # in this process: nothing is lost on the way, and nothing undone behind our back
        # The dialect is the engine's own, and that of the engines made from it by execution_options().
        dialect: Any = engine.dialect
        self._do_commit, dialect.do_commit = dialect.do_commit, self._commit
        self._do_commit_twophase, dialect.do_commit_twophase = dialect.do_commit_twophase, self._commit_twophase
        self._do_rollback, dialect.do_rollback = dialect.do_rollback, self._rollback
        self._do_rollback_twophase, dialect.do_rollback_twophase = dialect.do_rollback_twophase, self._rollback_twophase
        event.listen(engine, "handle_error", self._judge)

    def executing(self, cursor: Any, statement: str, context: ExecutionContext) -> bool:
        """Called before each statement: refuse what must not be sent, and remember that something was written, so that
        `release_dbsession()` does not throw it away. True: the statement is not to be executed any more."""
        connection = context.root_connection
        if self._ever_doomed and DOOMED in connection.info:
            if statement.startswith("ROLLBACK TO SAVEPOINT"):
                # Of a block that the error goes through: its savepoint may be gone, and all is rolled back anyway.
                cursor.execute("DO 0")
                return True
            self.refuse_if_doomed(connection.info)
        if writes(statement) and not is_autocommit(connection, self._config):  # there it is committed already
            wrote.add(connection)
        return False

    def refuse_if_doomed(self, info: dict[Any, Any]) -> None:
        """Raise RollbackRequired if the transaction under way has lost a part of its work. `info` is its
        connection's."""
        cause = info.get(DOOMED)
        if cause is not None:
            raise RollbackRequired(
                f"Database {self._name!r}: {describe(cause)} has undone a part of this transaction at the server, so "
                "the rest is refused. Roll back the whole transaction (a savepoint is not enough) and do it again; "
                "run_in_transaction() does that."
            ) from cause

    def _commit(self, proxied: Any) -> None:
        info = proxied.info
        self._begin_commit(info, self._do_rollback, proxied)
        note = (proxied.record_info or {}).get(CHECKOUT)
        if note is not None:  # else it was detached from the pool
            note.changed = time.monotonic()
        self._do_commit(proxied)
        info.pop(COMMITTING, None)

    def _commit_twophase(self, connection: Connection, *arguments: Any, **more: Any) -> None:
        info = connection.info
        self._begin_commit(info, self._do_rollback_twophase, connection, *arguments, **more)
        self._do_commit_twophase(connection, *arguments, **more)  # XA COMMIT, a statement like others
        info.pop(COMMITTING, None)

    def _begin_commit(self, info: dict[Any, Any], roll_back: Any, *arguments: Any, **more: Any) -> None:
        try:
            self.refuse_if_doomed(info)
        except RollbackRequired:
            # After a commit() that failed, SQLAlchemy sends no ROLLBACK any more.
            del info[DOOMED]  # or the XA statements would be refused, too
            roll_back(*arguments, **more)
            raise
        info[COMMITTING] = True

    def _rollback(self, proxied: Any) -> None:
        try:
            info = proxied.info
        except NotImplementedError:  # SQLAlchemy's own, while it asks a new server what it can
            self._do_rollback(proxied)
            return
        self._forget(info)
        driver: Any = proxied.dbapi_connection
        reader = driver.stream_of() if isinstance(driver, KnownConnection) and driver.unread else None
        if reader is not None and reader.in_transaction():
            reader.invalidate()  # not read on for a ROLLBACK; the server rolls back what it has lost
        else:
            self._do_rollback(proxied)

    def _rollback_twophase(self, connection: Connection, *arguments: Any, **more: Any) -> None:
        self._forget(connection.info)
        driver: Any = connection.connection.dbapi_connection
        if isinstance(driver, KnownConnection) and driver.unread:
            connection.invalidate()
        else:
            self._do_rollback_twophase(connection, *arguments, **more)

    def _forget(self, info: dict[Any, Any]) -> None:
        info.pop(COMMITTING, None)
        info.pop(DOOMED, None)

    def _judge(self, context: ExceptionContext) -> BaseException | None:
        connection, error = context.connection, context.original_exception
        if connection is None or connection.closed or connection.invalidated:
            fatal = mysql_errors.Verdict.FATAL
            if context.is_pre_ping and self._is_mysql and mysql_errors.classify(error) is not fatal:
                context.is_disconnect = True
            return None
        from_driver = isinstance(error, context.dialect.loaded_dbapi.Error)
        driver: Any = connection.connection.dbapi_connection
        verdict = mysql_errors.classify(error) if from_driver and self._is_mysql else mysql_errors.Verdict.FATAL
        if self._readonly and verdict is mysql_errors.Verdict.FAILOVER:
            verdict = mysql_errors.Verdict.FATAL  # a write, which is refused as it should be
        if isinstance(driver, KnownConnection) and driver.gave_up:
            context.is_disconnect = True
            context.invalidate_pool_on_disconnect = False
        elif verdict in (mysql_errors.Verdict.DISCONNECT, mysql_errors.Verdict.FAILOVER):
            context.is_disconnect = True
        elif not from_driver and not isinstance(driver, KnownConnection):
            # Whether a driver that we do not know is still in step with its server, nobody can say.
            context.is_disconnect = context.is_disconnect or (
                context.execution_context is not None and not isinstance(error, RollbackRequired)
            )
            context.invalidate_pool_on_disconnect = False
        # In this order: while SQLAlchemy asks a new server what it can, the connection has no `info`.
        statement = context.statement
        if (statement is None or statement.startswith("XA COMMIT")) and connection.info.pop(COMMITTING, False):
            if statement is None and isinstance(driver, KnownConnection) and not driver.commit_sent:
                return None
            return self._judge_commit(context, connection, error, from_driver)
        if (
            verdict is mysql_errors.Verdict.RETRY
            and connection.in_transaction()
            and not is_autocommit(connection, self._config)
        ):
            # A copy: the error's traceback would keep everything alive that this is only to be remembered for.
            connection.info[DOOMED] = type(error)(*error.args)
            self._ever_doomed = True
        return None

    def _judge_commit(
        self, context: ExceptionContext, connection: Connection, error: BaseException, from_driver: bool
    ) -> BaseException | None:
        if from_driver and self._is_mysql:
            unknown = mysql_errors.commit_may_have_happened(error)
            if mysql_errors.classify(error) is mysql_errors.Verdict.RETRY:
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


def _nobody() -> None:
    return None
