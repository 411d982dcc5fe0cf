"""How long MySQL and MariaDB are waited for. A silent server would keep a task for ever: the drivers have no bound on
the handshake, and aiomysql none on an answer.

A statement's answer has to be there, whole, within `read_timeout_s`: one timer of the loop for each, which closes the
driver's connection, so that whoever reads from it gets the driver's own error of a lost connection (2013).
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

_LATE = "dbsession.late"
"""In a connection's `info`: it was closed for its silence, which says nothing of the pool's others."""

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
    dialect.do_ping = bounds.ping(dialect.do_ping)
    dialect.do_terminate = bounds.terminate(dialect.do_terminate)


class _Bounds:
    """The bounds of one engine. Lives as long as it."""

    def __init__(self, config: DatabaseConfig, killer: Killer | None) -> None:
        self._killer = killer
        self._connect_s = config.connect_timeout_s
        self._read_s = config.read_timeout_s
        # A driver's connection -> what it writes to, which the driver forgets when it closes. Written when it was
        # opened, in the loop's thread.
        self._transports: weakref.WeakKeyDictionary[Any, asyncio.WriteTransport] = weakref.WeakKeyDictionary()

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
                    self._transports[connection] = transport_of(connection)
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
            timer = self._start(proxied, self._read_s_of(proxied))
            try:
                return execute(cursor, statement, *arguments)
            except BaseException as error:
                self._abandon_if_interrupted(proxied, context.dialect.loaded_dbapi, error)
                raise
            finally:
                timer.cancel()

        return bounded

    def _abandon_if_interrupted(self, proxied: Any, module: Any, error: BaseException) -> None:
        if self._killer is not None:
            info = _info_of(proxied)
            if _LATE in info or not isinstance(error, module.Error):
                self._killer.abandon(info, module.driver.connect)

    def transaction_end(self, end: Callable[[Any], None]) -> Callable[[Any], None]:
        def bounded(proxied: Any) -> None:
            timer = self._start(proxied, self._read_s)
            try:
                end(proxied)
            finally:
                timer.cancel()

        return bounded

    def ping(self, ping: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def bounded(connection: Any) -> Any:
            timer = asyncio.get_running_loop().call_later(self._connect_s, connection.driver_connection.close)
            try:
                return ping(connection)
            finally:
                timer.cancel()

        return bounded

    def terminate(self, terminate: Callable[[Any], None]) -> Callable[[Any], None]:
        """For connections that are of no use any more. Those that the driver has closed, because it was cancelled, are
        not waited for: a second cancellation there would take the place of the first, and of what it says of a COMMIT.
        """

        def bounded(connection: Any) -> None:
            transport = self._transports.get(connection.driver_connection)
            if transport is not None and transport.is_closing():
                transport.abort()  # else it is kept until the server has read all that was to be sent
            else:
                terminate(connection)

        return bounded

    def _read_s_of(self, proxied: Any) -> float:
        scope = _info_of(proxied).get(SCOPE, _nobody)()
        own = None if scope is None else scope.read_timeout_s
        return self._read_s if own is None else own

    def _start(self, proxied: Any, seconds: float) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(seconds, self._close, proxied)

    def _close(self, proxied: Any) -> None:
        driver = proxied.driver_connection
        if driver is not None:
            _info_of(proxied)[_LATE] = True
            driver.close()
            transport = self._transports.get(driver)
            if transport is not None:
                transport.abort()  # close() alone waits until what the server does not read is sent

    def judge(self, context: ExceptionContext) -> None:
        connection = context.connection
        if connection is None or connection.closed or connection.invalidated:
            return
        if _LATE in _info_of(connection.connection):
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
