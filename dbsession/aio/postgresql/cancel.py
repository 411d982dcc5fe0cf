"""CancelRequest in asyncio: a task of ours that ends abandoned statements of psycopg's connections."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from time import monotonic
from typing import Any

from psycopg import capabilities, generators
from psycopg.waiting import Wait

from dbsession.aio.abandoned import EndsAbandoned
from dbsession.aio.postgresql.connection import Connection, drive, ready_now
from dbsession.core.backends.postgresql_cancel import AGAIN_S, TIMEOUT_S, Cancels
from dbsession.core.backends.psycopg import ACTIVE
from dbsession.core.pool.stats import Stats

_LOOK_S = 0.01


class LoopCanceller(Cancels, EndsAbandoned):
    """Ends abandoned statements of one engine. Lives as `EndsAbandoned` says."""

    bound_s = TIMEOUT_S

    def __init__(self, name: str, stats: Stats) -> None:
        Cancels.__init__(self, name, stats)
        EndsAbandoned.__init__(self)

    def abandon(self, connection: Connection) -> None:
        """Have the statement of this connection ended, and then the connection closed. Does not wait."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:  # a destructor, or the loop has ended
            connection.pgconn.finish()
            return
        self.abandoned.append(connection)
        self.begin()

    async def end(self, connection: Connection) -> None:
        pgconn = connection.pgconn
        try:
            await self._ask(pgconn)
            while not await _has_ended(pgconn):  # within `bound_s` seconds
                await self._ask(pgconn)
            self.sent()
        finally:
            connection.finish()

    @staticmethod
    async def _ask(pgconn: Any) -> None:
        if capabilities.has_cancel_safe():
            request = pgconn.cancel_conn()
            request.start()
            await drive(generators.cancel(request))
        else:  # before libpq 17 there is only one that blocks
            await _in_thread(pgconn.get_cancel().cancel)

    def failed(self, error: Exception, connection: Connection) -> None:
        """Report it, and close the others: each would wait as long for a server that does not answer."""
        self.not_sent(error)
        while self.abandoned:
            self.abandoned.popleft().finish()


async def _has_ended(pgconn: Any) -> bool:
    """Wait until the server answers to the statement, for AGAIN_S seconds; return whether it has, or somebody else has
    read its answer. By looks, since a loop has one reader for a socket, and another task may wait there."""
    until = monotonic() + AGAIN_S
    while pgconn.transaction_status == ACTIVE and not ready_now(pgconn.socket, Wait.R):
        if monotonic() > until:
            return False
        await asyncio.sleep(_LOOK_S)
    return True


async def _in_thread(cancel: Callable[[], object]) -> None:
    """Call what blocks in a thread of ours, for which nobody waits longer than this: the loop's end would wait for one
    of its executor's. Raises what it raises."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def tell(error: Exception | None) -> None:
        if not done.done():
            done.set_result(None) if error is None else done.set_exception(error)

    def work() -> None:
        failure: Exception | None = None
        try:
            cancel()
        except Exception as error:
            failure = error
        with suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(tell, failure)

    threading.Thread(target=work, name="dbsession-cancel", daemon=True).start()
    await done
