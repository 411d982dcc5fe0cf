"""How long MySQL and MariaDB are waited for. A silent server would keep a task for ever: the drivers have no bound on
the handshake, and aiomysql none on an answer.

A statement's answer has to be there, whole, within `read_timeout_s`; of a server-side cursor that to each fetch. Else a
timer of the loop closes the driver's connection, so that whoever reads from it gets the driver's own error of a lost
connection (2013).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Engine, ExceptionContext, ExecutionContext

from dbsession.aio.mysql.connection import Line, Stream, line_of
from dbsession.aio.mysql.kill import Killer
from dbsession.core.config import DatabaseConfig
from dbsession.core.connection_info import SCOPE, WIRE

# The driver's number for a server that cannot be reached, CR_CONN_HOST_ERROR.
_CANNOT_CONNECT = 2003
# The same for one that was lost, CR_SERVER_LOST, and what to say of it.
_RESET = 2013, "Lost connection to MySQL server: it was reset"


def connect_args(config: DatabaseConfig) -> dict[str, Any]:
    """The arguments of the driver's connect(), below the user's own."""
    found: dict[str, Any] = {"connect_timeout": config.connect_timeout_s}
    if "charset" not in config.url.query:
        found["charset"] = "utf8mb4"
    return {key: value for key, value in found.items() if key not in config.url.query}


def listen(engine: Engine, config: DatabaseConfig, killer: Killer | None) -> None:
    """Bound what `engine` waits for; `killer` ends what nobody waits for any more."""
    dialect: Any = engine.dialect
    bounds = _Bounds(config, killer, dialect)
    event.listen(engine, "do_connect", bounds.connecting)
    event.listen(engine, "handle_error", bounds.judge)
    # The dialect is the engine's own, and that of the engines made from it by execution_options().
    for name in ("do_execute", "do_executemany", "do_execute_no_params"):
        setattr(dialect, name, bounds.statement(getattr(dialect, name)))
    dialect.do_commit = bounds.commit(dialect.do_commit)
    dialect.do_rollback = bounds.rollback(dialect.do_rollback)
    dialect.execution_ctx_cls = bounds.streaming(dialect.execution_ctx_cls)
    event.listen(engine, "connect", bounds.opened, insert=True)
    event.listen(engine, "connect", bounds.ready)
    dialect.set_isolation_level = bounds.level_set(dialect.set_isolation_level)
    dialect.do_ping = bounds.ping(dialect.do_ping)
    dialect.do_terminate = bounds.terminate(dialect.do_terminate)


class _Bounds:
    """The bounds of one engine. Lives as long as it."""

    def __init__(self, config: DatabaseConfig, killer: Killer | None, dialect: Any) -> None:
        self._dialect = dialect
        self._killer = killer
        self._connect_s = config.connect_timeout_s
        self._read_s = config.read_timeout_s
        self._idle_s = config.ping_idle_s

    def connecting(self, dialect: Any, _: Any, args: Any, arguments: dict[str, Any]) -> None:
        """Before a connection is opened: bound the handshake, too, whoever opens it."""
        module = dialect.loaded_dbapi
        connect = arguments.get("async_creator_fn") or module.driver.connect
        seconds = self._connect_s

        async def within(*args: Any, **arguments: Any) -> Any:
            if self._killer is not None:
                self._killer.arguments = dict(arguments)  # as the user's own listeners have left them: a token, perhaps
            task: Any = asyncio.current_task()
            cancelled = task.cancelling()
            try:
                async with asyncio.timeout(seconds):
                    connection = await connect(*args, **arguments)
                    if task.cancelling() > cancelled:
                        # Lost on the way: before Python 3.12 the driver's asyncio.wait_for() swallows a cancellation
                        # that comes when the connection has just been made.
                        connection.close()
                        raise asyncio.CancelledError
                    connection._dbsession_line = Line(connection)  # as an attribute it goes with it; see line_of()
                    return connection
            except TimeoutError:
                raise module.OperationalError(
                    _CANNOT_CONNECT, f"Can't connect to MySQL server: no answer within {seconds:g} s"
                ) from None

        arguments["async_creator_fn"] = within

    def statement(self, execute: Callable[..., Any]) -> Callable[..., Any]:
        def bounded(cursor: Any, statement: str, *arguments: Any) -> Any:
            context = arguments[-1] if arguments else None  # it stands last, where there is one
            if not isinstance(context, ExecutionContext):
                return execute(cursor, statement, *arguments)
            proxied = context.root_connection.connection
            line = line_of(proxied)
            if line is None:
                return execute(cursor, statement, *arguments)
            info = _info_of(proxied)
            earlier = line.expect(self._read_s_of(info))
            try:
                found = execute(cursor, statement, *arguments)
                line.answered()  # the others may send nothing: a ROLLBACK, or a level, of a connection in AUTOCOMMIT
                return found
            except BaseException as error:
                module = context.dialect.loaded_dbapi
                if _is_lost(error, line):
                    raise module.OperationalError(*_RESET) from error
                if self._killer is not None and (line.late or not isinstance(error, module.Error)):
                    self._killer.abandon(info, module.driver.connect)
                raise
            finally:
                line.done(earlier)

        return bounded

    def _read_s_of(self, info: dict[Any, Any]) -> float:
        scope = info.get(SCOPE, _nobody)()
        own: float | None = None if scope is None else scope.read_timeout_s
        return self._read_s if own is None else own

    def streaming(self, context_class: Any) -> Any:
        """The class of the dialect's execution contexts, with server-side cursors that are bounded."""
        bounds = self

        class Context(context_class):  # type: ignore[misc]
            def create_server_side_cursor(self) -> Any:
                cursor = super().create_server_side_cursor()
                proxied = self.root_connection.connection
                line = line_of(proxied)
                if line is None:
                    return cursor
                return Stream(cursor, line, bounds._read_s_of(_info_of(proxied)), self.root_connection)

        return Context

    def commit(self, commit: Callable[[Any], None]) -> Callable[[Any], None]:
        return self._within(commit, self._read_s)

    def rollback(self, rollback: Callable[[Any], None]) -> Callable[[Any], None]:
        bounded = self._within(rollback, self._read_s)

        def unless_unread(proxied: Any) -> None:
            line = line_of(proxied)
            reader = None if line is None or line.unread is None else line.unread()
            if line is None or reader is None or not reader.in_transaction():
                bounded(proxied)
            else:  # the rest, perhaps millions of rows, is not read for a ROLLBACK: the server does it when we are gone
                line.cut_off(proxied.dbapi_connection.driver_connection)  # a detached proxy has none itself
                reader.invalidate()

        return unless_unread

    def ping(self, ping: Callable[[Any], Any]) -> Callable[[Any], Any]:
        bounded = self._within(ping, self._connect_s)

        def pinging(connection: Any) -> Any:
            line = line_of(connection)
            if line is None:
                return bounded(connection)
            if line.transport.is_closing():
                return False  # the driver's answer may be uvloop's RuntimeError, which is not taken for a disconnect
            if line.lives(self._idle_s):
                return True
            line.pinging = True
            try:
                return bounded(connection)
            finally:
                line.pinging = False

        return pinging

    def level_set(self, set_level: Callable[..., Any]) -> Callable[..., Any]:
        return self._within(set_level, self._read_s)

    def opened(self, connection: Any, record: Any) -> None:
        """Before anything is asked of a new connection, by SQLAlchemy or by us: all of that is a part of connecting."""
        line = line_of(connection)
        if line is not None:
            record.info[WIRE] = line
            line.expect(self._connect_s)

    def ready(self, connection: Any, _: Any) -> None:
        """After that."""
        line = line_of(connection)
        if line is not None:
            line.done(None)

    def _within(self, ask: Callable[..., Any], seconds: float) -> Callable[..., Any]:
        def bounded(connection: Any, *arguments: Any) -> Any:
            line = line_of(connection)
            if line is None:
                return ask(connection, *arguments)
            earlier = line.expect(seconds)
            try:
                return ask(connection, *arguments)
            except RuntimeError as error:
                if _is_lost(error, line):
                    raise self._dialect.loaded_dbapi.OperationalError(*_RESET) from error
                raise
            finally:
                line.done(earlier)

        return bounded

    def terminate(self, terminate: Callable[[Any], None]) -> Callable[[Any], None]:
        """For connections that are of no use any more. Those that are closed already, by the driver because it was
        cancelled, or by the loop because they were reset, are not waited for: a second cancellation there would take
        the place of the first, and of what it says of a COMMIT.
        """

        def bounded(connection: Any) -> None:
            line = line_of(connection)
            if line is not None and line.transport.is_closing():
                line.cut_off(connection.driver_connection)
            else:
                terminate(connection)

        return bounded

    def judge(self, context: ExceptionContext) -> None:
        connection = context.connection
        if connection is None or connection.closed or connection.invalidated:
            return
        line = line_of(connection.connection)
        if line is not None and line.late:
            context.is_disconnect = True
            context.invalidate_pool_on_disconnect = False


def _is_lost(error: BaseException, line: Line) -> bool:
    """Whether this is what uvloop says of a write to a connection that was reset, which aiomysql passes on as it is."""
    return isinstance(error, RuntimeError) and line.transport.is_closing()


def _info_of(proxied: Any) -> dict[Any, Any]:
    try:
        found: dict[Any, Any] = proxied.info
    except NotImplementedError:  # SQLAlchemy's own, while it asks a new server what it can
        return {}
    return found


def _nobody() -> Any:
    return None
