"""What a process does again and again, aside: the leak watch, the publishing of metrics."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import gevent

from dbsession import fork, hub

FIRST_S = 0.05
"""From `start()` to the first turn, at most."""


class Ticker:
    """Calls `work` again and again: in greenlets that a timer of the main hub starts, which keeps no loop running, or
    in a thread of ours where no hub lasts. Lives as long as the process; a forked child has none until `start()`.

    Args:
        work: returns the seconds until its next turn. It may wait. If it raises, the traceback goes to stderr, and the
            next turn comes as after the last one that did not.
    """

    def __init__(self, work: Callable[[], float]) -> None:
        self._work = work
        self._pause_s = 1.0
        self._timer: Any = None  # the next turn, while it runs in a hub
        # The epochs in which it was started: one for each process. Written by `setdefault`, one step.
        self._started: dict[int, object] = {}

    def start(self) -> None:
        """See to it that it runs in this process. Never waits."""
        epoch, token = fork.epoch, object()
        if epoch not in self._started and self._started.setdefault(epoch, token) is token:
            if hub.lasts():
                self._later(hub.here(), epoch, FIRST_S)
            else:
                hub.run_in_thread(partial(self._for_ever, epoch))

    def _turn(self) -> float:
        try:
            self._pause_s = self._work()
        except Exception:  # mostly a log handler's; logging it might fail again
            traceback.print_exc()
        return self._pause_s

    def _later(self, home: Any, epoch: int, seconds: float) -> None:
        self._timer = home.loop.timer(seconds, ref=False)
        self._timer.start(gevent.spawn, self._turn_in_hub, home, epoch)  # in a greenlet: `work` may wait

    def _turn_in_hub(self, home: Any, epoch: int) -> None:
        if epoch != fork.epoch:
            return  # a forked child's loop still has its parent's timers
        try:
            self._turn()
        finally:
            self._later(home, epoch, self._pause_s)

    def _for_ever(self, epoch: int) -> None:
        while epoch == fork.epoch:
            hub.sleep_thread(self._turn())
