"""The backend of asyncmy and aiomysql: how long MySQL and MariaDB are waited for, and whether a connection lives.

A silent server would keep a task for ever: the drivers have no bound on the handshake, and aiomysql none on an answer.
A statement's answer has to be there, whole, within `read_timeout_s`; of a server-side cursor that to each fetch. Else a
timer of the loop closes the driver's connection, so that whoever reads from it gets the driver's own error of a lost
connection (2013).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.util import await_
from sqlalchemy.util.concurrency import in_greenlet

from dbsession.aio.mysql import opening
from dbsession.aio.mysql.connection import NOT_KNOWN, Wire, wire_of
from dbsession.aio.mysql.kill import SIDE, LoopKiller, open_side
from dbsession.aio.mysql.known import make_known
from dbsession.aio.mysql.results import ROLLED_BACK, context_class, quick_class
from dbsession.core.backends.mysql import MySQL
from dbsession.core.backends.mysql_errors import CLOSED_BEFORE_COMMIT
from dbsession.core.backends.mysql_sent import Sent
from dbsession.core.backends.mysql_tls import TLSContexts
from dbsession.core.config import DatabaseConfig
from dbsession.core.connection_info import CLEANING_S, OPENING, SCOPE, WIRE, driver_of, nobody
from dbsession.core.pool.stats import Stats

# The driver's number for a server that cannot be reached, CR_CONN_HOST_ERROR.
_CANNOT_CONNECT = 2003


class AsyncMySQL(MySQL):
    """The rules of one engine by asyncmy or aiomysql, and the bounds on its waits. Lives as long as the engine."""

    def __init__(self, config: DatabaseConfig, stats: Stats) -> None:
        super().__init__(config)
        self._tls = TLSContexts()
        self._killer = LoopKiller(config.name, stats) if config.kill_abandoned else None

    def engine_options(self) -> dict[str, Any]:
        return {"connect_args": self.driver_arguments(connect_timeout=self.config.connect_timeout_s)}

    # Opening.

    def on_do_connect(self, dialect: Any, record: Any, args: Any, arguments: dict[str, Any]) -> None:
        """Bound the handshake, too, whoever opens the connection."""
        module = dialect.loaded_dbapi
        connect = arguments.get("async_creator_fn") or module.driver.connect
        seconds = self.config.connect_timeout_s
        left_to_us = {"autocommit": None} if connect is module.driver.connect else {}

        async def within(*args: Any, **arguments: Any) -> Any:
            task: Any = asyncio.current_task()
            cancelled = task.cancelling()
            try:
                async with asyncio.timeout(seconds):
                    arguments |= opening.tls_argument(self._tls, module, arguments)
                    if (thread := SIDE.get()) is not None:
                        return await open_side(connect, arguments, thread)
                    if left_to_us:
                        connection = await opening.opened(connect, {**arguments, **left_to_us}, module, seconds)
                    else:
                        connection = await connect(*args, **arguments)
                    opening.require_tls(connection, arguments, module)
                    if task.cancelling() > cancelled:
                        # Lost on the way: before Python 3.12 the driver's asyncio.wait_for() swallows a cancellation
                        # that comes when the connection has just been made.
                        connection.close()
                        raise asyncio.CancelledError
                    make_known(connection, arguments)
                    # As an attribute it goes with it; see wire_of().
                    connection._dbsession_wire = wire = Wire(connection, module)
                    # As the user's listeners have left the arguments: a token, say.
                    wire.reopen = lambda thread: open_side(connect, arguments, thread)
                    if left_to_us:
                        await self._set_autocommit(connection, arguments.get("autocommit", False))
                    return connection
            except TimeoutError:
                raise module.OperationalError(
                    _CANNOT_CONNECT, f"Can't connect to MySQL server: no answer within {seconds:g} s"
                ) from None

        arguments["async_creator_fn"] = within

    @staticmethod
    async def _set_autocommit(connection: Any, mode: Any) -> None:
        """Set what was kept from the driver, which would believe a server that calls it set already."""
        if mode is not None:
            try:
                await connection.autocommit(mode)
            except BaseException:
                connection.close()
                raise

    def on_connect_first(self, connection: Any, record: Any) -> None:
        """Start the connect timer: what SQLAlchemy and we ask of a new connection is a part of connecting."""
        wire = wire_of(connection)
        if wire is not None:
            adapter: Any = type(connection)
            connection.__class__ = quick_class(adapter)
            record.info[WIRE] = wire
            wire.expect(self.config.connect_timeout_s)

    def connected(self, connection: Any, info: dict[Any, Any]) -> None:
        super().connected(connection, info)
        wire = wire_of(connection)
        if self._killer is not None and wire is not None:
            self._killer.opened(connection, wire, info)
        if wire is not None:
            wire.done()  # the connect timer

    # Statements, and the ends of transactions.

    def executing(
        self, inner: Callable[..., None], cursor: Any, statement: str, parameters: Any, context: Any = None
    ) -> None:
        """Execute a statement whose answer has to be there in time; have it ended at the server if nobody waits."""
        # What is done for each statement is written out: wire_of() by the driver's connection in SQLAlchemy's cursor,
        # and read_s_of().
        wire = getattr(getattr(cursor, "_connection", None), "_dbsession_wire", None)
        if context is None or wire is None:
            inner(cursor, statement, parameters, context)
            return
        wire.ended_at = NOT_KNOWN
        proxied = context.root_connection.connection
        seconds, scope = self.config.read_timeout_s, None
        try:
            scope = proxied.info.get(SCOPE, nobody)()
        except NotImplementedError:  # SQLAlchemy's own, while it asks a new server what it can
            pass
        if scope is not None and scope.read_timeout_s is not None:
            seconds = scope.read_timeout_s
        try:
            wire.within(seconds, inner, cursor, statement, parameters, context, answers=True)
        except BaseException:
            if self._killer is not None and wire.given_up:
                self._killer.abandon_connection(_info_of(proxied), context.root_connection.engine.pool)
            raise

    def read_s_of(self, proxied: Any) -> float:
        """Return how long a statement on a proxied DBAPI connection may take."""
        scope = _info_of(proxied).get(SCOPE, nobody)()
        own: float | None = None if scope is None else scope.read_timeout_s
        return self.config.read_timeout_s if own is None else own

    def around_execution_ctx_cls(self, inner: Any) -> Any:
        return context_class(inner, self)

    def around_do_commit(self, inner: Callable[[Any], None]) -> Callable[[Any], None]:
        def do_commit(dbapi_connection: Any) -> None:
            wire = wire_of(dbapi_connection)
            if wire is not None:
                wire.ended_at = NOT_KNOWN
            if wire is not None and wire.was_closed():
                wire.cut_off(driver_of(dbapi_connection))
                raise wire.module.OperationalError(*CLOSED_BEFORE_COMMIT)
            if wire is None:
                inner(dbapi_connection)
                return
            committer, wire.committer = wire.committer, asyncio.current_task()
            try:
                wire.within(self.config.read_timeout_s, inner, dbapi_connection, ends=True)
            finally:
                wire.committer = committer
            wire.note_end()

        return do_commit

    def around_do_rollback(self, inner: Callable[[Any], None]) -> Callable[[Any], None]:
        def do_rollback(dbapi_connection: Any) -> None:
            wire = wire_of(dbapi_connection)
            if wire is not None and wire.sent is not None and wire.ended_at == wire.sent.count:
                return  # the pool's, as the connection comes back: nothing was begun since the last one
            reader = None if wire is None or wire.unread is None else wire.unread()
            stream = None if wire is None or wire.stream is None else wire.stream()
            if (
                wire is None
                or wire.asking
                or reader is None
                or not reader.in_transaction()
                or (stream is not None and stream.finish_at_hand())
            ):
                if wire is None:
                    inner(dbapi_connection)
                    return
                wire.ended_at = NOT_KNOWN
                wire.within(self.config.read_timeout_s, inner, dbapi_connection, ends=True)
                wire.note_end()
            else:  # the rest, perhaps millions of rows, is not read for a ROLLBACK: the server does it when we are gone
                driver = dbapi_connection.dbapi_connection.driver_connection  # a detached proxy has none itself
                wire.cut_off(driver, ROLLED_BACK)
                reader.invalidate()

        return do_rollback

    def around_set_isolation_level(self, inner: Callable[..., None]) -> Callable[..., None]:
        inner = super().around_set_isolation_level(inner)

        def set_isolation_level(dbapi_connection: Any, level: Any) -> None:
            self._within(inner, self.config.read_timeout_s, dbapi_connection, level)

        return set_isolation_level

    def _ask(self, connection: Any, question: str) -> Any:
        wire = wire_of(connection)
        if wire is not None and wire.asking and wire.committer is asyncio.current_task():
            return super()._ask(connection, question)  # within its commit(), whose bound holds for this, too
        return self._within(super()._ask, self.config.read_timeout_s, connection, question)

    def _within(self, ask: Callable[..., Any], seconds: float, connection: Any, *arguments: Any) -> Any:
        wire = wire_of(connection)
        if wire is None:
            return ask(connection, *arguments)
        return wire.within(seconds, ask, connection, *arguments, ends=True)

    def still_open(self, connection: Any) -> bool:
        return bool(getattr(driver_of(connection), "still_open", False))

    def clean(self, connection: Any) -> bool:
        """Take back what its user has set on a connection that comes back; return False if it has to be closed
        instead. May wait."""
        driver: Any = getattr(connection, "_connection", None)  # driver_of(), without its call at each return
        sent: Sent | None = getattr(driver, "sent", None)
        if sent is None:
            return True  # a creator's own, of which we know nothing
        sent.level_changed = False  # SQLAlchemy has taken it back just now
        if not sent.is_changed(driver.told_autocommit):
            sent.phase = OPENING
            return True
        return in_greenlet() and bool(self._within(lambda _: await_(driver.reset()), CLEANING_S, connection))

    # Liveness, and the end.

    def around_do_ping(self, inner: Callable[[Any], bool]) -> Callable[[Any], bool]:
        def do_ping(dbapi_connection: Any) -> bool:
            wire = wire_of(dbapi_connection)
            if wire is None:
                return inner(dbapi_connection)
            if wire.transport.is_closing():
                if not self.discards.due():
                    raise DisconnectionError("this one only")  # else SQLAlchemy discards all
                return False  # the driver's answer may be uvloop's RuntimeError, which is not taken for a disconnect
            if wire.lives(self.config.ping_idle_s):
                return True
            wire.pinging = True
            try:
                return bool(self._within(inner, self.config.connect_timeout_s, dbapi_connection))
            except Exception:
                if not wire.given_up or wire.late:
                    raise
                return False  # out of step: whoever used it before has left something to read
            finally:
                wire.pinging = False

        return do_ping

    def around_do_terminate(self, inner: Callable[[Any], None]) -> Callable[[Any], None]:
        def do_terminate(dbapi_connection: Any) -> None:
            # Connections that are closed already, by the driver because it was cancelled, or by the loop because they
            # were reset, are not waited for: a second cancellation there would take the place of the first, and of what
            # it says of a COMMIT.
            wire = wire_of(dbapi_connection)
            if wire is not None and wire.transport.is_closing():
                wire.cut_off(dbapi_connection.driver_connection)
            else:
                inner(dbapi_connection)

        return do_terminate

    def on_handle_error(self, context: ExceptionContext) -> None:
        """Say that a connection that we gave up is gone, which says nothing of the others, and that one which something
        else than the driver has failed on is not."""
        connection, error = context.connection, context.original_exception
        if connection is None or connection.closed or connection.invalidated:
            return
        wire = wire_of(connection.connection)
        if wire is None:
            return
        if wire.given_up:
            context.is_disconnect = True
            context.invalidate_pool_on_disconnect = False
        elif isinstance(error, Exception) and not isinstance(error, wire.module.Error):
            context.is_disconnect = False  # nothing was sent, or all was read: see Wire.within()


def _info_of(proxied: Any) -> dict[Any, Any]:
    try:
        found: dict[Any, Any] = proxied.info
    except NotImplementedError:  # SQLAlchemy's own, while it asks a new server what it can
        return {}
    return found
