"""Statements that nobody waits for any more are ended at MySQL and MariaDB, so that their locks are free at once.

A cancelled task, a client that has gone, closes its connection; the server notices when it next writes to it, which for
a statement that waits for a lock may be long. The task is not delayed: a task of ours says KILL by a side connection,
one at a time for each engine. It must never hit somebody else's thread, for instance on another server behind a load
balancer, so it looks first whether that thread is the client that ours was when it was opened: HOST in the processlist,
address and port, as the server saw it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from typing import Any

from dbsession.aio import teardown
from dbsession.core.backends import mysql_errors
from dbsession.core.pool.stats import Stats
from dbsession.errors import describe

logger = logging.getLogger("dbsession.aio.kill")

SEEN_AS = "dbsession.seen_as"
"""In a connection's `info`: (thread id, HOST) at the server."""

_NO_SUCH_THREAD = 1094  # it has ended since we looked
_TIMEOUT_S = 3.0  # for a KILL, the side connection included
_NOT_FOR_SIDE = ("async_creator_fn", "cursor_cls", "cursorclass", "database", "db", "init_command", "sql_mode")


class Killer:
    """Ends abandoned statements of one engine. Lives as long as it. Everything is written in the loop's own thread,
    and nothing awaits between reading and writing."""

    def __init__(self, name: str, stats: Stats) -> None:
        self.arguments: dict[str, Any] = {}
        """Of the driver's connect(), those of the engine's latest connection."""
        self._name = name
        self._stats = stats
        self._abandoned: deque[tuple[int, str]] = deque()
        self._working = False

    def note(self, connection: Any, info: dict[Any, Any]) -> None:
        """Remember how the server sees a connection just opened. One round trip."""
        cursor = connection.cursor()
        try:
            cursor.execute("SELECT ID, HOST FROM information_schema.PROCESSLIST WHERE ID = CONNECTION_ID()")
            row = cursor.fetchone()
        finally:
            cursor.close()
        if row is not None and ":" in row[1]:  # by a Unix socket all are "localhost", and cannot be told apart
            info[SEEN_AS] = (int(row[0]), str(row[1]))

    def abandon(self, info: dict[Any, Any], connect: Any) -> None:
        """Have the statement of the connection with this `info` ended. Does not wait. `connect` is the driver's."""
        seen_as = info.get(SEEN_AS)
        if seen_as is not None and self.arguments:  # else an `async_creator` has opened it, and nobody knows how
            self._abandoned.append(seen_as)
            if not self._working:
                self._working = True
                teardown.run_aside(self._work(connect), _TIMEOUT_S).add_done_callback(self._worked)

    def _worked(self, _: object) -> None:
        self._working = False  # or it was cancelled before its first step

    async def _work(self, connect: Any) -> None:
        task: Any = asyncio.current_task()
        while self._abandoned:
            thread_id, host = self._abandoned.popleft()
            try:
                async with asyncio.timeout(_TIMEOUT_S):
                    try:
                        await self._kill(connect, thread_id, host)
                    except asyncio.CancelledError:
                        if task.cancelling():
                            raise
                        # Not this task, but one that the driver has made to connect: asyncio.run() cancels all there
                        # are at its end, once.
                        await self._kill(connect, thread_id, host)
            except Exception as error:
                logger.warning(
                    "Database %r: an abandoned statement could not be ended at the server, where it may run on: %s.",
                    self._name,
                    describe(error),
                )
                self._abandoned.clear()  # the others at a server that does not answer would each wait as long

    async def _kill(self, connect: Any, thread_id: int, host: str) -> None:
        kept = {key: value for key, value in self.arguments.items() if key not in _NOT_FOR_SIDE}
        side = await connect(**kept | {"autocommit": True})
        try:
            async with side.cursor() as cursor:
                await cursor.execute("SELECT HOST FROM information_schema.PROCESSLIST WHERE ID = %s", (thread_id,))
                row = await cursor.fetchone()
                if row is not None and row[0] == host:
                    try:
                        await cursor.execute(f"KILL {thread_id:d}")
                    except Exception as error:
                        if mysql_errors.number(error) != _NO_SUCH_THREAD:
                            raise
                    else:
                        self._stats.kills += 1
        finally:
            side.close()
