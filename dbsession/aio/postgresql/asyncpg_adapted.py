"""SQLAlchemy's adapter of an asyncpg connection, whose answers are expected by some time."""

from __future__ import annotations

import asyncio
import select
import weakref
from collections.abc import Callable, Coroutine
from functools import partial
from time import monotonic
from typing import Any, NoReturn

from sqlalchemy.dialects.postgresql.asyncpg import AsyncAdapt_asyncpg_connection
from sqlalchemy.util import await_

from dbsession.aio.postgresql.asyncpg_cursors import Cursor, StreamCursor, exceptions
from dbsession.aio.postgresql.interruptible import interruptible
from dbsession.aio.timer import AnswerTimer
from dbsession.core.backends.postgresql_errors import CLOSED_BEFORE_COMMIT, not_committed
from dbsession.core.connection_info import KnownConnection
from dbsession.errors import UsedByTwo, describe


class _Bound(AnswerTimer):
    """Bounds one question after the other of a connection. Lives as `AnswerTimer` says."""

    __slots__ = ("_of", "late", "task")

    def __init__(self, of: Adapted) -> None:
        super().__init__()
        self._of = weakref.ref(of)
        self.task: asyncio.Task[Any] | None = None
        """Who waits for an answer now."""
        self.late = False
        """That task was cancelled since it did not come."""

    def is_of_use(self) -> bool:
        return self._of() is not None

    def too_late(self) -> None:
        of = self._of()
        if self.task is not None:
            self.late = True
            self.task.cancel()
        elif of is not None:  # it is being set up, by SQLAlchemy or a listener
            of.driver_connection.terminate()


