"""psycopg's backend in asyncio: engines whose connections are ours, and whose statements end with their tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from sqlalchemy.util import await_

from dbsession.aio.postgresql.adapted import Adapted
from dbsession.aio.postgresql.backend import LoopPostgreSQL
from dbsession.aio.postgresql.cancel import LoopCanceller
from dbsession.aio.postgresql.connection import Connection
from dbsession.core.config import DatabaseConfig
from dbsession.core.pool.stats import Stats


class AsyncPsycopg(LoopPostgreSQL):
    """The rules of one engine by psycopg, and its connections. Lives as long as the engine."""

    ADAPTED: ClassVar[type[Any]] = Adapted

    def __init__(self, config: DatabaseConfig, stats: Stats) -> None:
        super().__init__(config)
        self._canceller = LoopCanceller(config.name, stats) if config.kill_abandoned else None

    def around_connect(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        # The last step of connecting, after every `do_connect` listener of the user's.
        dialect: Any = inner.__self__  # type: ignore[attr-defined]

        def connect(*cargs: Any, **cparams: Any) -> Any:
            if "async_creator_fn" in cparams:
                return inner(*cargs, **cparams)
            return Adapted(dialect.loaded_dbapi, await_(self._open(*cargs, **cparams)))

        dialect.has_terminate = True  # where nothing can be awaited, too
        return connect

    async def _open(self, *cargs: Any, **cparams: Any) -> Any:
        config = self.config
        connection = await Connection.open_within(
            float(cparams.get("connect_timeout") or config.connect_timeout_s), *cargs, **cparams
        )
        connection.database = config.name
        connection.write_timeout_s = config.write_timeout_s
        if self._canceller is not None:
            connection.on_abandon = self._canceller.abandon
        try:
            if self.pooled is None:
                self.pooled = await connection.wait(connection.is_pooled())
            if self.pooled and "prepare_threshold" not in cparams:
                connection.prepare_threshold = None  # a statement prepared in one session is not there in the next
        except BaseException:
            connection.end()
            raise
        return connection

    def connected(self, connection: Any, info: dict[Any, Any]) -> None:
        super().connected(connection, info)
        if isinstance(connection, Adapted):
            connection.driver_connection.sent.unseen = False  # until now SQLAlchemy has asked, for types
