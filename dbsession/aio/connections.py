"""One ROLLBACK is enough.

SQLAlchemy ends a session's transaction by a COMMIT or ROLLBACK, and then rolls the connection back once more as it
returns to the pool, because somebody may have used it without a transaction of SQLAlchemy's. That is a round trip for
nothing (for aiosqlite: one to its thread) where nothing can have been sent in between.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import Context
from typing import Any


class JustEnded:
    """Of which connection of an engine a transaction has ended in this very step of the event loop. Lives as long as
    the engine; written in the loop's thread only.

    Whoever sends something waits for the answer, and the loop takes a step: so if the step is the same, nothing was
    sent, by no task, and by no way round SQLAlchemy either. A statement forgets it all the same, lest a driver answers
    without waiting.
    """

    def __init__(self) -> None:
        self._connection: Any = None
        self._context = Context()  # empty: the callback would keep that of the request

    def listen(self, dialect: Any) -> None:
        """Follow the ends of the transactions of this dialect, which is an engine's own."""
        dialect.do_commit = self._noted(dialect.do_commit)
        rollback = self._noted(dialect.do_rollback)

        def unless_ended(proxied: Any) -> None:
            connection = proxied.dbapi_connection
            if connection is None or connection is not self._connection:
                rollback(proxied)

        dialect.do_rollback = unless_ended

    def forget(self) -> None:
        """Something is sent, or the loop takes its next step."""
        self._connection = None

    def _noted(self, end: Callable[[Any], None]) -> Callable[[Any], None]:
        def noted(proxied: Any) -> None:
            self._connection = None
            end(proxied)
            self._connection = proxied.dbapi_connection
            asyncio.get_running_loop().call_soon(self.forget, context=self._context)

        return noted
