"""Which task holds a connection, and what it is doing: see `core.pool.holders`.

    task ── get_coro() ──> coroutine ── cr_await ──> ... ── cr_await ──> greenlet_spawn() ── cr_await ──> the driver's
                                                                           └── its greenlet's frames: SQLAlchemy's,
                                                                               and those of a run_sync() function

SQLAlchemy takes a connection in a greenlet of its own, whose parent is the one of the caller's coroutines, suspended
meanwhile. So a task that waits is read along the chain of what it awaits; one that runs just now, from the frames of
its thread, where Python tells nothing of what its coroutines await.

The leak watch looks from a thread of its own, and not from a loop: a loop that is blocked is a reason why connections
are held, and a process may have several, one after another or at once, none of which lasts as long as it. Nor from a
greenlet, where gevent has patched the process: a hub may be blocked by a loop in its thread, or end with it.
"""

from __future__ import annotations

import _thread
import asyncio
import gc
import sys
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from time import monotonic
from types import AsyncGeneratorType, CoroutineType, FrameType, GeneratorType, ModuleType
from typing import Any

import greenlet
from sqlalchemy.pool import ConnectionPoolEntry
from sqlalchemy.util import greenlet_spawn

from dbsession.core.connection_info import CHECKOUT, SCOPE, nobody
from dbsession.core.periodic import PeriodicTask
from dbsession.core.pool import callsites
from dbsession.core.pool.checkout import Checkout
from dbsession.core.pool.holders import HeldConnections
from dbsession.core.pool.leaks import Watches
from dbsession.core.scope import BaseScope
from dbsession.errors import plain

_running_loop = asyncio.get_running_loop
_current_task = asyncio.current_task

_SUSPENDABLE = (CoroutineType, GeneratorType, AsyncGeneratorType)


def _own(module: ModuleType, name: str) -> Any:
    """The interpreter's own function, whatever gevent has patched; it is not loaded for that."""
    monkey = sys.modules.get("gevent.monkey")
    return getattr(module, name) if monkey is None else monkey.get_original(module.__name__, name)


_start_thread: Callable[[Callable[[], object], tuple[()]], int] = _own(_thread, "start_new_thread")
_sleep: Callable[[float], None] = _own(time, "sleep")

_this_thread: Callable[[], int] = _own(_thread, "get_ident")
"""The number of the native thread, whatever gevent has patched."""


class HeldByTasks(HeldConnections):
    """The connections of one engine, which is of one event loop, that tasks have in use. Lives as long as the engine.

    Notes are written in the loop's thread; the watcher's thread, and whoever takes a snapshot, reads them.
    """

    def taken(self, record: ConnectionPoolEntry) -> None:
        # Written out in both halves: what is shared would be a call more in each checkout.
        info: Any = record.record_info
        try:
            note: Checkout = info[CHECKOUT]
        except KeyError:
            note = self.new_note(record)
            note.thread = _this_thread()  # the loop's
        try:
            task: Any = _current_task(_running_loop())
        except RuntimeError:  # no loop runs here
            task = None
        note.taker = None if task is None else weakref.ref(task)  # None: in a callback of the loop
        note.since = note.changed = monotonic()
        if self.recording:
            self.record_call_site(note, running_here(sys._getframe(), outermost_of(task)))
        note.in_use = True
        self.stats.checkouts += 1

    def name_of(self, note: Checkout) -> str:
        if note.taker is None:
            return "no task"
        task = _holder(note)
        if task is None:
            return "a task that is gone"
        function = getattr(task.get_coro(), "__qualname__", None)
        return plain(f"{function} in {task.get_name()}" if function else task.get_name())

    def scopes_of(self, note: Checkout) -> list[BaseScope]:
        task = _holder(note)
        stack = getattr(task, "_dbsession_aio", None)
        return [] if stack is None else list(stack.scopes)

    def stack_of(self, note: Checkout) -> list[callsites.CallSite] | str:
        if note.taker is None:
            return []
        task = _holder(note)
        if task is None or task.done():
            return "its task has ended"
        if _runs(task):
            if note.thread == _this_thread():
                return callsites.users(running_here(sys._getframe(), outermost_of(task)))
            sites = callsites.users(_running_elsewhere(note.thread, outermost_of(task)))
            if _runs(task):  # else it has stopped meanwhile, and another one runs there
                return sites
        return callsites.users(reversed(list(_suspended(task.get_coro()))))


