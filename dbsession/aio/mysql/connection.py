"""An open connection to MySQL or MariaDB, of which an answer is expected by some time."""

from __future__ import annotations

import asyncio
import select
import weakref
from collections.abc import Callable
from time import monotonic
from typing import Any

from sqlalchemy.engine import Connection

from dbsession.aio.timer import AnswerTimer
from dbsession.core.backends.mysql_sent import Sent
from dbsession.core.connection_info import HUNG_UP
from dbsession.errors import UsedByTwo, describe, driver_number

# The drivers' number of an answer that does not fit the question, CR_COMMANDS_OUT_OF_SYNC.
_OUT_OF_SYNC = 2014
# That of a connection that was lost, CR_SERVER_LOST, and what to say where uvloop raises a RuntimeError for a write to
# one that was reset, which aiomysql passes on as it is.
_RESET = 2013, "Lost connection to MySQL server: it was reset"

NOT_KNOWN = -1


class Wire(AnswerTimer):
    """An open connection of a driver, and until when an answer has to come. Lives as `AnswerTimer` says."""

    __slots__ = (
        "_asked",
        "_driver",
        "_heard",
        "_hung_up",
        "_readable",
        "asking",
        "committer",
        "ended_at",
        "given_up",
        "late",
        "module",
        "pinging",
        "reopen",
        "sent",
        "stream",
        "transport",
        "unread",
    )

    def __init__(self, driver: Any, module: Any) -> None:
        super().__init__()
        self.module = module
        """The DBAPI module, for its errors."""
        self._driver = weakref.ref(driver)
        self._asked = self._heard = float("-inf")  # when something was asked; the same of the last that was answered
        self._readable: Any = None
        self._hung_up: Any = None
        self.transport: asyncio.WriteTransport = transport_of(driver)
        self.sent: Sent | None = getattr(driver, "sent", None)
        self.ended_at = NOT_KNOWN
        """`sent.count` when a transaction of SQLAlchemy's had ended, if none was begun since then; else NOT_KNOWN."""
        self.asking = False
        """Somebody waits for an answer."""
        self.committer: Any = None
        """The task that is in a commit(), which may ask a question of ours before it sends COMMIT."""
        self.late = False
        """It was closed for its silence."""
        self.given_up = False
        """It was closed by us, for its silence or since nobody knows what comes next on it, which says nothing of the
        pool's other connections."""
        self.reopen: Callable[[Any], Any] | None = None
        """Opens a side connection to end this one's statement, with its own arguments; to be awaited."""
        self.pinging = False
        """A ping was sent that is not answered."""
        self.unread: weakref.ref[Connection] | None = None
        """Who reads the rows of a server-side cursor that have not all been sent yet."""
        self.stream: weakref.ref[Any] | None = None
        """That cursor, a `results.Stream`."""

    @property
    def streaming(self) -> bool:
        """Whether the rows of a server-side cursor have not all been sent yet."""
        return self.unread is not None

    def expect(self, seconds: float | None) -> float | None:
        self._asked = monotonic()
        return super().expect(seconds)

    def within(
        self, seconds: float, ask: Callable[..., Any], *arguments: Any, answers: bool = False, ends: bool = False
    ) -> Any:
        """Return what `ask(*arguments)` does, and close the connection when that takes longer, or when whatever ends it
        leaves open whether there is more to read: not when nothing was sent, as a parameter cannot be encoded, say.
        `answers`: the server has answered something then; other calls may send nothing, as a ROLLBACK of a connection
        in AUTOCOMMIT. `ends`: it may be the end of a transaction.

        Raises:
            UsedByTwo: [DBS-TWO] somebody else waits for an answer; they would get each other's. Where it `ends`, the
                connection is closed, and the server rolls back: SQLAlchemy sends no ROLLBACK after a commit() that has
                failed.
        """
        if self.asking:
            if ends:
                self.give_up("another task ended its transaction in the middle of an answer")
            raise UsedByTwo("A statement" if answers else "The end of a transaction" if ends else "A fetch")
        # As expect(), without its call: this is done for each statement.
        self._asked = now = monotonic()
        earlier, due = self._due, now + seconds
        if earlier is not None and earlier < due:
            due = earlier
        self._due = due
        if self._looks > due:
            self._look_at(due, now)
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
                self.give_up(f"{describe(error)} ended a wait on its connection")
            raise
        finally:
            self.asking = False
            self._due = earlier

    def note_end(self) -> None:
        """Note that a COMMIT or ROLLBACK was answered, if that has left no transaction open."""
        driver = self._driver()
        if self.sent is not None and driver is not None and driver.settled:
            self.ended_at = self.sent.count

    def _may_have_more(self, error: BaseException, before: int | None) -> bool:
        """Whether something may be left to read after this error, `before` which so many commands had been sent: not
        after one of the server's, which has a number, nor where nothing was sent and no stream is read."""
        if isinstance(error, self.module.Error) and driver_number(error) not in (None, _OUT_OF_SYNC):
            return False
        return self.sent is None or self.sent.count != before or self.unread is not None

    def give_up(self, why: str = "its connection was closed") -> None:
        """Close the connection: whoever waits for an answer on it gets the driver's error of a lost connection."""
        self.given_up = True
        driver = self._driver()
        if driver is not None:
            self.cut_off(driver, why)

    def lives(self, seconds: float) -> bool:
        """Return whether the connection, which is not closed here, answered to something asked less than so many
        seconds ago, and is not readable since: it would be, had the server closed it. Waits for nobody."""
        if monotonic() - self._heard >= seconds:
            return False
        if self._readable is None:
            self._readable = self._poll_for(getattr(select, "POLLIN", 0))
        if self._readable is None:
            return False
        return not self._readable.poll(0) and not _read_ahead(self._driver())

    def was_closed(self) -> bool:
        """Return whether the server or we have closed the connection, whatever of it is unread. Waits for nobody."""
        if self.transport.is_closing():
            return True
        if self._hung_up is None:
            self._hung_up = self._poll_for(HUNG_UP)
        return self._hung_up is not None and bool(self._hung_up.poll(0))

    def _poll_for(self, events: int) -> Any:
        """Return what looks for these events on the socket, as long as it is open; None: there is nothing to look at,
        or by, as on Windows."""
        socket = self.transport.get_extra_info("socket")
        if socket is None or not hasattr(select, "poll"):
            return None
        look = select.poll()
        look.register(socket.fileno(), events)
        return look

    def is_of_use(self) -> bool:
        return self._driver() is not None

    def too_late(self) -> None:
        self.late = True
        self.give_up("no answer came in time on its connection")

    def cut_stream(self, why: str) -> None:
        """Note that nobody gets the rest of the server-side cursor under way, if there is one."""
        stream = None if self.stream is None else self.stream()
        if stream is not None:
            stream.cut_by(why)
        self.unread = self.stream = None

    def cut_off(self, driver: Any, why: str = "its connection was closed") -> None:
        self.cut_stream(why)
        driver.close()
        self.transport.abort()  # close() alone waits until what the server does not read is sent


def wire_of(connection: Any) -> Wire | None:
    """Return the Wire behind SQLAlchemy's adapter or the pool's proxy; None if it was not opened within our bounds, or
    is gone."""
    adapted = getattr(connection, "dbapi_connection", connection)
    # `_connection` is what its property `driver_connection` gives.
    return getattr(getattr(adapted, "_connection", None), "_dbsession_wire", None)


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
