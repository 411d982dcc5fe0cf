"""asyncpg's backend: engines whose connections are ours, and whose waits are bounded.

asyncpg has no way to send a BEGIN with a statement, nor to send several that have parameters at once: so a transaction
costs three round trips, its BEGIN's among them, and psycopg's two.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from importlib import import_module
from time import monotonic
from typing import Any, ClassVar

from sqlalchemy.util import await_

from dbsession.aio.postgresql.addresses import first_that_answers
from dbsession.aio.postgresql.asyncpg_adapted import Adapted
from dbsession.aio.postgresql.asyncpg_connection import LoopCloser, known_class
from dbsession.aio.postgresql.backend import LoopPostgreSQL
from dbsession.core.config import DatabaseConfig
from dbsession.core.pool.stats import Stats

asyncpg: Any = import_module("asyncpg")  # which has no types

_OF_ADAPTER = "prepared_statement_cache_size", "prepared_statement_name_func"
"""Arguments that are SQLAlchemy's, and not asyncpg's."""


class AsyncAsyncpg(LoopPostgreSQL):
    """The rules of one engine by asyncpg, and its connections. Lives as long as the engine."""

    ADAPTED: ClassVar[type[Any]] = Adapted

    def __init__(self, config: DatabaseConfig, stats: Stats) -> None:
        super().__init__(config)
        self._closer = LoopCloser(config.name, stats)

    def around_connect(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        # The last step of connecting, after every `do_connect` listener of the user's.
        def connect(*cargs: Any, **cparams: Any) -> Any:
            if "async_creator_fn" in cparams:
                return inner(*cargs, **cparams)
            dialect: Any = inner.__self__  # type: ignore[attr-defined]  # whose method it is
            return await_(self._open(dialect.loaded_dbapi, cargs, cparams))

        return connect

    async def _open(self, dbapi: Any, cargs: Any, cparams: dict[str, Any]) -> Adapted:
        seconds = float(cparams.pop("timeout", None) or self.config.connect_timeout_s)
        until = monotonic() + seconds
        try:
            driver = await self._connect(until, cargs, cparams)
        except TimeoutError:
            raise dbapi.OperationalError(f"no connection within {seconds:g} s, the handshake included") from None
        except OSError as error:
            raise dbapi.OperationalError(f"the server cannot be reached: {error}") from error
        except Exception as error:
            Adapted._handle_exception_no_connection(dbapi, error)
        own = {key: cparams[key] for key in _OF_ADAPTER if key in cparams}
        if self.pooled:
            own.setdefault("prepared_statement_cache_size", 0)
        adapted = Adapted(dbapi, driver, **own)
        adapted.database, adapted.on_abandon = self.config.name, self._closer.abandon
        adapted.expect(max(until - monotonic(), 0.1))  # setting it up is a part of connecting
        return adapted

    async def _connect(self, until: float, cargs: Any, cparams: dict[str, Any]) -> Any:
        arguments = {key: value for key, value in cparams.items() if key not in _OF_ADAPTER}
        arguments["connection_class"] = known_class(arguments.get("connection_class") or asyncpg.Connection)
        if self.pooled:
            arguments.setdefault("statement_cache_size", 0)  # what is prepared in one session is not there in the next
        driver: Any = await first_that_answers(asyncpg.connect, until, cargs, arguments)
        if self.pooled is not None:
            return driver
        try:
            async with asyncio.timeout(until - monotonic()):
                self.pooled = await is_pooled(driver)
        except BaseException:
            driver.terminate()
            raise
        if not self.pooled or "statement_cache_size" in arguments:
            return driver
        driver.terminate()
        return await self._connect(until, cargs, cparams)


async def is_pooled(driver: Any) -> bool:
    """Return whether a pooler stands between: the server process that answers is not the one that the connection was
    told of as it began."""
    name = f"dbsession_{uuid.uuid4().hex}"
    async with driver.transaction():  # in one session
        statement = await driver.prepare("SELECT pg_backend_pid()", name=name)
        found = await statement.fetchval()
        await driver.execute(f"DEALLOCATE {name}")
    driver.sent.settings = []
    return bool(found != driver.get_server_pid())
