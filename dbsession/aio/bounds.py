"""How long MySQL and MariaDB are waited for. A silent server would keep a task for ever: the drivers have no bound on
the handshake, and aiomysql none on an answer.

A statement's answer has to be there, whole, within `read_timeout_s`. Else a timer of the loop closes the driver's
connection, so that whoever reads from it gets the driver's own error of a lost connection (2013).
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Engine, ExceptionContext, ExecutionContext

from dbsession.aio.kill import Killer
from dbsession.config import DatabaseConfig
from dbsession.keys import SCOPE

# The driver's number for a server that cannot be reached, CR_CONN_HOST_ERROR.
_CANNOT_CONNECT = 2003


def connect_args(config: DatabaseConfig) -> dict[str, Any]:
    """The arguments of the driver's connect(), below the user's own."""
    found: dict[str, Any] = {"connect_timeout": config.connect_timeout_s}
    if "charset" not in config.url.query:
        found["charset"] = "utf8mb4"
    return {key: value for key, value in found.items() if key not in config.url.query}


def listen(engine: Engine, config: DatabaseConfig, killer: Killer | None) -> None:
    """Bound what `engine` waits for; `killer` ends what nobody waits for any more."""
    dialect: Any = engine.dialect
    bounds = _Bounds(config, killer)
    event.listen(engine, "do_connect", bounds.connecting)
    event.listen(engine, "handle_error", bounds.judge)
    # The dialect is the engine's own, and that of the engines made from it by execution_options().
    for name in ("do_execute", "do_executemany", "do_execute_no_params"):
        setattr(dialect, name, bounds.statement(getattr(dialect, name)))
    for name in ("do_commit", "do_rollback"):
        setattr(dialect, name, bounds.transaction_end(getattr(dialect, name)))
    event.listen(engine, "connect", bounds.opened, insert=True)
    event.listen(engine, "connect", bounds.ready)
    dialect.set_isolation_level = bounds.level_set(dialect.set_isolation_level)
    dialect.do_ping = bounds.ping(dialect.do_ping)
    dialect.do_terminate = bounds.terminate(dialect.do_terminate)


class _Line:
    """An open connection of a driver, and until when an answer has to come. Lives as long as it. Written in the loop's
    own thread, and nothing awaits between reading and writing.

    Its timer outlives the answers that it is set for, and looks when it is time what is expected by then: making one
    for each statement would take as long as the rest of what we do with a statement.
    """

    __slots__ = ("_driver", "_due", "_loop", "_timer", "late", "transport")

    def __init__(self, driver: Any) -> None:
        self._driver = weakref.ref(driver)
        self._loop = asyncio.get_running_loop()
        self._due: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.transport: asyncio.WriteTransport = transport_of(driver)
        self.late = False
        """It was closed for its silence, which says nothing of the pool's other connections."""

    def expect(self, seconds: float) -> float | None:
        """From now on, until `done()`: close the connection when the answer is not there in so many seconds. Returns
        what `done()` needs: until when what this is a part of is expected."""
        earlier, due = self._due, self._loop.time() + seconds
        if earlier is not None and earlier < due:
            due = earlier
        self._due = due
        if self._timer is None:
            self._timer = self._loop.call_at(due, self._look)
        elif self._timer.when() > due:
            self._timer.cancel()
            self._timer = self._loop.call_at(due, self._look)
        return earlier

    def done(self, earlier: float | None) -> None:
        self._due = earlier

    def _look(self) -> None:
        self._timer = None
        driver = self._driver()
        if self._due is None or driver is None:
            return
        if self._loop.time() < self._due:
            self._timer = self._loop.call_at(self._due, self._look)
        else:
            self.late = True
            driver.close()
            self.transport.abort()  # close() alone waits until what the server does not read is sent


