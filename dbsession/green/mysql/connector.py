"""What only MySQL and MariaDB need, through PyMySQL: engines whose connections are ours, the error table, killing."""

from __future__ import annotations

import logging
from typing import Any

from sqlalchemy.engine import Engine

from dbsession.core.config import TIMEOUTS, DatabaseConfig
from dbsession.core.pool.stats import Stats
from dbsession.green.mysql import session_state
from dbsession.green.mysql.connection import Connection
from dbsession.green.mysql.kill import Killer, side_arguments

logger = logging.getLogger("dbsession.mysql.connector")


def uses_pymysql(config: DatabaseConfig) -> bool:
    """Whether its driver is PyMySQL, the one that we know."""
    return config.backend in ("mysql", "mariadb") and config.url.get_driver_name() == "pymysql"


def engine_options(config: DatabaseConfig) -> dict[str, Any]:
    """The arguments of create_engine that a PyMySQL connection gets, below what the URL's query says."""
    if not uses_pymysql(config):
        return {}
    # PyMySQL waits for ever by default: a silent server would hang every request.
    defaults = {"charset": "utf8mb4", **{key.removesuffix("_s"): getattr(config, key) for key in TIMEOUTS}}
    return {"connect_args": {key: value for key, value in defaults.items() if key not in config.url.query}}


def warn_of_what_is_bypassed(config: DatabaseConfig, engine: Engine) -> None:
    """Log what the user's own options of a new engine take away from what is promised of its connections."""
    if "creator" in config.options:
        logger.warning(
            "Database %r: its `creator` opens stock connections, so a kill or a timeout may leave them out of step "
            "with the server, and abandoned statements run on there. Remove it, and use `connect_args`.",
            config.name,
        )
    if config.reset == "connection":
        for listener in engine.pool.dispatch.connect:
            module = getattr(listener, "__module__", "") or ""
            if not module.startswith(("sqlalchemy.", "dbsession.")):
                logger.warning(
                    "Database %r: what the `connect` listener %s sets up is undone by reset='connection' and not done "
                    "again. Use `init_command` in `connect_args`.",
                    config.name,
                    f"{module}.{getattr(listener, '__qualname__', '?')}",
                )


class Connector:
    """Opens the connections of one engine, as ours. Lives as long as the engine."""

    def __init__(self, config: DatabaseConfig, stats: Stats) -> None:
        self._config = config
        self._stats = stats
        self._killer: Killer | None = None  # made with the first connection, when its arguments are known

    def listen(self, engine: Engine) -> None:
        # The last step of connecting, after every `do_connect` listener of the user's, which may change the arguments
        # (a password that rotates, say) or open the connection itself.
        engine.dialect.connect = self._connect  # type: ignore[method-assign]

    def _connect(self, *args: Any, **arguments: Any) -> Any:
        if self._config.kill_abandoned:
            if self._killer is None:
                self._killer = Killer(self._config.name, self._stats)
            self._killer.arguments = side_arguments(arguments)
            self._killer.note_home()
        abandon = self._killer.abandon if self._killer else None
        connection = Connection(*args, on_abandon=abandon, ping_idle_s=self._config.ping_idle_s, **arguments)
        if self._config.reset == "connection":
            try:
                session_state.note_place(connection)
            except BaseException:
                connection.close()
                raise
        return connection
