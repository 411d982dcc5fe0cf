"""The pool: a connection that comes back goes straight to whoever has waited longest.

    _idle     {hub or None: deque of records}   open and not in use; None: those that belong to no hub, `_shared`
    _waiting  OrderedDict of waiters            first come, first served, whatever hub they wait in
    _open     records in use, idle, or just being opened; at most pool_size + max_overflow

One native lock guards all three. It is held for a few steps that neither switch greenlets nor do I/O, so no greenlet
is ever switched out while it holds it, and nobody waits for it but another thread, for as long as those steps take.
As long as somebody waits, `_open` is at its limit and nothing is idle: whoever frees a place hands it on before it
lets go of the lock. So nobody who comes later can be quicker, and no wake-up is lost: what was handed to a waiter
that was killed or timed out meanwhile is handed on by that waiter.

One thing is done without the lock: an idle record is popped, which is one step. It breaks none of this, as it only
takes away from what is idle; who holds the lock must expect it to go. Nobody adds to `_idle` without the lock.

Connections are kept per hub (see `homes`): where only another hub has an idle one, it is discarded, in its own hub,
and its place is used here.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import gevent.hub
from sqlalchemy.pool import ConnectionPoolEntry, QueuePool

from dbsession.core import fork
from dbsession.green import hub, scope
from dbsession.green.holders import HeldByGreenlets
from dbsession.green.homes import HOME, discard

# Asked for each returned connection; what it gives does I/O, and runs aside before the next one gets it.
Cleaning = Callable[[ConnectionPoolEntry], Callable[[], None] | None]


class _PoolWaiter(hub.Waiter):
    """Somebody's place in the line. `granted` and `record` are written once, under the pool's lock."""

    __slots__ = ("granted", "record")

    def __init__(self) -> None:
        super().__init__()
        self.granted = False
        self.record: ConnectionPoolEntry | None = None  # granted without one: the right to open a connection


class FairPool(QueuePool):
    """A `sqlalchemy.pool.QueuePool` that serves first come, first served. Lives as long as its engine, or until a
    dispose() puts another in its place. Its arguments are QueuePool's.

    `_do_get`, `_do_return_conn` and `_create_connection` are what SQLAlchemy's Pool has for its subclasses to
    override and call; private by their names only (tests/unit/test_private_names.py).
    """

    # Read by every checkout and checkin: as slots, in two thirds of the time that SQLAlchemy's `__dict__` takes.
    __slots__ = ("_idle", "_lifo", "_lock", "_max_idle", "_open", "_returned", "_shared", "_waiting", "cleaning")

    def __init__(
        self,
        creator: Any,
        pool_size: int = 20,
        max_overflow: int = 0,
        timeout: float = 30.0,
        use_lifo: bool = False,
        **kw: Any,
    ) -> None:
        super().__init__(creator, pool_size, max_overflow, timeout, use_lifo, **kw)
        self._size, self._lifo = pool_size, use_lifo
        self._limit = float("inf") if pool_size == 0 or max_overflow < 0 else pool_size + max_overflow
        self._max_idle = pool_size or float("inf")  # 0: disposed, nothing is kept
        self._shared: deque[ConnectionPoolEntry] = deque()
        self._idle: dict[gevent.hub.Hub | None, deque[ConnectionPoolEntry]] = {None: self._shared}
        self._waiting: OrderedDict[_PoolWaiter, None] = OrderedDict()
        self._open, self._lock = 0, hub.allocate_lock()
        self._returned: deque[ConnectionPoolEntry | None] = deque()
        self._being_cleaned: set[ConnectionPoolEntry] = set()  # one set operation at a time
        self.cleaning: Cleaning | None = None
        self.held = HeldByGreenlets()

    def _do_get(self) -> ConnectionPoolEntry:
        record = self._take()
        try:
            self.held.taken(record)
        except BaseException:  # the stack's end, a signal
            self._give_back(record)
            raise
        return record

    def _take(self) -> ConnectionPoolEntry:
        """An idle connection of this hub, or a new one; or wait until it is our turn. Switches greenlets where it
        waits or opens."""
        idle = self._shared or self._idle.get(hub.here())
        if idle:
            try:
                return idle.pop() if self._lifo else idle.popleft()
            except IndexError:  # another thread was quicker
                pass
        waiter = victim = None
        with self._lock:
            again = bool(self._shared or self._idle.get(hub.here()))  # it came back just now
            if not again and self._open < self._limit:
                self._open += 1
            elif not again and (victim := self._take_any()) is None:
                waiter = _PoolWaiter()
                self._waiting[waiter] = None
        if again:
            self._settle()
            return self._take()
        return (None if waiter is None else self._wait(waiter)) or self._connect(victim, waiter is not None)

    def _take_any(self) -> ConnectionPoolEntry | None:
        """The record that was idle longest in some hub."""
        for idle in filter(None, self._idle.values()):
            with suppress(IndexError):  # another thread was quicker
                return idle.popleft()
        return None

    def _wait(self, waiter: _PoolWaiter) -> ConnectionPoolEntry | None:
        """A record, or None: the right to open one."""
        began = time.monotonic()
        try:
            self._settle()
            scope.end_dead()  # what dead raw greenlets hold is given back while we wait, and by nobody else ever
            if not waiter.wait(self._timeout):
                self._leave(waiter)
        except BaseException:
            try:
                self._leave(waiter)
            finally:
                if waiter.granted:
                    self._give_back(waiter.record)  # it goes to the next one
            raise
        waited_s = time.monotonic() - began
        self.held.waited(waited_s, in_vain=not waiter.granted)
        if waiter.granted:
            return waiter.record
        raise self.held.timeout(self, self.waiting(), waited_s)

    def _leave(self, waiter: _PoolWaiter) -> None:
        """Leave the line, in which one is no more once `granted`."""
        with self._lock:
            self._waiting.pop(waiter, None)
        self._settle()

    def _connect(self, victim: ConnectionPoolEntry | None, waited: bool) -> ConnectionPoolEntry:
        """A new connection, in the place that we have, after closing what was there."""
        try:
            if victim is not None:
                discard(victim)
            self._settle()
            return self._create_connection()
        except BaseException:
            self.held.not_connected(waited)
            self._give_back(None)
            raise

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
                idle = self._idle.get(record.info.get(HOME)) if room else None
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
        """Clean it, and then give it back, in a greenlet of ours: its user need not wait, and no kill or timeout of its
        user's can land in it, where SQLAlchemy would swallow it if it is an `Exception`."""
        home = record.info.get(HOME)
        if home is not None and not (home is hub.here() and hub.lasts()):
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
        """Give back a connection, or (None) a place where one may be opened.

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
                except BaseException:  # a kill in there costs no place, and leaves no other record behind
                    self._returned.append(None)
                    self._returned.extend(surplus)
                    self._settle()
                    raise
                self._returned.append(None)

    def _keep(self, record: ConnectionPoolEntry | None) -> bool:
        """Hand it on or keep it; False: it is of no use and to be closed. Under the lock."""
        if record is None or record.dbapi_connection is None:  # a place; or invalidated, or closed
            if self._waiting:
                self._grant(None)
            else:
                self._open -= 1
            return True
        home = record.info.get(HOME)
        if self._waiting and self._max_idle:
            if home is not None and next(iter(self._waiting)).home is not home:
                return False
            self._grant(record)
            return True
        if self._open > self._max_idle and self.checkedin() >= self._max_idle:
            return False
        idle = self._idle.get(home)
        if idle is None:  # a hub that is new here: forget those that have nothing left, whose threads may be gone
            idle = deque()
            self._idle = {one: kept for one, kept in self._idle.items() if kept or one is None} | {home: idle}
        idle.append(record)
        return True

    def _grant(self, record: ConnectionPoolEntry | None) -> None:
        waiter, _ = self._waiting.popitem(last=False)
        waiter.record = record
        waiter.granted = True  # last: it is read without the lock
        waiter.wake()

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
        assert isinstance(successor, FairPool)
        successor.cleaning, successor.held = self.cleaning, self.held
        return successor

    def checkedin(self) -> int:
        return sum(map(len, self._idle.values()))

    def checkedout(self) -> int:
        return self._open - self.checkedin() - len(self._being_cleaned)

    def overflow(self) -> int:
        return self._open - self._size if self._size else 0

    def limit(self) -> int | None:
        """How many connections there may be; None: any number."""
        return None if self._limit == float("inf") else int(self._limit)

    def waiting(self) -> int:
        """How many wait for a connection."""
        return len(self._waiting)
