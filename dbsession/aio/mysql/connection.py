"""An open connection to MySQL or MariaDB, of which an answer is expected by some time."""

from __future__ import annotations

import asyncio
import select
import weakref
from collections.abc import Callable
from contextvars import Context
from typing import Any

from sqlalchemy.engine import Connection
from sqlalchemy.util import await_only

from dbsession.core.backends.mysql_sent import Sent
from dbsession.core.config import DatabaseConfig
from dbsession.core.connection_info import DOOMED
from dbsession.core.outcome import is_autocommit
from dbsession.errors import UsedByTwo, driver_number

# The drivers' number of an answer that does not fit the question, CR_COMMANDS_OUT_OF_SYNC.
_OUT_OF_SYNC = 2014
# That of a connection that was lost, CR_SERVER_LOST, and what to say where uvloop raises a RuntimeError for a write to
# one that was reset, which aiomysql passes on as it is.
_RESET = 2013, "Lost connection to MySQL server: it was reset"


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
        "asking",
        "given_up",
        "late",
        "module",
        "pinging",
        "sent",
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
        self.sent: Sent | None = getattr(driver, "sent", None)
        self.asking = False
        """Somebody waits for an answer."""
        self.late = False
        """It was closed for its silence."""
        self.given_up = False
        """It was closed by us, for its silence or since nobody knows what comes next on it, which says nothing of the
        pool's other connections."""
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
        """Return what `ask(*arguments)` does, and close the connection when that takes longer, or when whatever ends it
        leaves open whether there is more to read: not when nothing was sent, as a parameter cannot be encoded, say.
        `answers`: the server has answered something then; other calls may send nothing, as a ROLLBACK of a connection
        in AUTOCOMMIT.

        Raises:
            UsedByTwo: [DBS-TWO] somebody else waits for an answer; they would get each other's.
        """
        if self.asking:
            raise UsedByTwo("A question to the server")
        earlier = self.expect(seconds)
        self.asking = True
        sent = self.sent
        before = None if sent is None else sent.count
        try:
            found = ask(*arguments)
            if answers:
                self._heard = self._asked
            return found
        except BaseException as error:
            if isinstance(error, RuntimeError) and self.transport.is_closing():
                raise self.module.OperationalError(*_RESET) from error
            if self._may_have_more(error, before):
                self.give_up()
            raise
        finally:
            self.asking = False
            self._due = earlier

    def _may_have_more(self, error: BaseException, before: int | None) -> bool:
        """Whether something may be left to read after this error, `before` which so many commands had been sent: not
        after one of the server's, which has a number, nor where nothing was sent and no stream is read."""
        if isinstance(error, self.module.Error) and driver_number(error) not in (None, _OUT_OF_SYNC):
            return False
        return self.sent is None or self.sent.count != before or self.unread is not None

    def give_up(self) -> None:
        """Close the connection: whoever waits for an answer on it gets the driver's error of a lost connection."""
        self.given_up = True
        driver = self._driver()
        if driver is not None:
            self.cut_off(driver)

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
        return not look.poll(0) and not _read_ahead(self._driver())

    def _look(self) -> None:
        self._timer = None
        driver = self._driver()
        if self._due is None or driver is None:
            return
        if self._loop.time() < self._due:
            self._timer = self._loop.call_at(self._due, self._look, context=self._context)
        else:
            self.late = True
            self.give_up()

    def cut_off(self, driver: Any) -> None:
        driver.close()
        self.transport.abort()  # close() alone waits until what the server does not read is sent


class Stream:
    """A server-side cursor whose fetches are bounded, one by one. Lives as long as its result."""

    def __init__(self, cursor: Any, wire: Wire, seconds: float, reader: Connection, config: DatabaseConfig) -> None:
        self._cursor = cursor
        self._wire = wire
        self._seconds = seconds
        self._reader = weakref.ref(reader)
        self._config = config

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
        """Read what is left, later results included. SQLAlchemy only logs an error that is met here, so half of a unit
        of work would be committed."""
        try:
            self._read(self._cursor.close, to_the_end=True)
        except self._wire.module.Error as error:
            reader = self._reader()
            if reader is not None and reader.in_transaction() and not is_autocommit(reader, self._config):
                reader.info[DOOMED] = type(error)(*error.args)
            raise

    def _read(self, read: Callable[..., Any], *arguments: Any, to_the_end: bool = False) -> Any:
        found = self._wire.within(self._seconds, read, *arguments)
        if (to_the_end or not found) and self._wire.unread is self._reader:
            self._wire.unread = None
        return found


def has_later_results(cursor: Any) -> bool:
    """Whether the answer to what an adapter's cursor has executed goes on after its first result."""
    result = getattr(getattr(cursor, "_cursor", None), "_result", None)
    return result is not None and bool(result.has_next) and not cursor.server_side


def read_later_results(cursor: Any) -> None:
    """Read the results after the first one, whose rows and description stay, and drop them."""
    await_only(cursor._async_soft_close())


def wire_of(connection: Any) -> Wire | None:
    """Return the Wire behind SQLAlchemy's adapter or the pool's proxy; None if it was not opened within our bounds, or
    is gone."""
    adapted = getattr(connection, "dbapi_connection", connection)
    return getattr(getattr(adapted, "driver_connection", None), "_dbsession_wire", None)


def _read_ahead(driver: Any) -> bool:
    """Whether a driver has received what nobody has read: somebody has used it behind our back."""
    reader = getattr(driver, "_reader", None)  # of aiomysql
    if reader is not None:
        return bool(reader._buffer)
    received = getattr(driver, "_proto", None)
    return received is not None and received.length > received.pos


def transport_of(driver: Any) -> Any:
    """Return the transport of a driver's open connection: a private attribute, since nothing public tells it."""
    writer = getattr(driver, "_writer", None)  # of aiomysql
    return driver._transport if writer is None else writer.transport
