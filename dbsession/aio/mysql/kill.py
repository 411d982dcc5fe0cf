"""KILL in asyncio: a task of ours that ends abandoned statements by a side connection."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any

from sqlalchemy.util import greenlet_spawn

from dbsession.aio.abandoned import EndsAbandoned
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


class LoopKiller(Killer, EndsAbandoned):
    """Ends abandoned statements of one engine. Lives as `EndsAbandoned` says."""

    bound_s = TIMEOUT_S
    again_s = AGAIN_S

    def __init__(self, name: str, stats: Stats) -> None:
        Killer.__init__(self, name, stats)
        EndsAbandoned.__init__(self)
        self._pool: Any = None

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
            self._pool = pool
            self.begin()

    async def end(self, thread: Thread) -> None:
        task: Any = asyncio.current_task()
        try:
            await self._kill(self._pool, thread)
        except asyncio.CancelledError:
            if task.cancelling():
                raise
            # Not this task, but one that the driver has made to connect: asyncio.run() cancels all there are at its
            # end, once.
            await self._kill(self._pool, thread)

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
