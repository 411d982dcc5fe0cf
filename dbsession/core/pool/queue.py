"""The queue for a pool's connections: what the fair pools of both halves count and say of it."""

from __future__ import annotations

from collections import OrderedDict, deque
from time import monotonic
from typing import Any, Generic, Self, TypeVar

from sqlalchemy.pool import ConnectionPoolEntry, QueuePool

from dbsession.core import fork
from dbsession.core.fork import KNOWN
from dbsession.core.pool.holders import HeldConnections

WaiterT = TypeVar("WaiterT")


class QueuedPool(QueuePool, Generic[WaiterT]):
    """Base of the two FairPools. Lives as long as its engine, or until a dispose() puts another in its place. `held`
    says who has which connection, and counts.

    `_open` counts the slots that are taken: by records in use, idle or being opened. `_returned` is what came back and
    is not yet handed on or idle (None: a slot without a connection); anybody appends to it, in one step. How the rest
    is guarded, each half says.

    `_do_get`, `_do_return_conn` and `_create_connection` are what SQLAlchemy's Pool has for its subclasses to
    override and call; private by their names only (tests/unit/test_private_names.py).
    """

    # Read by every checkout and checkin: as slots, in two thirds of the time that SQLAlchemy's `__dict__` takes.
    __slots__ = ("_lifo", "_limit", "_max_idle", "_open", "_returned", "_size", "_successor", "_waiting", "held")

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
        super().__init__(creator, pool_size, max_overflow, timeout, use_lifo, **kw)  # type: ignore[arg-type]
        self._size, self._lifo = pool_size, use_lifo
        self._limit = float("inf") if pool_size == 0 or max_overflow < 0 else pool_size + max_overflow
        self._max_idle = pool_size or float("inf")  # 0: disposed, nothing is kept
        self._waiting: OrderedDict[WaiterT, None] = OrderedDict()
        self._returned: deque[ConnectionPoolEntry | None] = deque()
        self._open = 0
        self._successor: Self | None = None

    def connect(self) -> Any:
        if not KNOWN[0]:
            fork.found_out()
            if self._successor is not None:  # the engine's, which was asked for its pool before it had that
                return self._successor.connect()
        return super().connect()

    def _count_wait(self, began: float, granted: bool) -> None:
        """Count a wait that is over; raise PoolTimeout if it was in vain."""
        waited_s = monotonic() - began
        self.held.waited(waited_s, in_vain=not granted)
        if not granted:
            raise self.held.timeout(self, self.waiting(), waited_s)

    def recreate(self) -> Self:
        successor = super().recreate()
        assert isinstance(successor, type(self))
        successor.held = self.held
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
        return None if self._limit == float("inf") else int(self._limit)

    def waiting(self) -> int:
        """How many wait for a connection."""
        return len(self._waiting)
