"""The threads of aiosqlite, one for each connection: not asked in vain, ended once, and waited for before their loop is
closed."""

from __future__ import annotations

import asyncio
import sqlite3
import weakref
from collections.abc import Callable
from typing import Any

from dbsession.core.teardown import BOUND_S


class Threads:
    """Those of one engine. Lives as long as it.

    Who writes: `_ending` gets a future where stop() is called in the loop, and loses it when its thread has ended; both
    in the loop's thread, one set operation each.
    """

    def __init__(self) -> None:
        self._ending: set[asyncio.Future[Any]] = set()

    def watch(self, driver: Any) -> None:
        """Know of the end of `driver`, an aiosqlite connection, and let its stop() be called again.

        SQLAlchemy calls that beside a close() whose wait was cancelled, and close() calls it itself at its end: what it
        then waits for would never come, since the thread has ended.
        """
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

    def ping(self, ping: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """For connections about to be used: SQLite is in this process, so one lives if it is open, and that is seen
        without its thread, which `SELECT 1` goes to three times."""

        def looked_at(connection: Any) -> Any:
            try:
                is_open = connection.driver_connection.total_changes >= 0
            except (AttributeError, ValueError, sqlite3.Error):  # another driver, or closed: that is ping's to tell
                is_open = False
            return is_open or ping(connection)

        return looked_at

    def terminate(self, terminate: Callable[[Any], None]) -> Callable[[Any], None]:
        """For connections that are of no use any more: their threads close them, and nobody waits for that. A second
        cancellation there would take the place of the first, and of what it says of a COMMIT."""

        def stopped(connection: Any) -> None:
            driver = connection.driver_connection
            if not hasattr(driver, "stop"):
                terminate(connection)  # another driver
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

        return stopped

    async def ended(self) -> None:
        """Wait for those that are ending, for at most BOUND_S seconds. A thread that answers a loop that is closed by
        then ends with an error on stderr."""
        if self._ending:
            await asyncio.wait(self._ending, timeout=BOUND_S)
