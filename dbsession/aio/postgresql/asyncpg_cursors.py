"""SQLAlchemy's adapters of asyncpg's cursors, of which each wait is bounded by their connection.

`_adapt_connection` is a `Adapted` of `asyncpg_adapted`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from sqlalchemy.dialects.postgresql.asyncpg import AsyncAdapt_asyncpg_cursor, AsyncAdapt_asyncpg_ss_cursor

from dbsession.errors import ResultCut

exceptions: Any = import_module("asyncpg").exceptions  # which has no types


class Cursor(AsyncAdapt_asyncpg_cursor):
    """Bounds the wait for its rows. Lives as long as they are read."""

    __slots__ = ()

    _adapt_connection: Any

    def execute(self, operation: Any, parameters: Any = None) -> None:
        connection = self._adapt_connection
        connection.driver_connection.note(operation)
        connection.ask(self._prepare_and_execute(operation, parameters))  # type: ignore[no-untyped-call]

    def executemany(self, operation: Any, seq_of_parameters: Any) -> Any:
        connection = self._adapt_connection
        connection.driver_connection.note(operation)
        return connection.ask(self._executemany(operation, seq_of_parameters))  # type: ignore[no-untyped-call]


class StreamCursor(AsyncAdapt_asyncpg_ss_cursor):
    """A server-side cursor, each fetch of which is bounded. Lives until it is closed, at most as long as its
    transaction."""

    __slots__ = ()

    _adapt_connection: Any

    def execute(self, operation: Any, parameters: Any = None) -> None:
        connection = self._adapt_connection
        connection.driver_connection.note(operation)
        connection.ask(self._prepare_and_execute(operation, parameters))  # type: ignore[no-untyped-call]
        if self._cursor is not None:
            connection.driver_connection.streams += 1
            self._cursor = _Rows(self._cursor, connection)

    def close(self) -> None:
        if self._cursor is not None:
            self._adapt_connection.driver_connection.streams -= 1
        super().close()  # type: ignore[no-untyped-call]


class _Rows:
    """What SQLAlchemy fetches the rows of a server-side cursor from. Lives as long as the cursor."""

    def __init__(self, cursor: Any, connection: Any) -> None:
        self._cursor = cursor
        self._connection = connection

    async def fetch(self, size: int) -> Any:
        connection = self._connection
        if connection.gave_up:
            raise ResultCut.because("its connection was given up in the middle of a statement")
        try:
            return await connection.within(self._cursor.fetch(size))
        except (exceptions.InvalidCursorNameError, exceptions.NoActiveSQLTransactionError) as error:
            raise ResultCut.because("its transaction was committed or rolled back") from error
        except Exception as error:
            connection._handle_exception(error)
