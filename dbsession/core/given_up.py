"""Connections that are given up in the middle of an answer: who may not use them any more, and what they hear."""

from __future__ import annotations

import sys
from typing import ClassVar

from dbsession.core import fork
from dbsession.core.connection_info import KnownConnection
from dbsession.core.fork import KNOWN


class GivesUp(KnownConnection):
    """Before a driver's class among the bases of a connection of ours. Lives as it does.

    Who may write: whoever sends or reads on the connection, one at a time.
    """

    OPERATIONAL_ERROR: ClassVar[type[Exception]]
    """The driver's."""

    read_timeout_s: float | None = None
    gave_up = False
    given_up_by: BaseException | None = None
    """What has interrupted it."""
    _epoch: int  # of the process that has opened it

    def read_within(self, timeout_s: float | None) -> float | None:
        before, self.read_timeout_s = self.read_timeout_s, timeout_s
        return before

    def read_within_at_most(self, timeout_s: float) -> float | None:
        before = self.read_timeout_s
        return self.read_within(timeout_s if before is None else min(before, timeout_s))

    def refuse_if_lost(self) -> None:
        """Raise what keeps the connection from being used: whatever is done on it asks here first."""
        if not KNOWN[0]:
            fork.found_out()
        if self._epoch != fork.epoch:
            raise self.OPERATIONAL_ERROR(
                "This connection was opened before this process was forked and belongs to the parent. Open a session "
                "anew: get_dbsession()."
            )
        if self.gave_up:
            current = sys.exception()
            if current is not None and current is self.given_up_by:
                raise current  # what a driver does in its `finally` must not take the place of a kill
            raise self.OPERATIONAL_ERROR("the connection was given up in the middle of a statement, and is closed")
