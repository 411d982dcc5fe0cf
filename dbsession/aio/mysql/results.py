"""What a statement gets in asyncio: server-side cursors that know whether they were read to their end, and the results
after the first one."""

from __future__ import annotations

import asyncio
import sys
import weakref
from collections import deque
from collections.abc import Callable
from functools import cache, partial
from typing import Any

from sqlalchemy.engine import Connection
from sqlalchemy.util import await_only

from dbsession.aio.holders import outermost_of, running_here
from dbsession.aio.mysql.connection import Wire, wire_of
from dbsession.core.backends.base import Backend
from dbsession.core.connection_info import DOOMED, UNTOLD
from dbsession.core.interceptors import StatementNotes
from dbsession.core.outcome import is_autocommit
from dbsession.core.pool import callsites
from dbsession.errors import ResultCut, UsedByTwo, describe

ROLLED_BACK = "its transaction was rolled back"
_AT_HAND = 100  # rows of a stream's rest that are worth reading to keep its connection
_AT_HAND_S = 0.05


class Stream:
    """A server-side cursor whose fetches are bounded, one by one, and which knows whether it was read to its end. Lives
    as long as its result."""

    def __init__(self, cursor: Any, wire: Wire, seconds: float, reader: Connection, backend: Backend) -> None:
        self._cursor = cursor
        self._wire = wire
        self._seconds = seconds
        self._reader = weakref.ref(reader)
        self._backend = backend
        self._ended = True  # until something was executed that gives rows
        self._cut: str | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cursor, name)

    def execute(self, *arguments: Any) -> Any:
        found = self._cursor.execute(*arguments)  # bounded as a statement
        if self._cursor.description is not None:
            self._ended = False
            self._wire.unread, self._wire.stream = self._reader, weakref.ref(self)
        return found

    def fetchone(self) -> Any:
        row = self._read(self._cursor.fetchone)
        if row is None:
            self._end()
        return row

    def fetchmany(self, size: int | None = None) -> Any:
        rows = self._read(self._cursor.fetchmany, size)
        if len(rows) < (self._cursor.arraysize if size is None else size):
            self._end()
        return rows

    def fetchall(self) -> Any:
        rows = self._read(self._cursor.fetchall)
        self._end()
        return rows

    def close(self) -> None:
        """Read what is left, later results included. SQLAlchemy only logs an error that is met here, so half of a unit
        of work would be committed."""
        if self._cut is not None:
            return  # the connection is somebody else's by now, or closed
        try:
            self._wire.within(self._seconds, self._cursor.close)
        except self._wire.module.Error as error:
            reader = self._reader()
            if reader is not None and reader.in_transaction() and not is_autocommit(reader, self._backend):
                reader.info[DOOMED] = untold = type(error)(*error.args)
                setattr(untold, UNTOLD, True)
            raise
        finally:
            self._end()

    def cut_by(self, why: str) -> None:
        """Note that `why` keeps the rows that are left from whoever may still fetch them."""
        if not self._ended and self._cut is None:
            task = asyncio.current_task(self._wire._loop)
            # Beyond the task there is only who runs the loop.
            call = None if task is None else callsites.call(running_here(sys._getframe(1), outermost_of(task)))
            self._cut = why if call is None else f"{why} ({call})"

    def finish_at_hand(self) -> bool:
        """Read what is left if it has come already, or comes within a moment, and is little; return whether it was."""
        try:
            rows = self._wire.within(self._seconds, await_only, self._few())
        except (TimeoutError, self._wire.module.Error):
            return False
        if len(rows) == _AT_HAND:
            return False
        if rows:
            self.cut_by(ROLLED_BACK)
        self._end()
        return True

    async def _few(self) -> Any:
        async with asyncio.timeout(_AT_HAND_S):
            return await self._cursor._cursor.fetchmany(_AT_HAND)

    def _read(self, read: Callable[..., Any], *arguments: Any) -> Any:
        if self._cut is None and not self._ended and self._wire.transport.is_closing():
            self.cut_by("its connection was closed or lost")
        if self._cut is not None:
            raise ResultCut.because(self._cut)
        try:
            return self._wire.within(self._seconds, read, *arguments)
        except BaseException as error:
            if not isinstance(error, UsedByTwo):
                self.cut_by(f"{describe(error)} ended the wait for its rows")
            raise

    def _end(self) -> None:
        self._ended = True
        if self._wire.unread is self._reader:
            self._wire.unread = self._wire.stream = None


def context_class(inner: Any, backend: Any) -> Any:
    """Return the dialect's class of execution contexts with server-side cursors that are bounded by `backend`, and in
    which a statement has failed where any of its results has: the drivers read the later ones as a cursor is closed."""

    class Context(inner):  # type: ignore[misc]  # of Any: the dialect's
        def post_exec(self) -> None:
            super().post_exec()
            cursor = self.cursor
            # Whether the answer goes on after its first result.
            result = getattr(getattr(cursor, "_cursor", None), "_result", None)
            if result is not None and result.has_next and not cursor.server_side:
                self._rowcount = cursor.rowcount  # that of the first, as a driver's cursor is one for all
                read = partial(StatementNotes.executing, read_later_results)
                backend.executing(read, cursor, self.statement, None, self)

        def create_server_side_cursor(self) -> Any:
            cursor = super().create_server_side_cursor()
            proxied = self.root_connection.connection
            wire = wire_of(proxied)
            if wire is None:
                return cursor
            return Stream(cursor, wire, backend.read_s_of(proxied), self.root_connection, backend)

    return Context


def read_later_results(cursor: Any, *_: object) -> None:
    """Read the results after the first one of an adapter's cursor, whose rows and description stay, and drop them."""
    await_only(cursor._async_soft_close())


@cache
def quick_class(adapter: Any) -> Any:
    """Return SQLAlchemy's class of adapted connections with cursors that leave the greenlet only where there is
    something to wait for: asyncmy's have nothing to do as they are opened, nor when one result was all, and SQLAlchemy
    awaits both. Another driver's class is returned as it is."""
    driver = sys.modules.get("asyncmy.cursors")
    if driver is None or adapter.__module__ != "sqlalchemy.dialects.mysql.asyncmy":
        return adapter
    stock = driver.Cursor

    class QuickCursor(adapter._cursor_cls):  # type: ignore[misc]  # of Any: SQLAlchemy's
        __slots__ = ()

        def _aenter_cursor(self, cursor: Any) -> Any:
            return cursor if type(cursor) is stock else super()._aenter_cursor(cursor)

        async def _execute_async(self, operation: Any, parameters: Any) -> Any:
            # SQLAlchemy's, without `async with`, which makes two coroutines more.
            cursor, mutex = self._cursor, self._adapt_connection._execute_mutex
            await mutex.acquire()
            try:
                if parameters is None:
                    result = await cursor.execute(operation)
                else:
                    result = await cursor.execute(operation, parameters)
                if cursor.description:
                    self._rows = deque(await cursor.fetchall())  # type: ignore[misc]  # a slot of its base
                return result
            finally:
                mutex.release()

        def close(self) -> None:
            cursor = self._cursor
            if type(cursor) is not stock or ((result := cursor._result) is not None and result.has_next):
                super().close()
                return
            self._rows.clear()
            if not self._soft_closed_memoized:
                cursor.connection = None  # all that its close() does then

    class QuickConnection(adapter):  # type: ignore[misc]  # of Any: SQLAlchemy's
        __slots__ = ()
        _cursor_cls = QuickCursor

    return QuickConnection
