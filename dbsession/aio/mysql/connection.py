"""An open connection to MySQL or MariaDB, of which an answer is expected by some time."""

from __future__ import annotations

import asyncio
import select
import weakref
from collections.abc import Callable
from contextvars import Context
from typing import Any

from sqlalchemy.engine import Connection


class Wire:
    """An open connection of a driver, and until when an answer has to come. Lives as long as it. Written in the loop's
    own thread, and nothing awaits between reading and writing.

    Its timer outlives the answers that it is set for, and looks when it is time what is expected by then: making one
    for each statement would take as long as the rest of what we do with a statement.
    """

    __slots__ = (
        "_asked",
        "_context",
        "_driver",
        "_due",
        "_heard",
        "_loop",
        "_timer",
        "late",
        "module",
        "pinging",
        "transport",
        "unread",
    )

    def __init__(self, driver: Any, module: Any) -> None:
        self.module = module
        """The DBAPI module, for its errors."""
        self._driver = weakref.ref(driver)
        self._loop = asyncio.get_running_loop()
        self._context = Context()  # empty: the timer would keep that of the request in which it was started
        self._due: float | None = None
        self._asked = self._heard = float("-inf")  # when something was asked; the same of the last that was answered
        self._timer: asyncio.TimerHandle | None = None
        self.transport: asyncio.WriteTransport = transport_of(driver)
        self.late = False
        """It was closed for its silence, which says nothing of the pool's other connections."""
        self.pinging = False
        """A ping was sent that is not answered."""
        self.unread: weakref.ref[Connection] | None = None
        """Who reads the rows of a server-side cursor that have not all been sent yet."""

    def expect(self, seconds: float) -> float | None:
        """From now on, until `done()`: close the connection when the answer is not there in so many seconds. Returns
        until when what this is a part of is expected."""
        self._asked = now = self._loop.time()
        earlier, due = self._due, now + seconds
        if earlier is not None and earlier < due:
            due = earlier
        self._due = due
        if self._timer is None:
            self._timer = self._loop.call_at(due, self._look, context=self._context)
        elif self._timer.when() > due:
            self._timer.cancel()
            self._timer = self._loop.call_at(due, self._look, context=self._context)
        return earlier

    def done(self) -> None:
        """Expect nothing any more."""
        self._due = None

    def within(self, seconds: float, ask: Callable[..., Any], *arguments: Any, answers: bool = False) -> Any:
        """Return what `ask(*arguments)` does, and close the connection when that takes longer. `answers`: the server
        has answered something then; other calls may send nothing, as a ROLLBACK of a connection in AUTOCOMMIT."""
        earlier = self.expect(seconds)
        try:
            found = ask(*arguments)
            if answers:
                self._heard = self._asked
            return found
        finally:
            self._due = earlier

    def lives(self, seconds: float) -> bool:
        """Whether it, which is not closed here, answered to something asked less than so many seconds ago, and is not
        readable since: it would be, had the server closed it. Waits for nobody."""
        if self._loop.time() - self._heard >= seconds:
            return False
        socket = self.transport.get_extra_info("socket")
        if socket is None or not hasattr(select, "poll"):  # nothing to look at, or by: not on Windows
            return False
        look = select.poll()
        look.register(socket.fileno(), select.POLLIN)
        return not look.poll(0)

    def _look(self) -> None:
        self._timer = None
        driver = self._driver()
        if self._due is None or driver is None:
            return
        if self._loop.time() < self._due:
            self._timer = self._loop.call_at(self._due, self._look, context=self._context)
        else:
            self.late = True
            self.cut_off(driver)

    def cut_off(self, driver: Any) -> None:
        driver.close()
        self.transport.abort()  # close() alone waits until what the server does not read is sent


class Stream:
    """A server-side cursor whose fetches are bounded, one by one. Lives as long as its result."""

    def __init__(self, cursor: Any, wire: Wire, seconds: float, reader: Connection) -> None:
        self._cursor = cursor
        self._wire = wire
        self._seconds = seconds
        self._reader = weakref.ref(reader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cursor, name)

    def execute(self, *arguments: Any) -> Any:
        found = self._cursor.execute(*arguments)  # bounded as a statement
        if self._cursor.description is not None:
            self._wire.unread = self._reader
        return found

    def fetchone(self) -> Any:
        return self._read(self._cursor.fetchone)

    def fetchmany(self, size: int | None = None) -> Any:
        return self._read(self._cursor.fetchmany, size)

    def fetchall(self) -> Any:
        return self._read(self._cursor.fetchall, to_the_end=True)

    def close(self) -> None:
        self._read(self._cursor.close, to_the_end=True)  # reads what is left

    def _read(self, read: Callable[..., Any], *arguments: Any, to_the_end: bool = False) -> Any:
        found = self._wire.within(self._seconds, read, *arguments)
        if (to_the_end or not found) and self._wire.unread is self._reader:
            self._wire.unread = None
        return found


def wire_of(connection: Any) -> Wire | None:
    """Return the Wire behind SQLAlchemy's adapter or the pool's proxy; None if it was not opened within our bounds, or
    is gone."""
    adapted = getattr(connection, "dbapi_connection", connection)
    return getattr(getattr(adapted, "driver_connection", None), "_dbsession_wire", None)


def transport_of(driver: Any) -> Any:
    """Return the transport of a driver's open connection: a private attribute, since nothing public tells it."""
    writer = getattr(driver, "_writer", None)  # of aiomysql
    return driver._transport if writer is None else writer.transport
