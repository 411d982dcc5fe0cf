"""The backend of aiosqlite: its threads, one for each connection, are not asked in vain, ended once, and waited for
before their loop is closed."""

from __future__ import annotations

import asyncio
import random
import sqlite3
import weakref
from collections.abc import Callable
from time import monotonic
from typing import Any

from sqlalchemy.util import await_

from dbsession.core.backends.sqlite import SQLite, is_busy
from dbsession.core.config import DatabaseConfig
from dbsession.core.teardown import BOUND_S

_RETRY_S = (0.001, 0.003)  # random, so that two processes do not ask in step


class AioSQLite(SQLite):
    """The rules of one engine's SQLite file by aiosqlite, and its threads. Lives as long as the engine.

    Who writes: `_ending` gets a future where stop() is called in the loop, and loses it when its thread has ended; both
    in the loop's thread, one set operation each.
    """

    def __init__(self, config: DatabaseConfig) -> None:
        super().__init__(config)
        self._ending: set[asyncio.Future[Any]] = set()

    def engine_options(self) -> dict[str, Any]:
        # The driver's own thread waits for the write lock, and not the loop.
        return super().engine_options() | {"connect_args": {"timeout": self.config.busy_timeout_s}}

    def connected(self, connection: Any, info: dict[Any, Any]) -> None:
        # SQLite's own wait does not hold for the change of a new file to WAL: of two that do it at once one is refused.
        end = monotonic() + self.config.busy_timeout_s
        while True:
            try:
                super().connected(connection, info)
                return
            except sqlite3.OperationalError as error:
                if not is_busy(error) or monotonic() > end:
                    raise
            await_(asyncio.sleep(random.uniform(*_RETRY_S)))

    def on_connect_first(self, connection: Any, record: Any) -> None:
        """Note the end of an aiosqlite connection's thread, and let its stop() be called again.

        Before SQLAlchemy's own listeners, which await and may be cancelled. SQLAlchemy calls stop() beside a close()
        whose wait was cancelled, and close() calls it itself at its end: what it then waits for would never come, since
        the thread has ended.
        """
        driver = connection.driver_connection
        if not hasattr(driver, "stop"):
            return  # another driver
        its = weakref.ref(driver)  # or it would refer to itself
        stopped = False

        def stop() -> Any:
            nonlocal stopped
            found = None if stopped else its()
            stopped = True
            ending = None if found is None else type(found).stop(found)
            if ending is not None:  # else no loop runs here: a destructor
                self._ending.add(ending)
                ending.add_done_callback(self._ending.discard)
            return ending

        driver.stop = stop

    def around_do_ping(self, inner: Callable[[Any], bool]) -> Callable[[Any], bool]:
        def do_ping(dbapi_connection: Any) -> bool:
            # SQLite is in this process, so a connection lives if it is open, and that is seen without its thread, which
            # `SELECT 1` goes to three times.
            try:
                is_open: bool = dbapi_connection.driver_connection.total_changes >= 0
            except (AttributeError, ValueError, sqlite3.Error):  # another driver, or closed: that is ping's to tell
                is_open = False
            return is_open or inner(dbapi_connection)

        return do_ping

    def around_do_terminate(self, inner: Callable[[Any], None]) -> Callable[[Any], None]:
        def do_terminate(dbapi_connection: Any) -> None:
            # Its thread closes it, and nobody waits for that: a second cancellation there would take the place of the
            # first, and of what it says of a COMMIT.
            driver = dbapi_connection.driver_connection
            if not hasattr(driver, "stop"):
                inner(dbapi_connection)  # another driver
                return
            # SQLite keeps a closed connection, and its write lock, as long as somebody keeps a cursor of it; a
            # traceback may. The first step of rollback() puts it into the thread's queue.
            rollback = driver.rollback()
            try:
                asyncio.get_running_loop()
                rollback.send(None).cancel()
            except (RuntimeError, ValueError):  # a destructor, where no loop runs; or it is closed already
                pass
            finally:
                rollback.close()
            driver.stop()

        return do_terminate

    async def closed(self) -> None:
        """Wait for the threads that are ending, for at most BOUND_S seconds. A thread that answers a loop that is
        closed by then ends with an error on stderr."""
        if self._ending:
            await asyncio.wait(self._ending, timeout=BOUND_S)
