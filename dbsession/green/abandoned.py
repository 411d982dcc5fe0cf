"""What nobody waits for any more is ended at the server aside: by a greenlet, or a thread of ours, one at a time."""

from __future__ import annotations

import weakref
from collections import deque
from typing import Any

from dbsession.core import fork
from dbsession.green import hub

# Every worker of this process. Written when one is made.
_workers: weakref.WeakSet[EndsAbandoned] = weakref.WeakSet()


class EndsAbandoned:
    """Ends, one after the other, what was abandoned on the connections of one engine. Lives as long as the engine.

    `abandoned` is written by whoever abandons (append) and by the one who works (popleft, appendleft), one step each.
    `_working` is a flag: it is only ever tried, never waited for, so it may be held over a switch.
    """

    again_s = 0.25
    """Seconds until the next attempt where the last one is to be made again."""

    abandoned: deque[Any]

    def __init__(self) -> None:
        self.abandoned = deque()
        self._forget()
        _workers.add(self)

    def _forget(self) -> None:
        self._epoch = fork.epoch
        self._owner_hub: Any = None
        self.abandoned.clear()
        self._working = hub.allocate_lock()

    def take_over(self) -> None:
        """Forget, in a forked child, what the parent has abandoned."""
        if self._epoch != fork.epoch:
            self._forget()

    def note_hub(self) -> None:
        """Remember the calling thread's hub, if it is one that lasts: what other threads abandon is ended there."""
        if hub.lasts():
            self._owner_hub = hub.here()

    def begin(self) -> None:
        """Have what was abandoned ended. Does not wait; may be called by anybody, the Hub included."""
        self.note_hub()
        if self._owner_hub is not None:
            hub.run_aside(self._work, self._owner_hub)
        else:  # in a patched process the thread gets a hub, whose descriptors gevent does not close when it ends
            hub.run_in_thread(self._work)

    @property
    def pending(self) -> bool:
        """Whether something is still to be ended."""
        return bool(self.abandoned) or self._working.locked()

    def end(self, each: Any) -> None:
        """End one. May switch."""
        raise NotImplementedError

    def tries_again(self, error: Exception, each: Any) -> bool:
        """Put one back to the others, if it is to be tried again after `again_s` seconds."""
        return False

    def failed(self, error: Exception, each: Any) -> None:
        """Report that one was not ended."""
        raise NotImplementedError

    def _work(self) -> None:
        epoch = self._epoch
        while self.abandoned and self._working.acquire(False):
            each = None
            try:
                while self.abandoned and epoch == fork.epoch:
                    each = self.abandoned.popleft()
                    self.end(each)
            except Exception as error:
                if epoch != fork.epoch:
                    return  # a child's copy of the greenlet: whatever it was at is the parent's
                if self.tries_again(error, each):
                    hub.sleep(self.again_s)
                else:
                    self.failed(error, each)
            finally:
                if epoch == fork.epoch:
                    self._working.release()


def pending() -> bool:
    """Whether something abandoned so far is still to be ended."""
    return any(worker.pending for worker in list(_workers))
