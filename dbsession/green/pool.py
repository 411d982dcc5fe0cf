"""The pool: a connection that comes back goes straight to whoever has waited longest.

    _idle     {hub or None: deque of records}   open and not in use; None: those that belong to no hub, `_shared`
    _waiting  OrderedDict of waiters            first come, first served, whatever hub they wait in
    _open     records in use, idle, or just being opened; at most pool_size + max_overflow

One native lock guards all three. It is held for a few steps that neither switch greenlets nor do I/O, so no greenlet
is ever switched out while it holds it, and nobody but another thread waits for it. As long as somebody waits, `_open`
is at its limit and nothing is idle: whoever frees a slot hands it on before it lets go of the lock. So nobody who comes
later can be quicker, and no wake-up is lost: what was handed to a waiter that was killed or timed out meanwhile is
handed on by that waiter.

One thing is done without the lock: an idle record is popped, which is one step. It breaks none of this, as it only
takes away from what is idle; who holds the lock must expect it to go. Nobody adds to `_idle` without the lock.

Hub affinity: under gevent a socket is of use only in the hub that opened it, so idle connections are kept per hub.
Where only another hub has an idle one, it is discarded, in its own hub, and its slot is used here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from time import monotonic
from typing import Any

import gevent.hub
from sqlalchemy.pool import ConnectionPoolEntry

from dbsession.core import fork
from dbsession.core.pool.queue import QueuedPool
from dbsession.green import hub, scope
from dbsession.green.holders import HeldByGreenlets
from dbsession.green.hub import here
from dbsession.green.owner_hub import OWNER_HUB, await_first_in_any_hub, discard

# Asked for each returned connection; what it gives does I/O, and runs aside before the next one gets it.
Cleaning = Callable[[ConnectionPoolEntry], Callable[[], None] | None]


class _PoolWaiter(hub.Waiter):
    """A waiter in the pool's queue. `granted` and `record` are written once, under the pool's lock."""

    __slots__ = ("granted", "record")

    def __init__(self) -> None:
        super().__init__()
        self.granted = False
        self.record: ConnectionPoolEntry | None = None  # granted without one: the right to open a connection


class FairPool(QueuedPool[_PoolWaiter]):
    """A `sqlalchemy.pool.QueuePool` that serves first come, first served. Its arguments are QueuePool's."""

    __slots__ = ("_being_cleaned", "_idle", "_lock", "_shared", "cleaning")

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._shared: deque[ConnectionPoolEntry] = deque()
        self._idle: dict[gevent.hub.Hub | None, deque[ConnectionPoolEntry]] = {None: self._shared}
        self._lock = hub.allocate_lock()
        self._being_cleaned: set[ConnectionPoolEntry] = set()  # one set operation at a time
        self.cleaning: Cleaning | None = None
        self.held = HeldByGreenlets()

    def _do_get(self) -> ConnectionPoolEntry:
        record = None
        while record is None:
            idle = self._shared or self._idle.get(here())
            if not idle:
                record = self._wait_or_connect()
                continue
            try:
                record = idle.pop() if self._lifo else idle.popleft()
            except IndexError:  # another thread was quicker
                pass
        try:
            self.held.taken(record)
        except BaseException:  # the stack's end, a signal
            self._give_back(record)
            raise
        return record

    def _wait_or_connect(self) -> ConnectionPoolEntry | None:
        """Open a connection, or wait until it is our turn, and switch greenlets. None: one came back just now."""
        began = monotonic()
        while True:
            waiter = victim = None
            with self._lock:
                again = bool(self._shared or self._idle.get(here()))
                if not again and (self._open < self._limit or (not self._waiting and self._may_try())):
                    self._open += 1
                elif not again and (victim := self._take_any()) is None:
                    self._join(waiter := _PoolWaiter(), began)
            if again:
                self._settle()
                return None
            if waiter is not None and (record := self._wait(waiter, began)) is not None:
                return record
            if (record := self._connect(victim, waited=waiter is not None)) is not None:
                return record

    def _take_any(self) -> ConnectionPoolEntry | None:
        """The record that was idle longest in some hub."""
        for idle in filter(None, self._idle.values()):
            with suppress(IndexError):  # another thread was quicker
                return idle.popleft()
        return None

    def _wait(self, waiter: _PoolWaiter, began: float) -> ConnectionPoolEntry | None:
        """Wait for our turn; return a record, or None for the right to open one."""
        end = began + (hub.TIMEOUT_MAX if self._timeout is None else self._timeout)
        try:
            self._settle()
            scope.end_dead()  # what dead raw greenlets hold is given back while we wait, and by nobody else ever
            while not waiter.wait(self._patience(end)) and not waiter.granted:
                if monotonic() >= end:
                    self._leave(waiter)
                    break
                self._try_more()
        except BaseException:
            try:
                self._leave(waiter)
            finally:
                if waiter.granted:
                    self._give_back(waiter.record)  # it goes to the next one
            raise
        self._count_wait(began, waiter.granted)
        return waiter.record

    def _try_more(self) -> None:
        """Let the longest waiter open one connection more than the server has allowed, if it is time."""
        if self._limit < self._most:
            with self._lock:
                if self._waiting and self._may_try():
                    self._open += 1
                    self._grant(None)
            self._settle()

    def _leave(self, waiter: _PoolWaiter) -> None:
        """Leave the queue, in which one is no more once `granted`."""
        with self._lock:
            self._waiting.pop(waiter, None)
        self._settle()

    def _connect(self, victim: ConnectionPoolEntry | None, waited: bool) -> ConnectionPoolEntry | None:
        """A new connection, in the slot that we have, after closing what was there. None: the server has no room for it
        now, and the slot is gone."""
        try:
            if victim is not None:
                discard(victim)
            self._settle()
            record = self._create_connection()
        except BaseException as error:
            self.held.not_connected(waited)
            with self._lock:
                gone = self._refused(error)
            if gone:
                self._settle()
                return None
            self._give_back(None)
            raise
        self._tried(opened=True)
        self._try_more()
        return record

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        """Hand a connection to the longest waiter, or keep it idle. Closes one too many; only that may switch."""
        self.held.returned(record)
        work = None if self.cleaning is None else self.cleaning(record)
        if work is not None:
            self._clean_aside(record, work)
            return
        # What _give_back() does, in 0.7 of its time, where nobody waits and there is room.
        if not self._waiting and self._lock.acquire(False):
            try:
                room = not self._waiting and self._open <= self._max_idle and record.dbapi_connection is not None
                idle = self._idle.get(record.info.get(OWNER_HUB)) if room else None
                if idle is not None:
                    idle.append(record)
            finally:
                self._lock.release()
            if idle is not None:
                if self._returned:
                    self._settle()
                return
        self._give_back(record)

    def _clean_aside(self, record: ConnectionPoolEntry, work: Callable[[], None]) -> None:
        """Clean a record, and then give it back, in a greenlet of ours: its user need not wait, and no kill or timeout
        of its user's can land in it, where SQLAlchemy would swallow it if it is an `Exception`."""
        owner = record.info.get(OWNER_HUB)
        if owner is not None and not (owner is here() and hub.lasts()):
            fork.give_up(record)  # a socket that this thread may not use, or a hub that stops with its job
            self._give_back(record)
            return
        self._being_cleaned.add(record)
        clean = partial(self._clean, record, work)
        hub.run_aside(clean) if hub.lasts() else clean()

    def _clean(self, record: ConnectionPoolEntry, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self.logger.info("A returned connection could not be cleaned (%s); it is closed.", type(error).__name__)
            record.close()
            if not isinstance(error, Exception):
                raise
        finally:
            self._being_cleaned.discard(record)
            self._give_back(record)

    def _give_back(self, record: ConnectionPoolEntry | None) -> None:
        """Give back a connection, or (None) a slot.

        A garbage collection may come at any line, also while this very thread holds the lock, and return a connection
        that somebody dropped. So what is returned is put down first, in one step, and worked off by whoever has the
        lock: the holder looks again once it has let go.
        """
        self._returned.append(record)
        self._settle()

    def _settle(self) -> None:
        while self._returned and self._lock.acquire(False):
            surplus: list[Any] = []
            try:
                while self._returned:
                    record = self._returned.popleft()
                    if not self._keep(record):
                        surplus.append(record)
            finally:
                self._lock.release()
            while surplus:
                try:
                    surplus.pop().close()
                except BaseException:  # a kill in there costs no slot, and leaves no other record behind
                    self._returned.append(None)
                    self._returned.extend(surplus)
                    self._settle()
                    raise
                self._returned.append(None)

    def _keep(self, record: ConnectionPoolEntry | None) -> bool:
        """Give the record to the first waiter, or make it idle. Return False if it must be closed instead. The caller
        holds the lock."""
        if record is None or record.dbapi_connection is None:  # a slot; or invalidated, or closed
            if self._waiting:
                self._grant(None)
            else:
                self._open -= 1
            return True
        owner = record.info.get(OWNER_HUB)
        if self._waiting and self._max_idle:
            if owner is not None and next(iter(self._waiting)).hub is not owner:
                return False
            self._grant(record)
            return True
        if self._open > self._max_idle and self.checkedin() >= self._max_idle:
            return False
        idle = self._idle.get(owner)
        if idle is None:  # a hub that is new here: forget those that have nothing left, whose threads may be gone
            idle = deque()
            self._idle = {one: kept for one, kept in self._idle.items() if kept or one is None} | {owner: idle}
        idle.append(record)
        return True

    def _grant(self, record: ConnectionPoolEntry | None) -> None:
        waiter, _ = self._waiting.popitem(last=False)
        waiter.record = record
        waiter.granted = True  # last: it is read without the lock
        waiter.wake()

    def replace_next(self) -> bool:
        """Have the idle connection that is next in turn here replaced at its checkout; return False if none is."""
        return self._replace_next_of(self._shared or self._idle.get(here(), self._shared))

    def dispose(self) -> None:
        """Close what is idle now, and what is in use when it comes back. Whoever waits here, or holds a reference,
        is still served; nothing is kept."""
        with self._lock:
            self._max_idle = 0
            records = list(iter(self._take_any, None))
            self._idle = {None: self._shared}
            self._open -= len(records)
        self._settle()
        for record in records:
            discard(record)

    def recreate(self) -> FairPool:
        successor = super().recreate()
        successor.cleaning = self.cleaning
        return await_first_in_any_hub(successor)

    def checkedin(self) -> int:
        return sum(map(len, self._idle.values()))

    def checkedout(self) -> int:
        return self._open - self.checkedin() - len(self._being_cleaned)
