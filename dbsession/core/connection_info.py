"""What we know of a pooled connection: the keys of what we note in its `info`, which goes with the connection, or in
its pool record's `record_info`, which stays; and what a driver's connection tells us when its class is ours."""

from __future__ import annotations

import select
from typing import Any

COMMITTING = "dbsession.committing"
"""In `info`: a commit was begun that has not succeeded."""

DOOMED = "dbsession.doomed"
"""In `info`: the error that has undone a part of the transaction under way, or its own statement only: that is found
out where the transaction goes on."""

UNTOLD = "dbsession_untold"
"""An attribute of such an error that nobody has been told, so that its statement alone is as much as half of a unit."""

TIMEOUT_UNDOES_ALL = "dbsession.timeout_undoes_all"
"""In `info`: whether its server rolls the whole transaction back after a lock wait timeout, once it was asked."""

SCOPE = "dbsession.scope"
"""In `info`: a weak reference to the scope of the session that uses it."""

READ_TIMEOUT = "dbsession.read_timeout"
"""In `info`: the read timeout that it had before its scope set another."""

WIRE = "dbsession.wire"
"""In `info`: what knows whether the connection is `pinging` or `streaming`, where its DBAPI object does not."""

DETACHED_USER = "dbsession.detached_user"
"""In `info` of a connection detached from its pool, which has no Checkout any more: a weak reference to the Connection
that has executed something on it."""

CHECKOUT = "dbsession.checkout"
"""In `record_info`: the `core.pool.checkout.Checkout` of whoever uses it."""


HUNG_UP: int = getattr(select, "POLLRDHUP", 0)
"""For a poll(): the other side has closed, whatever is unread. Without it (not on Linux) a reset is seen all the
same."""


OPENING, USED, ASIDE = "opening", "used", "aside"
"""Who sends on a connection: whoever opens it, or its `checkout` listeners; its user; SQLAlchemy or we ourselves, who
take back what its user has set."""

CLEANING_S = 5.0
"""Seconds that the server has for each answer while a returned connection is cleaned; then it is discarded."""


def nobody() -> None:
    """Stand for a weak reference whose object is gone: `info.get(SCOPE, nobody)()`."""


def driver_of(connection: Any) -> Any:
    """Return the driver's connection below the pool's proxy and SQLAlchemy's adapter for asyncio."""
    connection = getattr(connection, "dbapi_connection", connection)
    return getattr(connection, "driver_connection", connection)


class TooLate(TimeoutError):
    """A wait of ours has taken too long. A TimeoutError that is none may be anybody's, thrown in as
    `gevent.Timeout(1, TimeoutError)` does."""

    def __init__(self, text: str = "timed out") -> None:
        super().__init__(text)


class KnownConnection:
    """Base of our own connection classes. Whatever interrupts one in the middle of an answer has closed it; of another
    driver's connection nobody can say whether it is still in step with its server."""

    open: bool
    """Whether it can still be used."""

    gave_up: bool
    """Closed by us, while the server may be well: no reason to mistrust the pool's other connections."""

    commit_sent: bool
    """Whether the last commit() got as far as sending COMMIT."""

    @property
    def unread(self) -> bool:
        """Whether a server-side stream has not been read to its end."""
        raise NotImplementedError

    @property
    def streaming(self) -> bool:
        """Whether a server-side cursor is open, for those who look in: its rows may be left `unread`, or at the
        server, where a ROLLBACK ends it at once."""
        return self.unread

    def finish_at_hand(self) -> bool:
        """Read what is left of a server-side stream if it has come already and is little; return whether it was."""
        raise NotImplementedError

    def read_within(self, timeout_s: float | None) -> float | None:
        """Wait so long for each piece of an answer from now on; returns how long it was before."""
        raise NotImplementedError

    def read_within_at_most(self, timeout_s: float) -> float | None:
        """Wait no longer than that for each piece of an answer from now on; returns how long it was before."""
        raise NotImplementedError
