"""Throwing connections away, so that their places in the pool come back."""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy.engine import Connection

BOUND_S = 5.0
"""Seconds that the sessions of a scope have together to close; then their connections are discarded."""


def discard(connections: Iterable[Connection]) -> BaseException | None:
    """Throw these connections away, so that their places in the pool come back; return the first kill that landed
    on the way. May switch greenlets."""
    kill: BaseException | None = None
    for connection in connections:
        for step in (connection.invalidate, connection.close):
            try:
                step()
            except BaseException as error:
                if not isinstance(error, Exception):
                    kill = kill or error
    return kill
