"""What nobody waits for any more is ended at the server aside: by a task of ours, one at a time for each engine."""

from __future__ import annotations

import asyncio
from collections import deque
from contextvars import Context
from typing import Any, ClassVar

from dbsession.aio import teardown


class EndsAbandoned:
    """Ends, one after the other, what was abandoned on the connections of one engine. Lives as long as the engine.
    Everything is written in the loop's own thread, and nothing awaits between reading and writing."""

    bound_s: ClassVar[float]
    """Seconds that ending one may take."""
    again_s: ClassVar[float] = 0.25
    """Seconds until the next attempt where the last one is to be made again."""

    abandoned: deque[Any]

    def __init__(self) -> None:
        self.abandoned = deque()
        self._working = False

    def begin(self) -> None:
        """Have what was abandoned ended. Does not wait."""
        if self.abandoned and not self._working:
            self._working = True
            teardown.run_aside(self._work(), self.bound_s).add_done_callback(self._worked)

    async def end(self, each: Any) -> None:
        """End one."""
        raise NotImplementedError

    def tries_again(self, error: Exception, each: Any) -> bool:
        """Put one back to the others, if it is to be tried again after `again_s` seconds."""
        return False

    def failed(self, error: Exception, each: Any) -> None:
        """Report that one was not ended."""
        raise NotImplementedError

    def _worked(self, _: object) -> None:
        self._working = False  # or it was cancelled before its first step

    async def _work(self) -> None:
        while self.abandoned:
            each = self.abandoned.popleft()
            try:
                async with asyncio.timeout(self.bound_s):
                    await self.end(each)
            except Exception as error:
                if self.tries_again(error, each):  # by a timer: the loop's end would wait for a task
                    asyncio.get_running_loop().call_later(self.again_s, self.begin, context=Context())
                    return
                self.failed(error, each)
