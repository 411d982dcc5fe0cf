"""Discards: which connections go when one of them meets a lost server, or one that takes no writes.

A server that dies, or is demoted, leaves a pool full of connections that are of no use, so the first error discards
them all, each at its next checkout. Those opened since say more: if they fail as well, the next ones will. So there is
one such discard a second at most, and while a server goes on to refuse writes nothing goes but the connection that is
refused, one a second, whose successor asks whether it has found a server that takes them. Once one has, there was a
failover: what leads to the same address and was opened earlier goes, under whatever name.
"""

from __future__ import annotations

from time import monotonic

GAP_S = 1.0
"""Seconds between two discards of an engine's connections."""


class Discards:
    """When connections of one engine are discarded. Lives as long as the engine.

    Written by whoever meets an error or has opened a connection, one store each; two at once discard once more at most.
    """

    def __init__(self) -> None:
        self._last = float("-inf")
        self.refused = False
        """The server has refused a write, and no connection opened since has found one that takes it."""

    def due(self) -> bool:
        """Return whether something may be discarded again, and take note that it is."""
        now = monotonic()
        if now - self._last < GAP_S:
            return False
        self._last = now
        return True
