"""What a process does again and again, aside: the leak watch, the publishing of metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gevent

from dbsession.core import fork
from dbsession.core.periodic import Turns
from dbsession.green import hub

FIRST_S = 0.05
"""From `start()` to the first turn, at most."""


class Ticker(Turns):
    """Calls `work` again and again: in greenlets that a timer of the main hub starts, which keeps no loop running, or
    in a thread of ours where no hub lasts. Lives as Turns does, whose `work` it takes."""

    def __init__(self, work: Callable[[], float]) -> None:
        super().__init__(work, hub.run_in_thread, hub.sleep_thread)
        self._timer: Any = None  # the next turn, while it runs in a hub

    def _begin(self, epoch: int) -> None:
        if hub.lasts():
            self._later(hub.here(), epoch, FIRST_S)
        else:
            super()._begin(epoch)

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