class _Bounds:
    """The bounds of one engine. Lives as long as it."""

    def __init__(self, config: DatabaseConfig, killer: Killer | None) -> None:
        self._killer = killer
        self._connect_s = config.connect_timeout_s
        self._read_s = config.read_timeout_s
        # By the driver's connection. Written when one was opened, in the loop's thread.
        self._lines: weakref.WeakKeyDictionary[Any, _Line] = weakref.WeakKeyDictionary()

    def connecting(self, dialect: Any, _: Any, args: Any, arguments: dict[str, Any]) -> None:
        """Before a connection is opened: bound the handshake, too, whoever opens it."""
        module = dialect.loaded_dbapi
        connect = arguments.get("async_creator_fn") or module.driver.connect
        seconds = self._connect_s
        if self._killer is not None:
            self._killer.arguments = dict(arguments)

        async def within(*args: Any, **arguments: Any) -> Any:
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
                    self._lines[connection] = _Line(connection)
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
            line = self._lines.get(proxied.driver_connection)
            if line is None:
                return execute(cursor, statement, *arguments)
            info = _info_of(proxied)
            scope = info.get(SCOPE, _nobody)()
            own = None if scope is None else scope.read_timeout_s
            earlier = line.expect(self._read_s if own is None else own)
            try:
                return execute(cursor, statement, *arguments)
            except BaseException as error:
                module = context.dialect.loaded_dbapi
                if self._killer is not None and (line.late or not isinstance(error, module.Error)):
                    self._killer.abandon(info, module.driver.connect)
                raise
            finally:
                line.done(earlier)

        return bounded

    def transaction_end(self, end: Callable[[Any], None]) -> Callable[[Any], None]:
        return self._within(end, self._read_s)

    def ping(self, ping: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return self._within(ping, self._connect_s)

    def level_set(self, set_level: Callable[..., Any]) -> Callable[..., Any]:
        return self._within(set_level, self._read_s)

    def opened(self, connection: Any, _: Any) -> None:
        """Before anything is asked of a new connection, by SQLAlchemy or by us: all of that is a part of connecting."""
        line = self._lines.get(connection.driver_connection)
        if line is not None:
            line.expect(self._connect_s)

    def ready(self, connection: Any, _: Any) -> None:
        """After that."""
        line = self._lines.get(connection.driver_connection)
        if line is not None:
            line.done(None)

    def _within(self, ask: Callable[..., Any], seconds: float) -> Callable[..., Any]:
        def bounded(connection: Any, *arguments: Any) -> Any:
            line = self._lines.get(connection.driver_connection)
            if line is None:
                return ask(connection, *arguments)
            earlier = line.expect(seconds)
            try:
                return ask(connection, *arguments)
            finally:
                line.done(earlier)

        return bounded

    def terminate(self, terminate: Callable[[Any], None]) -> Callable[[Any], None]:
        """For connections that are of no use any more. Those that the driver has closed, because it was cancelled, are
        not waited for: a second cancellation there would take the place of the first, and of what it says of a COMMIT.
        """

        def bounded(connection: Any) -> None:
            line = self._lines.get(connection.driver_connection)
            if line is not None and line.transport.is_closing():
                line.transport.abort()  # else it is kept until the server has read all that was to be sent
            else:
                terminate(connection)

        return bounded

    def judge(self, context: ExceptionContext) -> None:
        connection = context.connection
        if connection is None or connection.closed or connection.invalidated:
            return
        line = self._lines.get(connection.connection.driver_connection)
        if line is not None and line.late:
            context.is_disconnect = True
            context.invalidate_pool_on_disconnect = False


def transport_of(driver: Any) -> Any:
    """Through which an open connection of a driver is written to. Private, and nothing else tells."""
    writer = getattr(driver, "_writer", None)  # of aiomysql
    return driver._transport if writer is None else writer.transport


def _info_of(proxied: Any) -> dict[Any, Any]:
    try:
        found: dict[Any, Any] = proxied.info
    except NotImplementedError:  # SQLAlchemy's own, while it asks a new server what it can
        return {}
    return found


def _nobody() -> Any:
    return None
