"""The names that a script of `run_script` may use; importing this sets the process up for its mode.

    MODE                          "patched", "late" or "threads"
    dbsession                     imported before or after monkey.patch_all(), as the mode says
    spawn(fn, *args) -> Task      a greenlet, or a thread in threads mode, already started
    join(tasks, timeout_s)        their results in order; the first exception is raised again
    sleep(seconds)                0 lets the others run
    wait_until(predicate, deadline_s)
    checked_out(engine)           how many connections its pool has given out

`DBSESSION_TEST_MODE` is read and removed, since dbsession reads DBSESSION_* itself. With `ROWS_IN_PYTHON` rows are read
as where asyncmy is not installed, from the first one by a function made for them.
"""

# ruff: noqa: E402  # dbsession and what follows are imported before or after patch_all(), as the mode says

from __future__ import annotations

import os
import sys
import warnings

MODE = os.environ.pop("DBSESSION_TEST_MODE")

if os.environ.get("ROWS_IN_PYTHON"):
    sys.modules["asyncmy.protocol"] = None  # type: ignore[assignment]

if MODE == "patched":
    from gevent import monkey

    monkey.patch_all()

import dbsession

if MODE == "late":
    from gevent import monkey

    with warnings.catch_warnings():
        # "ssl was imported before": that is the situation this mode is about.
        warnings.simplefilter("ignore", monkey.MonkeyPatchWarning)
        monkey.patch_all()

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from support.waiting import wait_until

if os.environ.get("ROWS_IN_PYTHON"):
    from dbsession.green.mysql import columns

    columns.WORTH_IT = 0

__all__ = ["MODE", "Task", "checked_out", "dbsession", "join", "sleep", "spawn", "wait_until"]

sleep = time.sleep


class Task:
    """One call, running in `handle`: a gevent Greenlet or a Thread. Ends when the call returns."""

    def __init__(self, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self.result: Any = None
        self.error: BaseException | None = None
        # Neither is held on self: what fn holds must be gone when fn has ended.
        if MODE == "threads":
            self.handle: Any = threading.Thread(target=self._run, args=(fn, args), daemon=True)
            self.handle.start()
        else:
            import gevent

            self.handle = gevent.spawn(self._run, fn, args)

    def _run(self, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
        # Kept for join(), instead of printed; BaseException, because a kill or a timeout is a result too.
        try:
            self.result = fn(*args)
        except BaseException as error:
            self.error = error


def spawn(fn: Callable[..., Any], *args: Any) -> Task:
    """Starts `fn(*args)` in a greenlet, or in a thread in threads mode."""
    return Task(fn, args)


def join(tasks: Task | Sequence[Task], timeout_s: float = 30.0) -> list[Any]:
    """The tasks' results in order, once all have ended; raises the first one's exception.

    AssertionError when some still run after `timeout_s` seconds in all.
    """
    tasks = [tasks] if isinstance(tasks, Task) else list(tasks)
    end = time.monotonic() + timeout_s
    for task in tasks:
        task.handle.join(max(0.0, end - time.monotonic()))
    # A thread has is_alive(); a greenlet is dead once it has a result or an exception.
    alive = [t for t in tasks if (t.handle.is_alive() if MODE == "threads" else not t.handle.dead)]
    assert not alive, f"{len(alive)} of {len(tasks)} tasks still run after {timeout_s:g} s"
    for task in tasks:
        if task.error is not None:
            raise task.error
    return [task.result for task in tasks]


def checked_out(engine: Any) -> int:
    """How many connections the engine's pool has given out and not got back."""
    return int(engine.pool.checkedout())
