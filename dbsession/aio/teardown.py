"""Close every session of a scope, whatever fails on the way; a cancellation passes through at the end.

A session without a connection in use is closed on the spot. The others need the server, for at most BOUND_S seconds;
what is not closed by then, or is cancelled in the middle, has its connections thrown away without waiting for anybody.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from contextvars import Context
from functools import partial
from time import monotonic
from typing import Any

from dbsession.core import teardown as core_teardown
from dbsession.core.teardown import Sessions

logger = logging.getLogger("dbsession.aio.closing")

# The closing tasks under way: a loop keeps only weak references to its tasks. Each is added when it starts and taken
# out when it is done, in the thread of its loop; one set operation each.
_under_way: set[asyncio.Task[None]] = set()


class _Aside(asyncio.Task[None]):
    """A task of ours, which ends by itself within its bound: so only that can cancel it. asyncio.run() and others
    cancel everything at their end and wait for it."""

    def __init__(self, work: Coroutine[Any, Any, None], bound_s: float) -> None:
        loop = asyncio.get_running_loop()
        self._bound = monotonic() + bound_s
        super().__init__(work, loop=loop)

    def cancel(self, msg: Any | None = None) -> bool:
        return monotonic() >= self._bound and super().cancel(msg)


async def close_all(sessions: Sessions, label: str) -> None:
    """Take every entry out of `sessions` and close it.

    The entry goes first: whatever happens to the close, nobody finds that session again.

    Raises:
        BaseException: the first cancellation (anything that is no `Exception`) that landed on the way, after the last
            session was seen to; from then on nothing is waited for. Errors are logged, one WARNING a session.
    """
    kill: BaseException | None = None
    end: float | None = None
    while sessions:
        database, session = sessions.popitem()
        if database.inherited:
            continue  # it belongs to the parent process: not a byte on its connections
        failure: BaseException | None = None
        try:
            # Without its call where that would do nothing.
            if session.sync_session._open_connections or not session.close_at_once():
                end = end or monotonic() + core_teardown.BOUND_S
                failure = kill or await _failure_of(database, session, end)
        except BaseException as error:  # a listener of the user's, for instance
            failure = error
        if failure is not None:
            kill = kill or core_teardown.kill_of(failure)
            if failure is kill and session.commits_elsewhere():
                close_aside({database: session}, label)  # a shielded commit() is to go on, whatever ends its caller
            else:
                _give_up(database, session, label, failure)
    if kill is not None:
        raise kill


async def _failure_of(database: Any, session: Any, end: float) -> BaseException | None:
    """Close a session until `end`, by the clock monotonic(); return what it has failed with."""
    task: Any = asyncio.current_task()
    before = task.cancelling()
    bounds: Bounds = database.bounds
    bound = bounds.begin(task, end)
    try:
        if session._committer is not None:
            await session.commit_elsewhere_ended()
        await session.close()
        return None
    except BaseException as error:  # as asyncio.timeout() judges it
        if bound.late and isinstance(error, asyncio.CancelledError) and task.cancelling() == before + 1:
            return core_teardown.not_in_time()
        return core_teardown.not_in_time() if isinstance(error, TimeoutError) else error
    finally:
        bounds.open.discard(bound)
        if bound.late:
            task.uncancel()


class _Bound:
    """Until when a task has to have closed a session. Lives as long as that takes."""

    __slots__ = ("end", "late", "task")

    def __init__(self, task: asyncio.Task[Any], end: float) -> None:
        self.task = task
        self.end = end
        self.late = False
        """The task was cancelled for it."""


class Bounds:
    """Cancels the tasks of one event loop that take too long to close a session of one database, by one timer for all:
    asyncio.timeout() makes one for each, which stays in the loop's heap until its time. Lives as long as the database;
    all of it is written in the loop's thread, and nothing awaits between reading and writing.
    """

    __slots__ = ("_at", "_context", "_loop", "_timer", "open")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._context = Context()  # empty: the timer would keep that of the task in which it was started
        self._timer: asyncio.TimerHandle | None = None
        self._at = float("inf")  # when it looks
        self.open: set[_Bound] = set()

    def begin(self, task: asyncio.Task[Any], end: float) -> _Bound:
        """Cancel `task` at `end`, by the clock monotonic(), unless its bound is taken out of `open` by then."""
        bound = _Bound(task, end)
        self.open.add(bound)
        if end < self._at:
            self._look_at(end)
        return bound

    def _look_at(self, end: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._at = end
        self._timer = self._loop.call_later(end - monotonic(), self._look, context=self._context)

    def _look(self) -> None:
        self._timer, self._at = None, float("inf")
        now = monotonic()
        waiting = [bound for bound in self.open if not bound.late]
        for bound in waiting:
            if bound.end <= now:
                bound.late = True
                bound.task.cancel()
        left = [bound.end for bound in waiting if not bound.late]
        if left:
            self._look_at(min(left))


def _give_up(database: Any, session: Any, label: str, failure: BaseException | None) -> None:
    database.stats.teardown_failures += 1
    session.discard()
    if failure is not None:
        core_teardown.report(logger, database, label, failure)


def close_aside(sessions: Sessions, label: str) -> None:
    """Close the sessions without waiting: those that need the server by a task of ours, which nobody has to wait for.
    In the loop's thread. Raises a kill as `close_all` does."""
    kill: BaseException | None = None
    left = {}
    while sessions:
        database, session = sessions.popitem()
        if database.inherited:
            continue
        try:
            if session.sync_session._open_connections or not session.close_at_once():
                left[database] = session
        except BaseException as failure:  # a listener of the user's, for instance
            kill = kill or core_teardown.kill_of(failure)
            _give_up(database, session, label, failure)
    if left:
        run_aside(close_all(left, label), core_teardown.BOUND_S, partial(_ended, left, label))
    if kill is not None:
        raise kill


