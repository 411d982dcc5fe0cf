"""psycopg2's cursors on a connection of ours: whatever they send is noted, and a BEGIN that is due goes with it."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import psycopg2
from psycopg2 import extensions
from psycopg2.extensions import TRANSACTION_STATUS_INTRANS

from dbsession.errors import ResultCut
from dbsession.green.postgresql.psycopg2_watch import call_watched


class Rides:
    """Before a cursor class of psycopg2's among the bases of ours. Lives as long as its result is read."""

    connection: Any
    mogrify: Any

    def execute(self, query: Any, vars: Any = None) -> None:
        connection = self.connection
        if not isinstance(query, str):
            query = self._text_of(query)
        begin, changes = connection.before(query)
        if changes:
            connection.sent.note_change(self.mogrify(query, vars) if vars else query.encode())
        try:
            whole = f"{begin};{query}" if begin else query
            if connection.blocks:
                call_watched(connection, super().execute, whole, vars)  # type: ignore[misc]
            else:
                super().execute(whole, vars)  # type: ignore[misc]
        except BaseException:
            connection.after_error(begin)
            raise

    def executemany(self, query: Any, vars_list: Any) -> None:
        self._begin(query)
        if self.connection.blocks:
            call_watched(self.connection, super().executemany, query, vars_list)  # type: ignore[misc]
        else:
            super().executemany(query, vars_list)  # type: ignore[misc]

    def callproc(self, *args: Any, **kwargs: Any) -> Any:
        self._begin("CALL")
        return super().callproc(*args, **kwargs)  # type: ignore[misc]

    def copy_from(self, *args: Any, **kwargs: Any) -> None:
        self._begin("COPY")
        super().copy_from(*args, **kwargs)  # type: ignore[misc]

    def copy_to(self, *args: Any, **kwargs: Any) -> None:
        self._begin("COPY")
        super().copy_to(*args, **kwargs)  # type: ignore[misc]

    def copy_expert(self, *args: Any, **kwargs: Any) -> None:
        self._begin("COPY")
        super().copy_expert(*args, **kwargs)  # type: ignore[misc]

    def _begin(self, query: Any) -> None:
        """Begin the transaction in a round trip of its own: psycopg2 itself makes the text that comes."""
        query = self._text_of(query)
        begin, changes = self.connection.before(query)
        if begin:
            self.connection.command(begin)
        if changes:
            self.connection.sent.note_change(query.encode())

    def _text_of(self, query: Any) -> str:
        if isinstance(query, bytes):
            return query.decode(extensions.encodings.get(self.connection.encoding, "utf-8"))
        return query if isinstance(query, str) else str(query.as_string(self))


class Named(Rides):
    """A named cursor, whose rows are fetched piece by piece: psycopg2's own refuses a connection in autocommit mode,
    which ours are to it. Lives as long as its transaction, at most; with `withhold` until it is closed."""

    arraysize: int
    closed: bool

    # In the place of psycopg2's own attributes.
    name: str = ""
    withhold: bool = False
    scrollable: bool | None = None
    itersize: int = 2000

    _declared = False
    _mark = 0

    def declared(self, name: str, withhold: bool, scrollable: bool | None) -> None:
        """Give it what psycopg2's connection.cursor() was asked for."""
        self.name, self.withhold, self.scrollable = name, withhold, scrollable

    def execute(self, query: Any, vars: Any = None) -> None:
        connection = self.connection
        if self._declared:
            raise psycopg2.ProgrammingError("can't call .execute() on named cursors more than once")
        if connection.autocommit and not self.withhold:
            raise psycopg2.ProgrammingError("can't use a named cursor outside of transactions")
        self._name = extensions.quote_ident(self.name, connection)
        scroll = {None: "", True: "SCROLL ", False: "NO SCROLL "}[self.scrollable]
        declare = f"DECLARE {self._name} {scroll}CURSOR {'WITH' if self.withhold else 'WITHOUT'} HOLD FOR "
        if vars:
            declare = declare.replace("%", "%%")
        super().execute(declare + self._text_of(query), vars)
        self._declared = True
        self._mark = connection.mark
        connection.streams.add(self)

    def executemany(self, query: Any, vars_list: Any) -> None:
        raise psycopg2.ProgrammingError("can't call .executemany() on named cursors")

    def _step(self, text: str) -> None:
        if not self._declared:
            raise psycopg2.ProgrammingError("no results to fetch")
        if self.connection.gave_up:
            raise ResultCut.because("its connection was given up in the middle of a statement")
        if self._mark != self.connection.mark and not self.withhold:
            raise ResultCut.because("its transaction was committed or rolled back")
        super().execute(f"{text} FROM {self._name}")

    def fetchone(self) -> Any:
        self._step("FETCH FORWARD 1")
        return super().fetchone()  # type: ignore[misc]

    def fetchmany(self, size: int | None = None) -> Any:
        size = self.arraysize if size is None else size
        self._step(f"FETCH FORWARD {size:d}")
        return super().fetchmany(size)  # type: ignore[misc]

    def fetchall(self) -> Any:
        self._step("FETCH FORWARD ALL")
        return super().fetchall()  # type: ignore[misc]

    def __iter__(self) -> Any:
        while True:
            rows = self.fetchmany(self.itersize)
            yield from rows
            if len(rows) < self.itersize:
                return

    def __next__(self) -> Any:
        row = self.fetchone()
        if row is None:
            raise StopIteration
        return row

    def scroll(self, value: int, mode: str = "relative") -> None:
        if mode not in ("relative", "absolute"):
            raise psycopg2.ProgrammingError("scroll mode must be 'relative' or 'absolute'")
        self._step(f"MOVE {'ABSOLUTE ' if mode == 'absolute' else ''}{value:d}")

    def close(self) -> None:
        connection = self.connection
        alive = self._declared and not self.closed and connection.open
        if alive and (self.withhold or self._mark == connection.mark):
            self._declared = False
            if self.withhold or connection.get_transaction_status() == TRANSACTION_STATUS_INTRANS:
                super().execute(f"CLOSE {self._name}")
        super().close()  # type: ignore[misc]


class Cursor(Rides, extensions.cursor):
    """A cursor that has all of its rows. Lives as long as they are read."""


@lru_cache(maxsize=64)
def ours(factory: Any, named: bool = False) -> Any:
    """Return the class of cursors by a `cursor_factory` of the user's, on a connection of ours."""
    if not isinstance(factory, type):
        return factory  # a function, whose cursors we do not know
    kind = Named if named else Rides
    return factory if issubclass(factory, kind) else type(factory.__name__, (kind, factory), {})
