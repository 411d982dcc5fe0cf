"""A psycopg connection that waits in the event loop, as long as we say, and gives up what nobody waits for.

psycopg's own answers a cancellation by ending the statement at the server and reading on, for up to ten seconds, in the
task that was cancelled. Ours raises it at once. What is sent and known is in `core.backends.psycopg`.
"""

from __future__ import annotations

import asyncio
import select
import sys
from time import monotonic
from typing import Any

import psycopg
from psycopg import errors
from psycopg.adapt import AdaptersMap
from psycopg.conninfo import conninfo_attempts_async, conninfo_to_dict, make_conninfo
from psycopg.waiting import Ready, Wait

from dbsession.aio.timer import AnswerTimer
from dbsession.core import fork
from dbsession.core.backends.postgresql_errors import not_connected
from dbsession.core.backends.psycopg import ACTIVE, OFF, Known
from dbsession.core.backends.psycopg_cursors import Named, RidesAlong, ours

_POLLED = {Wait.R: select.POLLIN, Wait.W: select.POLLOUT, Wait.RW: select.POLLIN | select.POLLOUT}
_BUSY_S = 0.005  # that a COPY, say, may keep the loop where nothing has to be waited for


class Cursor(RidesAlong, psycopg.AsyncCursor[Any]):
    """A cursor that has all of its rows. Lives as long as they are read."""


class ServerCursor(Named, psycopg.AsyncServerCursor[Any]):
    """A named cursor, whose rows are fetched piece by piece. Lives as long as its transaction, at most."""


class _Wait(AnswerTimer):
    """Bounds one wait of a connection after the other. Lives as `AnswerTimer` says."""

    __slots__ = ("waiter",)

    def __init__(self) -> None:
        super().__init__()
        self.waiter: asyncio.Future[Ready | None] | None = None
        """What is waited for now."""

    def is_of_use(self) -> bool:
        return self.waiter is not None

    def too_late(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)


