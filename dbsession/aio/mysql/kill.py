"""KILL in asyncio: a task of ours that ends abandoned statements by a side connection."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextvars import Context, ContextVar
from typing import Any

from sqlalchemy.util import greenlet_spawn

from dbsession.aio import teardown
from dbsession.aio.mysql.connection import Wire
from dbsession.aio.mysql.opening import at
from dbsession.core.backends.base import Verdict
from dbsession.core.backends.mysql_errors import classify
from dbsession.core.backends.mysql_kill import (
    AGAIN_S,
    OWN_THREAD,
    TIMEOUT_S,
    Killer,
    NotLetIn,
    Thread,
    side_arguments,
)
from dbsession.core.pool.stats import Stats

SIDE: ContextVar[Thread | None] = ContextVar("dbsession.side", default=None)
"""For whose thread the task opens a side connection now."""
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
        if isinstance(local, tuple):  # else a Unix socket
            peer = wire.transport.get_extra_info("peername")
            host = self.host_of(local, peer) or self._ask(connection, wire, local, peer, thread_id)
            info[THREAD] = Thread(thread_id, host, peer, wire.reopen)
        else:
            info[THREAD] = Thread(thread_id, None)

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

    def abandon_connection(self, info: dict[Any, Any], pool: Any) -> None:
        """Have the statement of the connection with this `info`, of the `pool`, ended. Does not wait."""
        thread = info.get(THREAD)
        if thread is not None and self.abandon(thread):  # else an `async_creator` has opened it, nobody knows how
            self._begin(pool)

    def _begin(self, pool: Any) -> None:
        if self.abandoned and not self._working:
            self._working = True
            teardown.run_aside(self._work(pool), TIMEOUT_S).add_done_callback(self._worked)

    def _worked(self, _: object) -> None:
        self._working = False  # or it was cancelled before its first step

    async def _work(self, pool: Any) -> None:
        task: Any = asyncio.current_task()
        while self.abandoned:
            thread = self.abandoned.popleft()
            try:
                async with asyncio.timeout(TIMEOUT_S):
                    try:
                        await self._kill(pool, thread)
                    except asyncio.CancelledError:
                        if task.cancelling():
                            raise
                        # Not this task, but one that the driver has made to connect: asyncio.run() cancels all there
                        # are at its end, once.
                        await self._kill(pool, thread)
            except Exception as error:
                if self.tries_again(error, thread):  # by a timer: the loop's end would wait for a task
                    loop = asyncio.get_running_loop()
                    loop.call_later(AGAIN_S, self._begin, pool, context=Context())
                    return
                self.failed(error, thread)

    async def _kill(self, pool: Any, thread: Thread) -> None:
        side = await self._open(pool, thread)
        try:
            async with side.cursor() as cursor:
                await self._run(thread, cursor)
        finally:
            side.close()

    async def _open(self, pool: Any, thread: Thread) -> Any:
        token = SIDE.set(thread)
        try:
            # As the pool opens one, with the user's `do_connect` listeners.
            return (await greenlet_spawn(pool._invoke_creator, None)).driver_connection
        except Exception as error:
            if not self.is_barred(error):
                raise
            try:
                return await thread.own(thread)
            except Exception as own:
                raise NotLetIn(error, own) if self.is_barred(own) else own from error
        finally:
            SIDE.reset(token)

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


async def open_side(connect: Callable[..., Awaitable[Any]], arguments: dict[str, Any], thread: Thread) -> Any:
    """Open a side connection to the address that `thread` has: its name may mean another server by now."""
    kept = side_arguments(arguments)
    if isinstance(thread.peer, tuple):
        kept = {**at(thread.peer[0], {"host": thread.peer[0], **kept}), "port": thread.peer[1]}
    return await connect(**kept)