def run_aside(
    work: Coroutine[Any, Any, None], bound_s: float, ended: Callable[[asyncio.Task[None]], None] | None = None
) -> asyncio.Task[None]:
    """Run `work`, which takes at most `bound_s` seconds, in a task of ours in the running loop, and keep it until it
    is done; `ended` is called with it then, and takes it out of those that are kept."""
    task = _Aside(work, bound_s)
    _under_way.add(task)
    task.add_done_callback(ended or _under_way.discard)
    return task


def _ended(sessions: Sessions, label: str, task: asyncio.Task[None]) -> None:
    _under_way.discard(task)
    if not task.cancelled():
        task.exception()  # seen
    if sessions:  # it was cancelled before its first step, past its bound
        discard_all(sessions, label)


def close_dropped(sessions: Sessions, label: str, loop: asyncio.AbstractEventLoop | None) -> None:
    """Close the sessions of a scope that nobody refers to any more. From any thread, and from destructors."""
    for database in list(sessions):
        if database.inherited:  # the loop is the parent process's, too, and not to be woken
            del sessions[database]
    if not sessions:
        return
    if loop is not None and not loop.is_closed():
        try:
            loop.call_soon_threadsafe(close_aside, dict(sessions), label)
        except RuntimeError:  # closed just now
            pass
        else:
            sessions.clear()
            return
    discard_all(sessions, label)


def discard_all(sessions: Sessions, label: str) -> None:
    """Throw the connections of the sessions away. Waits for nobody."""
    while sessions:
        database, session = sessions.popitem()
        if not database.inherited:
            _give_up(database, session, label, None)


async def settle(loop: asyncio.AbstractEventLoop, bound_s: float = core_teardown.BOUND_S) -> None:
    """Wait at most `bound_s` seconds for the closing tasks of the running `loop` that there are now: a busy program
    always has others."""
    mine = [task for task in list(_under_way) if task.get_loop() is loop and task is not asyncio.current_task()]
    if mine:
        await asyncio.wait(mine, timeout=bound_s)
