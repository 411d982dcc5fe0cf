"""The pool: a connection that comes back goes straight to whoever has waited longest.

    _idle     {hub or None: deque of records}   open and not in use; None: connections that belong to no hub
    _waiting  OrderedDict of waiters            first come, first served, whatever hub they wait in
    _open     records in use, idle, or just being opened; at most pool_size + max_overflow

One native lock guards all three. It is held for a few steps that neither switch greenlets nor do I/O, so no greenlet
is ever switched out while it holds it, and nobody waits for it but another thread, for as long as those steps take.
As long as somebody waits, `_open` is at its limit and nothing is idle: whoever frees a place hands it on before it
lets go of the lock. So nobody who comes later can be quicker, and no wake-up is lost: what was handed to a waiter
that was killed or timed out meanwhile is handed on by that waiter.

Under gevent a socket belongs to the hub in which it was opened: another thread that used it would switch to a hub
that is not its own. So connections are kept per hub, and where only another hub has an idle one it is discarded, in
its own hub, and its place is used here.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from functools import partial
from typing import Any

import gevent.hub
from sqlalchemy import exc
from sqlalchemy.pool import ConnectionPoolEntry, QueuePool

from dbsession import fork, hub, scope

Cleaning = Callable[[ConnectionPoolEntry], Callable[[], None] | None]

HOME = "dbsession.home"
"""Key in a connection's `info`: the hub that it belongs to."""


class _PoolWaiter(hub.Waiter):
    """Somebody's place in the line. `granted` and `record` are written under the pool's lock."""

    __slots__ = ("granted", "home", "record")

    def __init__(self, home: gevent.hub.Hub | None) -> None:
        super().__init__()
        self.home = home
        self.granted = False
        self.record: ConnectionPoolEntry | None = None  # granted without one: the right to open a connection


