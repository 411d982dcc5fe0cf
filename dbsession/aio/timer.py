"""Until when something is expected of a connection: one timer of the loop for all of its waits."""

from __future__ import annotations

import asyncio
from contextvars import Context
from time import monotonic

_NEVER = float("inf")


class AnswerTimer:
    """Until when an answer has to come on one connection. Lives as long as the connection. Written in the loop's own
    thread, and nothing awaits between reading and writing.

    Its timer outlives the answers that it is set for, and looks when it is time what is expected by then: making one
    for each statement would take as long as the rest of what we do with a statement.
    """

    __slots__ = ("__weakref__", "_context", "_due", "_looks", "_loop", "_timer")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._context = Context()  # empty: the timer would keep that of the request in which it was started
        self._due: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._looks = _NEVER  # when it does

    def expect(self, seconds: float | None) -> float | None:
        """Call `too_late()` if, until `done()`, the answer is not there in so many seconds; None: it may take as long
        as it does. Returns until when what this is a part of is expected."""
        if seconds is None:
            return self._due
        now = monotonic()
        earlier, due = self._due, now + seconds
        if earlier is not None and earlier < due:
            due = earlier
        self._due = due
        if self._looks > due:
            self._look_at(due, now)
        return earlier

    def done(self, earlier: float | None = None) -> None:
        """Expect nothing any more, or what was expected `earlier`."""
        self._due = earlier

    def is_of_use(self) -> bool:
        """Return whether the connection is still there."""
        raise NotImplementedError

    def too_late(self) -> None:
        """Give up what has not come in time."""
        raise NotImplementedError

    def _look_at(self, due: float, now: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._looks = due
        self._timer = self._loop.call_later(due - now, self._look, context=self._context)

    def _look(self) -> None:
        self._timer, self._looks = None, _NEVER
        if self._due is None or not self.is_of_use():
            return
        if (now := monotonic()) < self._due:
            self._look_at(self._due, now)
        else:
            self.too_late()
