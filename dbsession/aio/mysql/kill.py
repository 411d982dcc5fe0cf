"""KILL in asyncio: a task of ours that ends abandoned statements by a side connection."""

from __future__ import annotations

import asyncio
from contextvars import Context
from typing import Any

from dbsession.aio import teardown
from dbsession.aio.mysql.connection import Wire
from dbsession.core.backends.base import Verdict
from dbsession.core.backends.mysql_errors import classify
from dbsession.core.backends.mysql_kill import AGAIN_S, OWN_THREAD, TIMEOUT_S, Killer, Thread
from dbsession.core.pool.stats import Stats

THREAD = "dbsession.thread"
"""In a connection's `info`: its Thread at the server."""


class LoopKiller(Killer):
    """Ends abandoned statements of one engine. Lives as long as the engine. Everything is written in the loop's own
    thread, and nothing awaits between reading and writing."""

    def __init__(self, name: str, stats: Stats) -> None:
        super().__init__(name, stats)
        self._working = False

    def opened(self, connection: Any, wire: Wire, info: dict[Any, Any]) -> None:
        """Note how the server sees a connection just opened: a round trip, unless it is known. Awaits then."""
        local = wire.transport.get_extra_info("sockname")
        thread_id = connection.driver_connection.thread_id()
        host = None
        if isinstance(local, tuple):  # else a Unix socket
            peer = wire.transport.get_extra_info("peername")
            host = self.host_of(local, peer) or self._ask(connection, wire, local, peer, thread_id)
        info[THREAD] = Thread(thread_id, host)

    def _ask(self, connection: Any, wire: Wire, local: tuple[Any, ...], peer: Any, thread_id: int) -> str | None:
        cursor = connection.cursor()
        try:
            cursor.execute(OWN_THREAD)
            return self.learn(local, peer, thread_id, cursor.fetchone())
        except wire.module.Error as error:
            if wire.late or wire.transport.is_closing() or classify(error) is Verdict.DISCONNECT:
                raise
            return None  # a server that speaks the protocol, and has no such table
        finally:
            cursor.close()

    def abandon_connection(self, info: dict[Any, Any], connect: Any) -> None:
        """Have the statement of the connection with this `info` ended. Does not wait. `connect` is the driver's."""
        thread = info.get(THREAD)
        if thread is None or not self.arguments:  # an `async_creator` has opened it, and nobody knows how
            return
        if self.abandon(thread):
            self._begin(connect)

    def _begin(self, connect: Any) -> None:
        if self.abandoned and not self._working:
            self._working = True
            teardown.run_aside(self._work(connect), TIMEOUT_S).add_done_callback(self._worked)

    def _worked(self, _: object) -> None:
        self._working = False  # or it was cancelled before its first step

    async def _work(self, connect: Any) -> None:
        task: Any = asyncio.current_task()
        while self.abandoned:
            thread = self.abandoned.popleft()
            try:
                async with asyncio.timeout(TIMEOUT_S):
                    try:
                        await self._kill(connect, thread)
                    except asyncio.CancelledError:
                        if task.cancelling():
                            raise
                        # Not this task, but one that the driver has made to connect: asyncio.run() cancels all there
                        # are at its end, once.
                        await self._kill(connect, thread)
            except Exception as error:
                if self.tries_again(error, thread):  # by a timer: the loop's end would wait for a task
                    loop = asyncio.get_running_loop()
                    loop.call_later(AGAIN_S, self._begin, connect, context=Context())
                    return
                self.failed(error, thread)

    async def _kill(self, connect: Any, thread: Thread) -> None:
        side = await connect(**self.side_arguments())
        try:
            async with side.cursor() as cursor:
                await self._run(thread, cursor)
        finally:
            side.close()

    async def _run(self, thread: Thread, cursor: Any) -> None:
        steps = self.steps(thread)
        try:
            statement = next(steps)
            while True:
                try:
                    await cursor.execute(statement)
                except Exception as error:
                    statement = steps.throw(error)
                else:
                    statement = steps.send(await cursor.fetchone() if cursor.description else None)
        except StopIteration:
            pass
