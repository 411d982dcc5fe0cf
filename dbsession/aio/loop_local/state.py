"""What one event loop keeps for `loop_local`: its values, and the exits that end them.

    loop -> LoopState -> storage    whatever the user puts there
                      -> values     key -> value, of what is made once per loop
                      -> exits      Exit -> None, oldest first; popped from the end
                      -> turns      key -> Turn, only while somebody makes or ends the value of that key

All four are written by the loop's own thread alone, each in steps between two awaits; what has to hold across an
await is held by a Turn (one key) or by `_closing` (all exits).
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import os
import sys
from collections.abc import Awaitable, Callable, Hashable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from dbsession import errors

T = TypeVar("T")
Callback = Callable[[], Awaitable[object]]

EXIT_TIMEOUT_S = 5.0
_CANCEL_GRACE_S = 1.0  # for an exit that ran out of time and was cancelled: its own cleaning up
_MORE_MEANWHILE = 10  # exits, beyond as many as there were, that may be registered while they run, and run too

logger = logging.getLogger("dbsession.aio.loop_local")


@dataclass(eq=False, slots=True)
class Exit:
    """One callback to be awaited when its loop's resources are closed, in the context it was registered in."""

    callback: Callback
    label: str
    key: Hashable = None  # of the value that ends with it
    context: contextvars.Context = field(default_factory=contextvars.copy_context)
    pid: int = field(default_factory=os.getpid)

    def start(self) -> asyncio.Task[None]:
        # Not by the loop's create_task(): a task factory of the user may fail, or take no context.
        return asyncio.Task(self._run(), loop=asyncio.get_running_loop(), context=self.context)

    async def _run(self) -> None:
        await self.callback()


class Turn:
    """The right to make or to end the value of one key; lives as long as somebody has it or waits for it."""

    __slots__ = ("_key", "_lock", "_state", "_users", "owner")

    def __init__(self, state: LoopState, key: Hashable) -> None:
        self.owner: asyncio.Task[Any] | None = None
        self._state = state
        self._key = key
        self._lock = asyncio.Lock()
        self._users = 0

    async def __aenter__(self) -> Turn:
        task = asyncio.current_task()
        waiting = self._state.waiting
        # Whom the owner waits for, and so on: were that this task, all of them would wait for ever.
        turn: Turn | None = self
        while turn is not None and turn.owner is not None:
            if turn.owner is task:
                raise errors.RecursiveUse(
                    "A value that is made once per loop was asked for by the code that makes or closes it, directly "
                    "or through another such value: that could only wait for itself. Break the circle."
                )
            turn = waiting.get(turn.owner)
        self._users += 1
        waiting[task] = self
        try:
            await self._lock.acquire()
        except BaseException:
            self._leave()
            raise
        finally:
            del waiting[task]
        self.owner = task
        return self

    async def __aexit__(self, *raised: object) -> None:
        self.owner = None
        self._lock.release()
        self._leave()

    def _leave(self) -> None:
        self._users -= 1
        if not self._users:
            del self._state.turns[self._key]


