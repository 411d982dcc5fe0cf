"""What a process does again and again, aside: the leak watch, the publishing of metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gevent

from dbsession.core import fork, periodic
from dbsession.green import hub

FIRST_S = 0.05
"""From `start()` to the first call of `work`, at most."""


class PeriodicTask(periodic.PeriodicTask):
    """Calls `work` again and again: in greenlets that a timer of the main hub starts, which keeps no loop running, or
    in a thread of ours where no hub lasts. Lives as long as the process."""

    def __init__(self, work: Callable[[], float]) -> None:
        super().__init__(work, hub.run_in_thread, hub.sleep_thread)
        self._timer: Any = None  # for the next call, while it runs in a hub

    def _begin(self, epoch: int) -> None:
        if hub.lasts():
            self._later(hub.here(), epoch, FIRST_S)
        else:
            super()._begin(epoch)

    def _later(self, owner: Any, epoch: int, seconds: float) -> None:
        self._timer = owner.loop.timer(seconds, ref=False)
        self._timer.start(gevent.spawn, self._work_in_hub, owner, epoch)  # in a greenlet: `work` may wait

    def _work_in_hub(self, owner: Any, epoch: int) -> None:
        fork.look()
        if epoch != fork.epoch:
            return  # a forked child's loop still has its parent's timers
        try:
            self._work_once()
        finally:
            self._later(owner, epoch, self._pause_s)
