"""The queue for a pool's connections: what the fair pools of both halves count and say of it."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from time import monotonic
from typing import Any, Generic, Self, TypeVar

from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection, QueuePool

from dbsession.core import fork
from dbsession.core.fork import KNOWN
from dbsession.core.pool.holders import HeldConnections
from dbsession.errors import describe

WaiterT = TypeVar("WaiterT")

TRY_EVERY_S = 1.0
"""Seconds after which a server that was full is asked again for one connection more."""


_FINAL = "dbsession_no_room"
"""An attribute of the error of somebody for whom there is no connection to wait for."""


def _never(_: BaseException) -> bool:
    return False


class QueuedPool(QueuePool, Generic[WaiterT]):
    """Base of the two FairPools. Lives as long as its engine, or until a dispose() puts another in its place. `held`
    says who has which connection, and counts.

    `_open` counts the slots that are taken: by records in use, idle or being opened. `_returned` is what came back and
    is not yet handed on or idle (None: a slot without a connection); anybody appends to it, in one step. `_waiting` has
    for each waiter when it came. How the rest is guarded, each half says.

    `_limit` is how many there may be: `_most`, as configured; less where the server has refused one more, then as many
    as there were. From then on one more is tried once a second at most, by the longest waiter if somebody waits, until
    there is one; the next is tried at once. Who was refused waits for what there is, in the place of his first coming.

    `_do_get`, `_do_return_conn` and `_create_connection` are what SQLAlchemy's Pool has for its subclasses to
    override and call; private by their names only (tests/unit/test_private_names.py).
    """

    # Read by every checkout and checkin: as slots, in two thirds of the time that SQLAlchemy's `__dict__` takes.
    __slots__ = (
        *("_lifo", "_limit", "_max_idle", "_most", "_open", "_refusal", "_returned", "_size", "_successor", "_try_at"),
        *("_waiting", "held", "is_full"),
    )

    held: HeldConnections

    def __init__(
        self,
        creator: Any,
        pool_size: int = 20,
        max_overflow: int = 0,
        timeout: float | None = 30.0,
        use_lifo: bool = False,
        **kw: Any,
    ) -> None:
        super().__init__(creator, pool_size, max_overflow, timeout, use_lifo, **kw)  # type: ignore[arg-type]  # None: no bound
        self._size, self._lifo = pool_size, use_lifo
        self._most = float("inf") if pool_size == 0 or max_overflow < 0 else pool_size + max_overflow
        self._limit = self._most
        self._try_at = float("inf")  # when one more may be tried than there are, of the clock monotonic()
        self._refusal = ""
        self.is_full: Callable[[BaseException], bool] = _never
        """Whether an error at connecting says that the server has no room for one more."""
        self._max_idle = pool_size or float("inf")  # 0: disposed, nothing is kept
        self._waiting: OrderedDict[WaiterT, float] = OrderedDict()
        self._returned: deque[ConnectionPoolEntry | None] = deque()
        self._open = 0
        self._successor: Self | None = None

    def connect(self) -> PoolProxiedConnection:
        """Check a connection out, as SQLAlchemy's Pool does. Where an old one cannot be replaced, since the server has
        no room for the new one, another one is waited for."""
        if not KNOWN[0]:
            fork.found_out()
            if self._successor is not None:  # the engine's, which was asked for its pool before it had that
                return self._successor.connect()
        while True:
            try:
                proxied: PoolProxiedConnection = super().connect()
                break
            except Exception as error:
                if not self.is_full(error) or hasattr(error, _FINAL) or not self._open:
                    raise
                self._fill_up(error)
        # After its `checkout` listeners what is sent on a connection is its user's.
        driver: Any = proxied.dbapi_connection
        driver = getattr(driver, "driver_connection", driver)
        sent = getattr(driver, "sent", None)
        if sent is not None:
            sent.taken(driver)
        return proxied

    # Called by each half where nothing can come in between.

    def _join(self, waiter: WaiterT, began: float) -> None:
        """Join the queue, at its end, or where one has come from that could not open a connection."""
        waiting = self._waiting
        later: list[WaiterT] = []
        if waiting and next(reversed(waiting.values())) > began:
            later = [each for each, came in waiting.items() if came > began]
        waiting[waiter] = began
        for each in later:
            waiting.move_to_end(each)

    def _refused(self, error: BaseException) -> bool:
        """Take back the slot of a connection that could not be opened, if the server has no room for it and there are
        others to wait for; else return False, and `error` is to be raised."""
        self._tried(opened=False)
        if not self.is_full(error):
            return False
        if self._open > 1:
            self._open -= 1
            self._fill_up(error)
            return True
        setattr(error, _FINAL, True)
        return False

    def _fill_up(self, error: BaseException) -> None:
        self._limit = max(1, self._open)
        self._tried(opened=False)
        self._refusal = describe(error)

    def _may_try(self) -> bool:
        """Return whether it is time to open one more than the server has allowed, and make room for it."""
        if not self._limit <= self._open < self._most or monotonic() < self._try_at:
            return False
        self._limit = self._open + 1
        self._try_at = float("inf")  # until it is known what becomes of that one
        return True

    def _tried(self, opened: bool) -> None:
        """Take note that a connection was opened, or not: a server that was full is asked again now, or later."""
        self._try_at = monotonic() + (0.0 if opened else TRY_EVERY_S)

    def _patience(self, end: float) -> float:
        """Return the seconds until a waiter may let one more connection be tried, or has to give up, at `end`: seldom
        as long as the server has refused none."""
        every = 10 * TRY_EVERY_S if self._limit == self._most else TRY_EVERY_S
        return max(0.0, min(every, end - monotonic()))

    def _count_wait(self, began: float, granted: bool) -> None:
        """Count a wait that is over; raise PoolTimeout if it was in vain."""
        waited_s = monotonic() - began
        self.held.waited(waited_s, in_vain=not granted)
        if not granted:
            raise self.held.timeout(self, self.waiting(), waited_s, self._refusal if self._limit < self._most else "")

    def recreate(self) -> Self:
        successor = super().recreate()
        assert isinstance(successor, type(self))
        successor.held = self.held
        successor.is_full = self.is_full
        self._successor = successor
        return successor

    def _replace_next_of(self, idle: deque[ConnectionPoolEntry]) -> bool:
        """Have the connection that is checked out next of `idle` replaced then; return False if there is none."""
        try:
            record = idle[-1 if self._lifo else 0]
        except IndexError:
            return False
        record.invalidate(soft=True)
        return True

    def overflow(self) -> int:
        return self._open - self._size if self._size else 0

    def limit(self) -> int | None:
        """How many connections there may be; None: any number."""
        return None if self._most == float("inf") else int(self._most)

    def waiting(self) -> int:
        """How many wait for a connection."""
        return len(self._waiting)