class Adapted(AsyncAdapt_asyncpg_connection, KnownConnection):
    """A connection of ours as SQLAlchemy uses it. Lives as long as it."""

    _cursor_cls: Any = Cursor
    _ss_cursor_cls: Any = StreamCursor

    def __init__(self, dbapi: Any, connection: Any, **more: Any) -> None:
        super().__init__(dbapi, connection, **more)  # type: ignore[no-untyped-call]
        self.database: str | None = None
        """Its name, for errors."""
        self.on_abandon: Callable[[Any], None] | None = None
        """Called with the driver's connection that is given up; has to close it. Must not wait."""
        self.read_timeout_s: float | None = None
        self.gave_up = self.commit_sent = False
        self._bound = _Bound(self)
        connection.on_interrupted = weakref.WeakMethod(self.give_up)

    # What is asked.

    def ask(self, work: Coroutine[Any, Any, Any], ends: bool = False) -> Any:
        """Return what `work`, a coroutine of the driver's, does, within the read timeout; see `within`. Waits."""
        return await_(self.within(work, ends))

    async def within(self, work: Coroutine[Any, Any, Any], ends: bool = False) -> Any:
        """Await `work`, a coroutine of the driver's. Whatever is thrown in meanwhile comes out as it is, and the
        connection is given up; so it is where the answer is not there within the read timeout.

        Raises:
            UsedByTwo: [DBS-TWO] somebody else waits for an answer. Where it `ends` the transaction, the connection is
                closed, and the server rolls back.
        """
        bound = self._bound
        if bound.task is not None:
            work.close()
            if ends:
                self.give_up(UsedByTwo("The end of a transaction"))
            raise UsedByTwo("The end of a transaction" if ends else "A statement")
        task: Any = asyncio.current_task()
        before, seconds = task.cancelling(), self.read_timeout_s
        earlier = bound.expect(seconds)
        bound.task = task
        try:
            found = await interruptible(work, self.give_up, self.driver_connection.terminate)
            self.driver_connection.heard = monotonic()
            return found
        except asyncio.CancelledError:
            if bound.late and task.uncancel() <= before:
                raise self.dbapi.OperationalError(
                    f"no answer from the server within {seconds or 0:g} s: the connection is given up"
                ) from None
            raise
        finally:
            bound.task, bound.late = None, False
            bound.done(earlier)

    def expect(self, seconds: float) -> None:
        """Close the connection unless it was set up, and `read_within()` called, in so many seconds."""
        self._bound.expect(seconds)

    def _handle_exception(self, error: Exception) -> NoReturn:
        if isinstance(error, OSError | exceptions.InternalClientError) and self.driver_connection.is_closed():
            self._transaction = None
            raise self.dbapi.OperationalError(f"the connection was lost: {describe(error)}") from error
        super()._handle_exception(error)

    # The ends of transactions.

    def commit(self) -> None:
        self.commit_sent = False
        if self._transaction is None:
            return
        driver = self.driver_connection
        if driver.was_closed():
            driver.terminate()
            raise self.dbapi.OperationalError(CLOSED_BEFORE_COMMIT)
        self.commit_sent = True
        self._end(partial(self._call_and_discard, self._transaction.commit))
        if driver.tag == "ROLLBACK":
            self.commit_sent = False
            raise not_committed(self.database)

    def rollback(self) -> None:
        driver = self.driver_connection
        if self.gave_up or driver.is_closed():
            self._transaction = None  # the server has lost it
        elif self._transaction is not None:
            self._end(partial(self._call_and_discard, self._transaction.rollback))
        elif driver.is_in_transaction():  # begun behind SQLAlchemy's back
            self._end(partial(driver.execute, "ROLLBACK"))

    def _end(self, end: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        try:
            self.ask(end(), ends=True)
        except UsedByTwo:
            raise
        except Exception as error:
            self._handle_exception(error)

    # Liveness, and the end.

    def ping(self, idle_s: float = 0.0, within_s: float = 10.0) -> None:
        """Raise an error if the connection is gone. One that answered less than `idle_s` seconds ago is looked at only.
        Waits where it is asked, for `within_s` seconds at most."""
        driver = self.driver_connection
        if driver.was_closed() or driver.is_in_transaction():
            driver.terminate()
            raise self.dbapi.OperationalError("the server has closed the connection")
        if monotonic() - driver.heard < idle_s and not driver.happened() & select.POLLIN:
            return
        before = self.read_within_at_most(within_s)
        driver.pinging = True
        try:
            self.ask(driver.execute("SELECT 1"))  # one round trip: no transaction, and nothing prepared
        except Exception as error:
            self._handle_exception(error)
        finally:
            driver.pinging = False
            self.read_timeout_s = before

    @property
    def is_changed(self) -> bool:
        """Whether its user has changed the session."""
        return bool(self.driver_connection.sent.changed)

    @property
    def can_be_reset(self) -> bool:
        """Whether a reset takes back what its user has changed."""
        return not self.driver_connection.prepares

    def reset(self) -> None:
        """Take back what the session has set, and set again what was set as it was opened. Waits."""
        self.ask(self._reset())

    async def _reset(self) -> None:
        driver = self.driver_connection
        await driver.reset()
        for text in driver.sent.settings or ():
            await driver.execute(text.decode())
        if driver.is_in_transaction():
            await driver.execute("COMMIT")

    def give_up(self, error: BaseException) -> None:
        """Close the connection, as nobody waits for the answer any more; asyncpg has the statement ended."""
        if not self.gave_up:
            self.gave_up, self._transaction = True, None
            if self.on_abandon is None:
                self.driver_connection.terminate()
            else:
                self.on_abandon(self.driver_connection)

    def close(self) -> None:
        """Close the connection without waiting. Idempotent; whoever gives it up has it closed."""
        self._transaction = None
        if not self.gave_up:
            self.driver_connection.terminate()

    terminate = close

    # As `KnownConnection` says.

    @property
    def settled(self) -> bool:
        """Whether it is known that no transaction is open."""
        driver = self.driver_connection
        return self._transaction is None and not driver.is_closed() and not driver.is_in_transaction()

    @property
    def open(self) -> bool:  # type: ignore[override]  # an attribute there
        return not self.gave_up and not self.driver_connection.is_closed()

    @property
    def unread(self) -> bool:
        return False  # what is left of a cursor stays at the server

    def finish_at_hand(self) -> bool:
        return True

    def read_within(self, timeout_s: float | None) -> float | None:
        self._bound.done()
        before, self.read_timeout_s = self.read_timeout_s, timeout_s
        return before

    def read_within_at_most(self, timeout_s: float) -> float | None:
        before = self.read_timeout_s
        return self.read_within(timeout_s if before is None else min(before, timeout_s))

    @property
    def driver_connection(self) -> Any:
        return self._connection
