"""What a driver's connection tells us when its class is ours: more than PEP 249 has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class KnownConnection:
    """Base of our own connection classes. Whatever interrupts one in the middle of an answer has closed it; of another
    driver's connection nobody can say whether it is still in step with its server."""

    gave_up: bool
    """Closed by us, while the server may be well: no reason to mistrust the pool's other connections."""

    commit_sent: bool
    """Whether the last commit() got as far as sending COMMIT."""

    stream_of: Callable[[], Any]
    """Who reads the server-side stream that was begun last: the Connection of SQLAlchemy."""

    @property
    def unread(self) -> bool:
        """Whether a server-side stream has not been read to its end."""
        raise NotImplementedError

    def read_within(self, timeout_s: float | None) -> float | None:
        """Wait so long for each piece of an answer from now on; returns how long it was before."""
        raise NotImplementedError

    def read_within_at_most(self, timeout_s: float) -> float | None:
        """The same, unless it is shorter already."""
        raise NotImplementedError
