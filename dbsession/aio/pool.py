"""The pool of an asyncio engine: a connection that comes back goes straight to whoever has waited longest.

    _idle      deque of records        open and not in use
    _waiting   OrderedDict of futures  first come, first served
    _open      records in use, idle, being opened or being closed; at most pool_size + max_overflow
    _returned  deque                   what came back (None: a slot) and is not yet one of the above

An engine belongs to one event loop, so only that loop's thread writes the first three, and only between two awaits:
no lock. Two things come in between all the same. A garbage collection returns what somebody dropped, at any line of
this thread or in any other one. So what is returned is put down in `_returned`, which is one step, and settled by
this thread alone: at once, or, if it is in the middle of settling already (`_settling`), by that very loop, which
looks again at its end, or, coming from another thread, by a callback of the event loop.

As long as somebody waits, nothing is idle and `_open` is at its limit: only `_settle()` makes something idle or `_open`
less, and it serves the queue before it ends; who joins the queue calls it, too. So nobody who comes later can be
quicker, and no wake-up is lost: what was handed to a waiter that was cancelled meanwhile is handed on by that waiter.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from contextlib import suppress
from contextvars import Context
from time import monotonic
from typing import Any

from sqlalchemy import exc
from sqlalchemy.pool import AsyncAdaptedQueuePool, ConnectionPoolEntry
from sqlalchemy.util import await_
from sqlalchemy.util.concurrency import in_greenlet

from dbsession.aio.holders import HeldByTasks
from dbsession.core.pool.queue import TRY_EVERY_S, QueuedPool

# Somebody's place in the queue. Its result: a record; or (None,), the right to open one; or None: time is up.
_Waiter = asyncio.Future[tuple[ConnectionPoolEntry | None] | None]


class FairPool(QueuedPool[_Waiter], AsyncAdaptedQueuePool):
    """An `AsyncAdaptedQueuePool` that serves first come, first served. Its arguments are QueuePool's.

    A connection is to be asked for in the greenlet in which SQLAlchemy runs what is awaited of an AsyncEngine or
    AsyncSession; asking waits (`pool_timeout`) where all are in use, and where one is opened.
    """

    __slots__ = ("_idle", "_loop", "_settling", "_thread", "_timer")

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._idle: deque[ConnectionPoolEntry] = deque()
        self._settling = False
        self._timer: asyncio.TimerHandle | None = None  # of the next try, where the server was full
        self._thread: int | None = None  # of those who take; before the first one nothing comes back
        self._loop: asyncio.AbstractEventLoop | None = None  # in which somebody has waited
        self.held = HeldByTasks()

    def _do_get(self) -> ConnectionPoolEntry:
        if not in_greenlet():
            raise exc.MissingGreenlet(
                "A connection was asked for where nothing can be awaited, as not by a method of AsyncEngine or "
                "AsyncSession. Use these, with `await`; what is written for a Session runs in `run_sync()`."
            )
        if not self._idle:
            record = self._wait_or_connect()
        elif self._lifo:  # nobody waits, or nothing were idle; a destructor that comes in between adds, if anything
            record = self._idle.pop()
        else:
            record = self._idle.popleft()
        try:
            self.held.taken(record)
        except BaseException:  # the stack's end, a signal
            self._give_back(record)
            raise
        return record

    def _wait_or_connect(self) -> ConnectionPoolEntry:
        self._thread = threading.get_ident()
        began, task = monotonic(), asyncio.current_task()
        cancelled = 0 if task is None else task.cancelling()
        while not self._idle:
            waited = self._open >= self._limit and (bool(self._waiting) or not self._may_try())
            if not waited:
                self._open += 1
            elif (record := self._wait(began)) is not None:
                return record
            try:
                record = self._create_connection()
            except BaseException as error:
                self.held.not_connected(waited)
                if self._refused(error):
                    if task is not None and task.cancelling() > cancelled:
                        raise asyncio.CancelledError from error  # the driver has let it fall for its own error
                    continue  # wait for those that there are
                self._give_back(None)
                raise
            self._tried(opened=True)
            self._try_later(0)
            return record
        return self._idle.pop() if self._lifo else self._idle.popleft()  # it came back while the server refused us one

    def _try_later(self, seconds: float = TRY_EVERY_S) -> None:
        if self._waiting and self._limit < self._most and self._loop is not None:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._loop.call_later(seconds, self._try_more, context=Context())

    def _try_more(self) -> None:
        """Let the longest waiter open one connection more than the server has allowed, if it is time."""
        self._timer = None
        if self._waiting and self._may_try():
            self._settle()
        self._try_later()

    def _wait(self, began: float) -> ConnectionPoolEntry | None:
        """Wait in the queue until it is our turn. A record, or None: the right to open one."""
        self._loop = loop = asyncio.get_running_loop()
        waiter: _Waiter = loop.create_future()
        left = None if self._timeout is None else began + self._timeout - monotonic()
        timer = None if left is None else loop.call_later(left, _expire, waiter)
        self._join(waiter, began)
        if self._timer is None:
            self._try_later()
        try:
            self._settle()  # a destructor may have returned something since we looked
            granted = await_(waiter)
        except BaseException:
            self._waiting.pop(waiter, None)
            if waiter.done() and not waiter.cancelled() and (granted := waiter.result()) is not None:
                self._give_back(granted[0])  # it goes to the next one
            raise
        finally:
            if timer is not None:
                timer.cancel()
        self._waiting.pop(waiter, None)  # time is up, else it is no longer there
        self._count_wait(began, granted is not None)
        return None if granted is None else granted[0]

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        """Hand a connection to the longest waiter, or keep it idle. Closes one too many; only that may wait."""
        self.held.returned(record)
        if (
            threading.get_ident() != self._thread
            or self._waiting
            or self._returned
            or self._settling
            or record.dbapi_connection is None
        ):
            self._give_back(record)
            return
        # Nobody waits, and nothing else came back: all that _settle() would do, without its calls.
        self._idle.append(record)
        if len(self._idle) > self._max_idle:
            self._settle()

    def _give_back(self, record: ConnectionPoolEntry | None) -> None:
        """Give back a connection, or (None) a slot. From any thread."""
        self._returned.append(record)
        if threading.get_ident() == self._thread:
            self._settle()
        elif self._loop is not None:  # else nobody has ever waited, and the next one to come settles it
            with suppress(RuntimeError):  # closed: nobody waits any more
                self._loop.call_soon_threadsafe(self._settle)

    def _settle(self) -> None:
        """Make idle what came back, serve those who wait, and close what is too much."""
        again = True
        while again and not self._settling:
            self._settling = True
            surplus: list[ConnectionPoolEntry] = []
            try:
                while self._returned:
                    record = self._returned.popleft()
                    if record is None or record.dbapi_connection is None:  # a slot; or invalidated, or detached
                        self._open -= 1
                    else:
                        self._idle.append(record)
                self._serve()
                while len(self._idle) > self._max_idle:
                    surplus.append(self._idle.pop())
            finally:
                self._settling = False
            self._close(surplus)
            again = bool(self._returned)

    def _serve(self) -> None:
        while self._waiting and (self._idle or self._open < self._limit):
            waiter, _ = self._waiting.popitem(last=False)
            if waiter.done() or waiter.get_loop().is_closed():  # cancelled or too late, and not awake yet; or never
                continue
            record = None
            if self._idle:
                record = self._idle.popleft()
            else:
                self._open += 1
            waiter.set_result((record,))

    def _close(self, records: list[ConnectionPoolEntry]) -> None:
        """Close connections, and only then free their slots, so that there are never more open than may be."""
        while records:
            record = records.pop()
            try:
                # Outside of the greenlet nothing can be awaited, and close() would leave it open; this cuts it off.
                record.close() if in_greenlet() else record.invalidate()
            except BaseException:  # a cancellation in there costs no slot, and leaves no other one open
                self._returned.extend(records)
                records.clear()
                raise
            finally:
                self._returned.append(None)
                self._settle()

    def replace_next(self) -> bool:
        """Have the idle connection that is next in turn replaced at its checkout; return False if none is."""
        return self._replace_next_of(self._idle)

    def dispose(self) -> None:
        """Close what is idle now, and what is in use when it comes back. Whoever waits here, or holds a reference,
        is still served; nothing is kept."""
        self._max_idle = 0
        self._settle()

    def checkedin(self) -> int:
        return len(self._idle)

    def checkedout(self) -> int:
        return self._open - len(self._idle) - len(self._returned)


def _expire(waiter: _Waiter) -> None:
    if not waiter.done():
        waiter.set_result(None)
