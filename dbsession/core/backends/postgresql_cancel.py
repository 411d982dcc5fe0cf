"""CancelRequest: a statement that nobody waits for any more is ended at PostgreSQL, so that its locks are free at once.

Whoever is killed is not delayed: the request goes aside, over a connection of its own, with the key that the server has
given to this session only; so it can hit nobody else's, and a pooler passes it on. The session itself is closed after
it, and not before: a pooler forgets the key of a client that has gone.
https://www.postgresql.org/docs/current/protocol-flow.html#PROTOCOL-FLOW-CANCELING-REQUESTS
"""

from __future__ import annotations

import logging

from dbsession.core.pool.stats import Stats
from dbsession.errors import describe

logger = logging.getLogger("dbsession.postgresql.cancel")

TIMEOUT_S = 3.0
"""Seconds that it may take to end a statement."""
AGAIN_S = 0.25
"""Seconds until the server is asked again. It forgets a request that comes just before the statement begins."""


class Cancels:
    """Counts and reports the requests of one engine; each half sends them. Lives as long as the engine."""

    def __init__(self, name: str, stats: Stats) -> None:
        self._name = name
        self._stats = stats

    def sent(self) -> None:
        """Note that a request was taken by the server."""
        self._stats.kills += 1

    def not_sent(self, error: BaseException) -> None:
        """Report a statement that is not ended."""
        logger.warning(
            "Database %r: an abandoned statement could not be ended at the server, where it may run on: %s.",
            self._name,
            describe(error),
        )