def _holder(note: Checkout) -> Any:
    """The task that took the connection; once that has ended, the one whose scope's session uses it: a child task may
    have run a method for it."""
    task: Any = None if note.taker is None else note.taker()
    if task is None or task.done():
        record = note.record()
        scope = None if record is None else record.info.get(SCOPE, nobody)()
        stack = getattr(scope, "_stack", None)
        task = getattr(stack, "task", None) or task
    return task


def _runs(task: Any) -> bool:
    return getattr(task.get_coro(), "cr_running", False)


def outermost_of(task: Any) -> FrameType | None:
    """The frame of the task's own coroutine: beyond it there is only the event loop, and whoever runs it."""
    return None if task is None else getattr(task.get_coro(), "cr_frame", None)


def _suspended(coroutine: Any) -> Iterator[FrameType]:
    """The frames of a coroutine that waits, and of what it awaits, outermost first."""
    seen = set()  # an awaitable of the user's may refer to whoever awaits it
    while coroutine is not None and coroutine not in seen:
        seen.add(coroutine)
        frame = getattr(coroutine, "cr_frame", None) or getattr(coroutine, "gi_frame", None)
        frame = frame or getattr(coroutine, "ag_frame", None)
        if frame is not None:
            yield frame
            if frame.f_code is greenlet_spawn.__code__:
                yield from _inside_greenlet(coroutine)
        awaited = getattr(coroutine, "cr_await", None) or getattr(coroutine, "gi_yieldfrom", None)
        awaited = awaited or getattr(coroutine, "ag_await", None)
        # What stands between, such as the __anext__() of an asynchronous generator, tells it to the collector alone.
        coroutine = awaited if isinstance(awaited, _SUSPENDABLE) else _referred(awaited, _SUSPENDABLE)


def _inside_greenlet(spawning: Any) -> list[FrameType]:
    """The frames of the greenlet in which a greenlet_spawn() runs its function, outermost first."""
    inner = _referred(spawning, greenlet.greenlet)
    return [] if inner is None else list(callsites.outwards(inner.gr_frame))[::-1]


def _referred(one: Any, kind: Any) -> Any:
    return next((each for each in gc.get_referents(one) if isinstance(each, kind)), None)


def running_here(frame: FrameType, outermost: FrameType | None) -> Iterator[FrameType]:
    """Yield `frame`, of the calling greenlet, and its callers in this and its parents, innermost first, to
    `outermost`."""
    within: Any = greenlet.getcurrent()
    inner: FrameType | None = frame
    while within is not None:
        for each in callsites.outwards(inner):
            yield each
            if each is outermost:
                return
        within = within.parent
        inner = None if within is None else within.gr_frame


def _running_elsewhere(thread: int, outermost: FrameType | None) -> Iterator[FrameType]:
    """The frames that run just now in another thread, innermost first, to `outermost`; of those between a greenlet of
    SQLAlchemy's and that one, nobody tells."""
    for each in callsites.outwards(sys._current_frames().get(thread)):
        if each is outermost:
            break
        yield each
    if outermost is not None:
        yield outermost


def run_in_thread(work: Callable[[], object]) -> None:
    """Run `work` soon in a thread of its own, which keeps no process running. Never waits: it is called in the middle
    of a connection's return, also by destructors. (So not threading.Thread: its start() takes locks, and waits.)

    Raises:
        RuntimeError: there are too many threads.
    """

    def bounded() -> None:
        try:
            work()
        except Exception:  # mostly a log handler's; logging it might fail again
            traceback.print_exc()

    if not sys.is_finalizing():
        _start_thread(bounded, ())


def run_aside(work: Callable[[], object]) -> None:
    """Run `work` soon in a thread of its own, if there can be one. Never fails, never waits."""
    with suppress(RuntimeError):
        run_in_thread(work)


leak_watches = Watches(run_aside)

_leak_watch = PeriodicTask(leak_watches.look, run_in_thread, _sleep)


def watch_leaks() -> None:
    """Start this process's leak watch, unless it runs. Called for each new connection, since a process without one has
    nothing to watch."""
    if leak_watches:
        _leak_watch.start()
