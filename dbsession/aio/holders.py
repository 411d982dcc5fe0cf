"""Which task holds a connection: see `dbsession.holders`.

SQLAlchemy takes a connection in a greenlet of its own, whose parent is the one of the caller's coroutines, suspended
meanwhile: so their frames hang on the parent, and those of a `run_sync()` function or of a listener on the greenlet.
"""

from __future__ import annotations

import asyncio
import os
import sys
import weakref
from time import monotonic
from types import FrameType
from typing import Any

import greenlet
from sqlalchemy.pool import ConnectionPoolEntry

from dbsession.core.connection_info import CHECKOUT
from dbsession.core.pool import callsites
from dbsession.core.pool.holders import STACK_FRAMES, Checkout, HeldConnections
from dbsession.errors import plain

_ASYNCIO = os.path.dirname(os.path.abspath(asyncio.__file__)) + os.sep

# Files of code that stands between the user's and the pool, and of the user's: a lookup in place of a call. Written by
# any thread, a step each; they grow no further than the program's files.
_between: set[str] = set()
_users: set[str] = set()

_FIRST = 4  # in _noted(): below it there is only the pool

_here = greenlet.getcurrent
_running_loop = asyncio.get_running_loop
_current_task = asyncio.current_task


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
        try:
            task: Any = _current_task(_running_loop())
        except RuntimeError:  # no loop runs here
            task = None
        note.stack = _noted(task, self.frames)
        note.taker = None if task is None else weakref.ref(task)  # None: in a callback of the loop
        try:
            scope = task._dbsession_aio.scopes[-1]
            note.label = None if scope.kind == "implicit" else scope.label
        except (AttributeError, IndexError):
            note.label = None
        note.since = note.changed = monotonic()
        note.in_use = True
        self.stats.checkouts += 1

    def name_of(self, note: Checkout) -> str:
        if note.taker is None:
            return "no task"
        task: Any = note.taker()
        if task is None:
            return "a task that is gone"
        function = getattr(task.get_coro(), "__qualname__", None)
        return plain(f"{function} in {task.get_name()}" if function else task.get_name())


def _noted(task: Any, count: int) -> callsites.Noted:
    """The user's places in this task, `count` at most, for what is called two calls below SQLAlchemy's
    `_ConnectionFairy._checkout()`.

    Each frame that is looked at costs as much as all else, so those in the greenlet are left out where nothing of the
    user's is in it but a listener, if anything: its place is then the line that awaits. (Not of whole stacks.)
    """
    parent = _here().parent
    spawn = None if parent is None else parent.gr_frame  # SQLAlchemy's greenlet_spawn(), for whom the next one waits
    frame: FrameType | None = None if spawn is None else spawn.f_back
    if frame is None:
        return callsites.noted(sys._getframe(_FIRST), count)
    stack: callsites.Noted = []
    code = frame.f_code
    if count > STACK_FRAMES or code.co_name == "run_sync" or code.co_filename not in _between:
        stack = callsites.noted(sys._getframe(_FIRST), count)
        count -= len(stack) // 2
    # Beyond the task's own coroutine there is only the event loop, and whoever runs it.
    last: FrameType | None = None if task is None else getattr(task.get_coro(), "cr_frame", None)
    while frame is not None and (
        (file := frame.f_code.co_filename) in _between or (file not in _users and _is_between(file))
    ):
        if frame is last:
            return stack
        frame = frame.f_back
    while frame is not None and count:
        stack += (frame.f_code, frame.f_lasti)
        if frame is last:
            break
        frame = frame.f_back
        count -= 1
    return stack


def _is_between(file: str) -> bool:
    """Whether it is SQLAlchemy's or ours, or what asyncio itself awaits, as in `wait_for()`."""
    between = callsites.is_inside(file) or file.startswith(_ASYNCIO)
    (_between if between else _users).add(file)
    return between