class LoopState:
    """What one event loop keeps: storage, singletons, exits. Lives as long as its loop, which alone refers to it;
    emptied by `close()`."""

    def __init__(self) -> None:
        self.storage: dict[Any, Any] = {}
        self.values: dict[Hashable, Any] = {}
        self.exits: dict[Exit, None] = {}
        self.turns: dict[Hashable, Turn] = {}
        self.waiting: dict[asyncio.Task[Any] | None, Turn] = {}
        self._making: set[Hashable] = set()
        self._closing = asyncio.Lock()
        self._exiting: asyncio.Task[None] | None = None

    def make(self, key: Hashable, factory: Callable[[], T]) -> T:
        """The value of `key`, made by `factory` when there is none. Nothing else runs in the loop meanwhile."""
        if key not in self.values:
            if key in self._making:
                raise errors.RecursiveUse(
                    "A singleton was asked for by its own factory, with the same arguments. Break the circle."
                )
            self._making.add(key)
            try:
                self.values[key] = factory()
            finally:
                self._making.discard(key)
        value: T = self.values[key]
        return value

    async def make_async(self, key: Hashable, factory: Callable[[], Awaitable[T]]) -> T:
        """The value of `key`, made by awaiting `factory` when there is none. Whoever else asks meanwhile waits;
        when this task is cancelled or fails, the next one makes it."""
        async with self._turn(key):
            if key not in self.values:
                self.values[key] = await factory()
            value: T = self.values[key]
            return value

    async def enter(self, acm: AbstractAsyncContextManager[T, Any], label: str, key: Hashable) -> T:
        """Enters `acm` and registers its exit, with no await between the two."""
        leave = acm.__aexit__
        value = await acm.__aenter__()
        self.exits[Exit(lambda: leave(None, None, None), label, key)] = None
        return value

    async def evict(self, key: Hashable) -> bool:
        """Forgets the value of `key` and awaits its exits, newest first; not a parent process's."""
        async with self._turn(key) as turn:
            known = key in self.values
            self.values.pop(key, None)
            failures: list[Exception] = []
            for exit in [each for each in reversed(self.exits) if each.key == key]:
                known = True
                if exit not in self.exits or exit.pid != os.getpid():
                    continue
                del self.exits[exit]
                turn.owner = task = exit.start()
                try:
                    await task
                except Exception as error:
                    failures.append(error)
            if failures:
                raise ExceptionGroup(f"{len(failures)} exits failed while a value was evicted", failures)
            return known

    def own_exits(self) -> list[str]:
        """The labels of the exits registered in this process, and not in the one that it was forked from; for a
        report."""
        return [exit.label for exit in self.exits if exit.pid == os.getpid()]

    def to_close(self) -> bool:
        """Whether exits have to run; also when an interrupt stopped the loop while they did."""
        return bool(self.own_exits()) or self._closing.locked()

    async def close(self, timeout_s: float | None) -> None:
        """Awaits every exit, one after another in a task of its own, and empties the rest; see `loop_local.aclose`.

        Raises:
            BaseExceptionGroup: what they raised; to the loop's exception handler instead when a cancellation goes on.
        """
        if self._exiting is not None and self._exiting is asyncio.current_task():
            raise errors.RecursiveUse("An exit asked to close all exits, of which it is one. They are being closed.")
        failures: list[BaseException] = []
        cancelled: asyncio.CancelledError | None = None
        async with self._closing:
            old = set(self.exits)
            meanwhile = len(old) + _MORE_MEANWHILE
            while exit := next((each for each in reversed(self.exits) if meanwhile or each in old), None):
                del self.exits[exit]
                meanwhile -= exit not in old
                self.values.pop(exit.key, None)
                if exit.pid != os.getpid():
                    continue
                self._exiting = task = exit.start()
                cancelled = await _ended(task, timeout_s) or cancelled
                late = not task.done()
                if late:
                    task.cancel()
                    cancelled = await _ended(task, _CANCEL_GRACE_S) or cancelled
                self._exiting = None
                failure = _failure(task, exit.label, timeout_s if late else None)
                if failure is not None:
                    failures.append(failure)
            if self.exits:
                failures.append(_still_used(self.exits))
            else:
                self.clear()
        if failures:
            group = BaseExceptionGroup(f"{len(failures)} exits failed while a loop's resources were closed", failures)
            if cancelled is None:
                raise group
            report(asyncio.get_running_loop(), group)
        if cancelled is not None:
            raise cancelled

    def clear(self) -> None:
        self.storage.clear()
        self.values.clear()
        self.exits.clear()

    def _turn(self, key: Hashable) -> Turn:
        return self.turns.setdefault(key, Turn(self, key))

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if self.exits and not is_finalizing() and (never_ran := self.own_exits()):
            logger.warning(
                "an event loop was collected without having been closed; these exits never ran: %s",
                ", ".join(never_ran),
            )


async def _ended(task: asyncio.Task[None], timeout_s: float | None) -> asyncio.CancelledError | None:
    """Wait until `task` is done or its time is over. Return a cancellation of the caller meanwhile."""
    loop = asyncio.get_running_loop()
    end = None if timeout_s is None else loop.time() + timeout_s
    cancelled = None
    while not task.done() and (end is None or loop.time() < end):
        try:
            await asyncio.wait((task,), timeout=None if end is None else end - loop.time())
        except asyncio.CancelledError as error:
            cancelled = error
    return cancelled


def _failure(task: asyncio.Task[None], label: str, timeout_s: float | None) -> BaseException | None:
    """Return what an exit failed with, or None; `timeout_s` is the time it overran, if it did."""
    raised = None
    if not task.done():
        # It goes on after its cancellation. Its failure is reported now, so that asyncio need not do it again.
        task.add_done_callback(lambda late: late.cancelled() or late.exception())
    elif not task.cancelled():
        raised = task.exception()
    if timeout_s is not None:
        failure = errors.ExitUnfinished(f"The exit of {label} did not end within {timeout_s:g} s and was cancelled.")
        failure.__cause__ = raised
        return failure
    if task.cancelled():
        return errors.ExitUnfinished(f"The exit of {label} was cancelled before its end.")
    if raised is not None:
        raised.add_note(f"raised by the exit of {label}")
    return raised


def _still_used(exits: dict[Exit, None]) -> errors.ExitUnfinished:
    labels = ", ".join(dict.fromkeys(exit.label for exit in exits))
    return errors.ExitUnfinished(
        f"Tasks of the loop went on using what was being closed, so that it was made again and again; left open: "
        f"{labels}. End these tasks before."
    )


def report(loop: asyncio.AbstractEventLoop, group: BaseException) -> None:
    """Give an error to the loop's exception handler, for want of a caller."""
    loop.call_exception_handler({"message": "dbsession.aio.loop_local: exits failed", "exception": group})