class Connection(Known, psycopg.AsyncConnection[Any]):
    """A `psycopg.AsyncConnection`. Lives as `Known` says."""

    _wait: _Wait | None = None
    _waiter: asyncio.Future[Ready | None] | None = None  # of whoever waits for the socket
    _busy_since: float | None = None  # it has kept the loop since then, as far as it knows

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cursor_factory = Cursor
        self.server_cursor_factory = ServerCursor

    @classmethod
    async def open_within(
        cls,
        seconds: float,
        conninfo: str = "",
        *,
        autocommit: bool = False,
        prepare_threshold: int | None = 5,
        context: Any = None,
        row_factory: Any = None,
        cursor_factory: Any = None,
        **arguments: Any,
    ) -> Connection:
        """Connect within so many seconds, all addresses of all hosts together, and their names; see psycopg's
        `connect()` for the arguments.

        Raises:
            psycopg.Error: the server cannot be reached, refuses, or does not answer in time.
        """
        until = monotonic() + seconds
        arguments.pop("connect_timeout", None)  # ours, by `seconds`
        late = errors.ConnectionTimeout(f"no connection within {seconds:g} s, the handshake included")
        try:
            async with asyncio.timeout(seconds):
                attempts = await conninfo_attempts_async(conninfo_to_dict(conninfo, **arguments))
        except TimeoutError:
            raise late from None
        failed: list[tuple[Any, Exception]] = []
        for n, attempt in enumerate(attempts):
            share = (until - monotonic()) / (len(attempts) - n)  # a silent address leaves their time to the others
            try:
                async with asyncio.timeout(share):
                    connection: Connection = await drive(cls._connect_gen(make_conninfo("", **attempt)))
                break
            except TimeoutError:
                failed.append((attempt, late))
            except errors.Error as error:
                failed.append((attempt, error))
        else:
            raise not_connected(failed)
        connection._autocommit = bool(autocommit)
        connection.prepare_threshold = prepare_threshold
        if row_factory is not None:
            connection.row_factory = row_factory
        if cursor_factory is not None:
            connection.cursor_factory = ours(cursor_factory)
        if context is not None:
            connection._adapters = AdaptersMap(context.adapters)
        connection.read_timeout_s = max(until - monotonic(), 0.1)  # until it has been set up
        return connection

    async def wait(self, gen: Any, interval: float | None = None, timeout: float | None = None) -> Any:
        """Drive one of psycopg's generators, and wait where it would: for each piece of an answer as long as
        `read_timeout_s`, for the socket to take what is sent as long as `write_timeout_s`; where nothing was asked, as
        for a notification, `timeout` seconds in all, or for ever."""
        self.refuse_if_lost()
        until = None if timeout is None else monotonic() + timeout
        try:
            try:
                wanted = next(gen)
            except StopIteration as end:
                await self._breathe()
                return end.value
            while True:
                wanted = gen.send(await self._ready(wanted, until))
        except StopIteration as end:
            self._heard = monotonic()
            return end.value
        except BaseException as error:
            self.interrupted(error)
            raise

    async def _ready(self, wanted: Wait, until: float | None) -> Ready:
        pgconn = self.pgconn
        descriptor = pgconn.socket
        if wanted & Wait.W and (ready := ready_now(descriptor, wanted)):  # as nearly always, and it costs less
            await self._breathe()
            return ready
        if until is not None:
            seconds: float | None = until - monotonic()
        elif pgconn.transaction_status == ACTIVE or pgconn.pipeline_status != OFF:
            seconds = self.write_timeout_s if wanted & Wait.W else self.read_timeout_s
        else:
            seconds = None
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[Ready | None] = loop.create_future()
        self._waiter = waiter
        timer = self._wait
        if seconds is not None:
            if timer is None:
                timer = self._wait = _Wait()
            timer.waiter = waiter
            timer.expect(max(seconds, 0.0))
        if wanted & Wait.R:
            loop.add_reader(descriptor, _wake, waiter, Ready.R)
        if wanted & Wait.W:
            loop.add_writer(descriptor, _wake, waiter, Ready.W)
        try:
            found = await waiter
        finally:
            # Before psycopg goes on, which may close the socket.
            if self._waiter is waiter:
                self._waiter = None
                if wanted & Wait.R:
                    loop.remove_reader(descriptor)
                if wanted & Wait.W:
                    loop.remove_writer(descriptor)
            if timer is not None:
                timer.waiter = None
                timer.done()
            self._busy_since = None
        if found is not None:
            return found
        if until is not None:
            raise errors._WaitTimeout("wait timeout expired")
        raise errors.OperationalError(f"no answer from the server within {seconds:g} s: the connection is given up")

    async def _breathe(self) -> None:
        """Let the loop have its turn, if it has had none for some time."""
        if self._busy_since is None:
            self._busy_since = monotonic()
        elif monotonic() - self._busy_since >= _BUSY_S:
            self._busy_since = None
            await asyncio.sleep(0)

    async def ping(self, within_s: float) -> None:
        """Raise an error if the connection is gone, or does not answer within so many seconds."""
        before = self.read_within_at_most(within_s)
        self.pinging = True
        try:
            async with self.lock:
                await self.wait(self._ping_gen())
        finally:
            self.pinging = False
            self.read_within(before)

    async def reset(self) -> None:
        """Take back what the session has set; see `Known`."""
        async with self.lock:
            await self.wait(self._reset_gen())

    async def _try_cancel(self, *, timeout: float = 0.0) -> None:
        # psycopg's: whoever leaves a stream or a COPY in its middle would wait for it.
        self.interrupted(sys.exception() or errors.QueryCanceled("nobody reads on"))

    def finish(self) -> None:
        """Close the socket, in the loop's thread. Whoever waits there gets an error: the descriptor's number may be
        another one's at once."""
        waiter, self._waiter = self._waiter, None
        if waiter is not None:
            loop, descriptor = waiter.get_loop(), self.pgconn.socket
            loop.remove_reader(descriptor)
            loop.remove_writer(descriptor)
            if not waiter.done():
                waiter.set_exception(errors.OperationalError("the connection was closed meanwhile"))
        super().finish()

    async def close(self) -> None:
        self.end()

    def end(self) -> None:
        """Close the connection without waiting; a statement that still runs on it is ended at the server. Idempotent.
        In a forked child it is the parent's, and stays."""
        if self.gave_up or self._epoch != fork.epoch:
            return
        if self.unread:
            self.give_up(errors.OperationalError("it was closed in the middle of an answer"))
        else:
            self._closed = True
            self.finish()


async def drive(gen: Any) -> Any:
    """Drive a generator of psycopg's that opens a connection or asks for a cancellation."""
    loop = asyncio.get_running_loop()
    try:
        descriptor, wanted = next(gen)
        while True:
            waiter: asyncio.Future[Ready | None] = loop.create_future()
            add, remove = (
                (loop.add_reader, loop.remove_reader) if wanted == Wait.R else (loop.add_writer, loop.remove_writer)
            )
            add(descriptor, _wake, waiter, Ready.R if wanted == Wait.R else Ready.W)
            try:
                ready = await waiter
            finally:
                remove(descriptor)
            descriptor, wanted = gen.send(ready)
    except StopIteration as end:
        return end.value
    finally:
        gen.close()


def _wake(waiter: asyncio.Future[Ready | None], ready: Ready) -> None:
    if not waiter.done():
        waiter.set_result(ready)


def ready_now(descriptor: int, wanted: Wait) -> Ready | None:
    """Return for what a socket is ready, of what is wanted; None: not yet. Never waits."""
    look = select.poll()
    look.register(descriptor, _POLLED[wanted])
    found = look.poll(0)
    if not found:
        return None
    events = found[0][1]
    return Ready((events & select.POLLIN and Ready.R) | (events & select.POLLOUT and Ready.W)) or Ready.W
