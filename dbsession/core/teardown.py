"""What teardown does in both halves: its bound, the report of a session that failed to close, and throwing connections
away, so that their slots in the pool come back."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from sqlalchemy.engine import Connection

from dbsession.errors import describe

Sessions = dict[Any, Any]
"""The used set of one scope: database -> session."""

BOUND_S = 5.0
"""Seconds that the sessions of a scope have together to close; then their connections are discarded."""


def kill_of(error: BaseException) -> BaseException | None:
    """Return `error` if it is a kill or a cancellation, anything but an `Exception`; else None."""
    return None if isinstance(error, Exception) else error


def not_in_time() -> TimeoutError:
    """The error of a session that took longer than the bound."""
    return TimeoutError(f"not closed within {BOUND_S:g} s")


def report(logger: logging.Logger, database: Any, label: str, failure: BaseException) -> None:
    """Log that a session failed to close. Raises only a kill: what else a log handler of the user's raises is of less
    interest than the sessions that are still to be closed."""
    try:
        logger.warning(
            "Database %r: a session of %s failed to close with %s; its connection was discarded.",
            database.name,
            label,
            describe(failure),
        )
    except Exception:
        pass


def discard(connections: Iterable[Connection]) -> BaseException | None:
    """Throw these connections away, so that their slots in the pool come back; return the first kill that landed
    on the way. May switch greenlets."""
    kill: BaseException | None = None
    for connection in connections:
        for step in (connection.invalidate, connection.close):
            try:
                step()
            except BaseException as error:
                kill = kill or kill_of(error)
    return kill