class FairPool(QueuePool):
    """A `sqlalchemy.pool.QueuePool` that serves first come, first served. Lives as long as its engine, or until a
    dispose() puts another in its place. Its arguments are QueuePool's.

    `_do_get`, `_do_return_conn` and `_create_connection` are what SQLAlchemy's Pool has for its subclasses to
    override and call; private by their names only (tests/unit/test_private_names.py).
    """

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
        self._lock = hub.allocate_lock()
        self._size = pool_size
        self._lifo = use_lifo
        self._overflow_size = -1 if pool_size == 0 else max_overflow
        self._limit = float("inf") if self._overflow_size < 0 else pool_size + max_overflow
        self._idle: dict[gevent.hub.Hub | None, deque[ConnectionPoolEntry]] = {}
        self._idle_count = 0
        self._waiting: OrderedDict[_PoolWaiter, None] = OrderedDict()
        self._open = 0
        self._disposed = False
        self._returned: deque[ConnectionPoolEntry | None] = deque()
        self._being_cleaned: set[ConnectionPoolEntry] = set()  # one set operation at a time
        self.cleaning: Cleaning = lambda _: None
        """Asked for each returned connection; what it gives does I/O, and runs aside before the next one gets it."""

    def _do_get(self) -> ConnectionPoolEntry:
        """An idle connection of this hub, or a new one; or wait until it is our turn. Switches greenlets where it
        waits or opens."""
        home = hub.here()
        waiter = victim = None
        with self._lock:
            record = self._take_idle(home)
            if record is not None:
                pass
            elif self._open < self._limit:
                self._open += 1
            elif self._idle_count:
                victim = next(idle for idle in self._idle.values() if idle).popleft()  # of another hub
                self._idle_count -= 1
            else:
                waiter = _PoolWaiter(home)
                self._waiting[waiter] = None
        if self._returned:
            self._settle()
        if waiter is not None:
            record = self._wait(waiter)
        return record or self._connect(victim)

    def _take_idle(self, home: gevent.hub.Hub | None) -> ConnectionPoolEntry | None:
        if not self._idle_count:
            return None
        idle = self._idle.get(home) or self._idle.get(None)
        if not idle:
            return None
        self._idle_count -= 1
        return idle.pop() if self._lifo else idle.popleft()

    def _wait(self, waiter: _PoolWaiter) -> ConnectionPoolEntry | None:
        """A record, or None: the right to open one."""
        scope.end_dead()  # what dead raw greenlets hold is given back while we wait, and by nobody else ever
        try:
            waiter.wait(self._timeout)
        except BaseException:
            with self._lock:
                if not waiter.granted:
                    del self._waiting[waiter]
            if waiter.granted:
                self._give_back(waiter.record)  # it goes to the next one
            raise
        with self._lock:
            if not waiter.granted:
                del self._waiting[waiter]
        if waiter.granted:
            return waiter.record
        raise exc.TimeoutError(
            f"QueuePool limit of size {self._size} overflow {self.overflow()} reached, connection timed out, timeout "
            f"{self._timeout:.2f}",
            code="3o7r",
        )

    def _connect(self, victim: ConnectionPoolEntry | None) -> ConnectionPoolEntry:
        """A new connection, in the place that we have, after closing what was there."""
        try:
            if victim is not None:
                self._discard(victim)
            return self._create_connection()
        except BaseException:
            self._give_back(None)
            raise

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        """Hand a connection to the longest waiter, or keep it idle. Closes one that is too many; only that may switch.

        One that needs cleaning is cleaned in a greenlet of ours: its user need not wait, and no kill or timeout of its
        user's can land in it, where SQLAlchemy would swallow it if it is an `Exception`."""
        work = self.cleaning(record)
        home = record.info.get(HOME)
        if work is not None and home is not None and not (home is hub.here() and hub.lasts()):
            fork.give_up(record)  # a socket that this thread may not use, or a hub that stops with its job
            work = None
        if work is None:
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
            surplus = []
            try:
                while self._returned:
                    record = self._returned.popleft()
                    if record is not None and not self._keep(record):
                        surplus.append(record)
                    elif record is None:
                        self._free_place()
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

    def _keep(self, record: ConnectionPoolEntry) -> bool:
        """Hand it on or keep it; False: it is of no use and to be closed. Under the lock."""
        if record.dbapi_connection is None:  # invalidated, or closed
            self._free_place()
            return True
        if self._disposed:
            return False
        home = record.info.get(HOME)
        if self._waiting:
            if home is None or next(iter(self._waiting)).home is home:
                self._grant(record)
                return True
            return False
        if self._size and self._idle_count >= self._size:
            return False
        if home not in self._idle:
            # A hub that is new here: forget those that have nothing left, whose threads may be gone.
            self._idle = {home: idle for home, idle in self._idle.items() if idle} | {home: deque()}
        self._idle[home].append(record)
        self._idle_count += 1
        return True

    def _free_place(self) -> None:
        if self._waiting:
            self._grant(None)
        else:
            self._open -= 1

    def _grant(self, record: ConnectionPoolEntry | None) -> None:
        waiter, _ = self._waiting.popitem(last=False)
        waiter.granted = True
        waiter.record = record
        waiter.wake()

    def _discard(self, record: Any) -> None:
        """Close the idle connection of another hub: in that hub, or at its descriptor when the hub is gone."""
        home = record.info.get(HOME)
        if home is None or home is hub.here():
            record.close()
        elif not home.dead:
            hub.run_aside(record.close, home)
        else:
            fork.give_up(record)

    def dispose(self) -> None:
        """Close what is idle now, and what is in use when it comes back. Whoever waits here, or holds a reference,
        is still served; nothing is kept."""
        with self._lock:
            self._disposed = True
            records = [record for idle in self._idle.values() for record in idle]
            self._idle.clear()
            self._idle_count = 0
            self._open -= len(records)
        if self._returned:
            self._settle()
        for record in records:
            self._discard(record)

    def recreate(self) -> FairPool:
        successor = self.__class__(
            self._creator,
            pool_size=self._size,
            max_overflow=self._overflow_size,
            pre_ping=self._pre_ping,
            use_lifo=self._lifo,
            timeout=self._timeout,
            recycle=self._recycle,
            echo=self.echo,
            logging_name=self._orig_logging_name,
            reset_on_return=self._reset_on_return,
            _dispatch=self.dispatch,
            dialect=self._dialect,
        )
        successor.cleaning = self.cleaning
        return successor

    def size(self) -> int:
        return self._size

    def checkedin(self) -> int:
        return self._idle_count

    def checkedout(self) -> int:
        return self._open - self._idle_count - len(self._being_cleaned)

    def overflow(self) -> int:
        return self._open - self._size if self._size else 0

    def waiting(self) -> int:
        """How many wait for a connection."""
        return len(self._waiting)
