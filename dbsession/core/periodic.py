"""Work that is done again and again, in a thread of ours."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from functools import partial

from dbsession.core import fork


class PeriodicTask:
    """Calls `work` again and again in a thread. Lives as long as the process; a forked child has none until `start()`.

    Args:
        work: returns the seconds until its next call. It may wait. If it raises, the traceback goes to stderr, and the
            next call comes as after the last one that did not.
        run_in_thread: runs what it is given in a thread, and never waits. Raises RuntimeError where there is none for
            it.
        sleep: stops such a thread for so many seconds.
    """

    def __init__(
        self,
        work: Callable[[], float],
        run_in_thread: Callable[[Callable[[], object]], object],
        sleep: Callable[[float], object],
    ) -> None:
        self._work = work
        self._run_in_thread = run_in_thread
        self._sleep = sleep
        self._pause_s = 1.0
        # The epochs in which it was started: one for each process. Written by `setdefault`, one step; whose token it is
        # takes it out.
        self._started: dict[int, object] = {}

    def start(self) -> None:
        """Start the work in this process, unless it runs; where no thread can be had now, by the next call. Never
        waits."""
        fork.look()
        epoch, token = fork.epoch, object()
        if epoch not in self._started and self._started.setdefault(epoch, token) is token:
            try:
                self._begin(epoch)
            except RuntimeError:
                del self._started[epoch]

    def _begin(self, epoch: int) -> None:
        self._run_in_thread(partial(self._for_ever, epoch))

    def _work_once(self) -> float:
        try:
            self._pause_s = self._work()
        except Exception:  # mostly a log handler's; logging it might fail again
            traceback.print_exc()
        return self._pause_s

    def _for_ever(self, epoch: int) -> None:
        while epoch == fork.epoch:
            self._sleep(self._work_once())
