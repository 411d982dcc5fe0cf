"""What a psycopg 3 cursor of ours does, in either half: a BEGIN goes with its statement, and one that was cut says so.

The names with an underscore are psycopg's; each has its line in tests/unit/test_private_names.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from psycopg import Column, errors, generators

from dbsession.core.backends.postgresql_errors import CHANGED_RESULT, STALE
from dbsession.errors import ResultCut

_PREPARE_NOW = 3  # psycopg._preparing.Prepare.SHOULD


class Columns(Sequence[Column]):
    """A cursor's `description`, made where somebody looks into it: SQLAlchemy knows the columns of its statements, and
    asks only whether there are any. Of the result that the cursor has now; lives as long as somebody has it."""

    __slots__ = ("_cursor", "_made", "pgresult")

    def __init__(self, cursor: Any) -> None:
        self._cursor = cursor
        self._made: list[Column] | None = None
        self.pgresult = cursor.pgresult

    # What a Column asks its cursor for, besides the result.

    @property
    def adapters(self) -> Any:
        return self._cursor.adapters

    @property
    def _encoding(self) -> str:
        return str(self._cursor._encoding)

    def _columns(self) -> list[Column]:
        if self._made is None:
            like: Any = self
            self._made = [Column(like, number) for number in range(self.pgresult.nfields)]
        return self._made

    def __getitem__(self, index: Any) -> Any:
        return self._columns()[index]

    def __len__(self) -> int:
        return int(self.pgresult.nfields)

    def __eq__(self, other: object) -> bool:
        return self._columns() == (other._columns() if isinstance(other, Columns) else other)

    __hash__ = None  # type: ignore[assignment]  # a list's

    def __repr__(self) -> str:
        return repr(self._columns())


class RidesAlong:
    """Before psycopg's Cursor or AsyncCursor among the bases of ours: its statement takes a BEGIN that is due with it,
    in one round trip. Lives as long as its result is read."""

    __slots__ = ()

    _conn: Any
    _pgconn: Any
    _query: Any
    _get_prepared: Any
    _execute_send: Any
    _send_query_prepared: Any
    _check_results: Any
    _set_results: Any
    pgresult: Any

    @property
    def description(self) -> Any:
        """The columns of the current result, as psycopg has it."""
        result = self.pgresult
        return Columns(self) if result is not None and result.nfields else super().description  # type: ignore[misc]

    def _execute_gen(self, *args: Any, **kwargs: Any) -> Any:
        connection = self._conn
        connection._sees, connection._defers = True, connection._pipeline is None
        try:
            yield from super()._execute_gen(*args, **kwargs)  # type: ignore[misc]
        except errors.DatabaseError as error:
            if error.sqlstate in STALE:
                forget_prepared(connection, self._query, error.sqlstate)
            raise
        finally:
            connection._sees = connection._defers = connection._due = False

    def _executemany_gen_pipeline(self, *args: Any) -> Any:
        return see(self, super()._executemany_gen_pipeline(*args))  # type: ignore[misc]

    def _executemany_gen_no_pipeline(self, *args: Any) -> Any:
        return see(self, super()._executemany_gen_no_pipeline(*args))  # type: ignore[misc]

    def _stream_send_gen(self, *args: Any, **kwargs: Any) -> Any:
        return see(self, super()._stream_send_gen(*args, **kwargs))  # type: ignore[misc]

    def _start_copy_gen(self, *args: Any) -> Any:
        return see(self, super()._start_copy_gen(*args))  # type: ignore[misc]

    def _maybe_prepare_gen(self, pgq: Any, *, prepare: Any = None, binary: Any = None) -> Any:
        connection, text = self._conn, pgq.query
        self._query = pgq
        kind = connection.note(text)
        if not connection._due:
            yield from super()._maybe_prepare_gen(pgq, prepare=prepare, binary=binary)  # type: ignore[misc]
            return
        connection._due = False
        how, name = self._get_prepared(pgq, prepare)
        # Several statements in one text need the protocol's simple query, which libpq's pipeline has not; COPY never
        # comes out of it, and a statement is prepared in a round trip of its own.
        if how == _PREPARE_NOW or (not pgq.params and b";" in text) or kind.copies:
            yield from connection._exec_command(connection._get_tx_start_command())
            yield from super()._maybe_prepare_gen(pgq, prepare=prepare, binary=binary)  # type: ignore[misc]
            return
        pgconn = self._pgconn
        pgconn.enter_pipeline_mode()
        pgconn.send_query_params(connection._get_tx_start_command(), None)
        if name:
            self._send_query_prepared(name, pgq, binary=binary)
        else:
            self._execute_send(pgq, force_extended=True, binary=binary)
        pgconn.pipeline_sync()
        prepared = connection._prepared
        key = prepared.maybe_add_to_cache(pgq, how, name)
        begun = yield from generators.execute(pgconn)
        results = yield from generators.fetch_many(pgconn)
        yield from generators.fetch_many(pgconn)  # the end of the pipeline
        pgconn.exit_pipeline_mode()
        self._check_results(begun)
        if key is not None:
            prepared.validate(key, how, name, results)
        self._check_results(results)
        self._set_results(results)


def see(cursor: Any, sends: Any) -> Any:
    """Drive a generator by which a cursor sends one statement, and note which. After it was sent: until it is answered
    nobody else gets the connection."""
    connection, cursor._query = cursor._conn, None
    connection._sees = True
    try:
        return (yield from sends)
    finally:
        connection._sees = False
        if cursor._query is not None:
            connection.note(cursor._query.query)


def forget_prepared(connection: Any, query: Any, state: str) -> None:
    """Prepare this statement anew when it comes again; psycopg would send it as it was, and it would fail for ever. The
    others are forgotten with the transaction."""
    connection._began_other = True
    prepared = connection._prepared
    name = None if query is None else prepared._names.pop(prepared.key(query), None)
    if name is not None and state == CHANGED_RESULT:
        prepared._to_flush.append(name)


class Named:
    """Before psycopg's ServerCursor or AsyncServerCursor among the bases of ours: one that its transaction's end has
    closed says so. Lives until it is closed, at most as long as its transaction."""

    __slots__ = ()

    _conn: Any

    def __init__(self, connection: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(connection, *args, **kwargs)  # type: ignore[call-arg]  # psycopg's
        connection.streams.add(self)

    def __del__(self, *_: Any) -> None:
        # psycopg's warns of one that was not closed; the end of the transaction closes these.
        pass

    def _declare_gen(self, *args: Any) -> Any:
        return see(self, super()._declare_gen(*args))  # type: ignore[misc]

    # Before the connection refuses whatever is asked of it.

    def fetchone(self) -> Any:
        self._refuse_if_cut()
        return super().fetchone()  # type: ignore[misc]

    def fetchmany(self, size: int = 0) -> Any:
        self._refuse_if_cut()
        return super().fetchmany(size)  # type: ignore[misc]

    def fetchall(self) -> Any:
        self._refuse_if_cut()
        return super().fetchall()  # type: ignore[misc]

    def _refuse_if_cut(self) -> None:
        if self._conn.gave_up:
            error = self._conn.given_up_by
            ended = f"{type(error).__name__} ended the wait for its rows, and " if error is not None else ""
            raise ResultCut.because(f"{ended}its connection was given up in the middle of a statement")

    def _fetch_gen(self, *args: Any) -> Any:
        try:
            return (yield from super()._fetch_gen(*args))  # type: ignore[misc]
        except errors.InvalidCursorName as error:
            raise ResultCut.because("its transaction was committed or rolled back") from error


@lru_cache(maxsize=64)
def ours(factory: Any) -> Any:
    """Return the class of cursors by a `cursor_factory` of the user's, on a connection of ours."""
    if not isinstance(factory, type) or issubclass(factory, RidesAlong):
        return factory  # of a function's cursors we see nothing
    return type(factory.__name__, (RidesAlong, factory), {})
