"""SQLite, whichever driver and half: a file and not memory, WAL, and what a busy database says."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from typing import Any, ClassVar

from sqlalchemy.engine import URL, Connection

from dbsession.core.backends.base import Backend
from dbsession.errors import ConfigError


class SQLite(Backend):
    """The rules of one engine's SQLite file. Lives as long as the engine."""

    TITLE = "SQLite"
    KEYS = frozenset({"readonly"})
    DRIVER_KEYS: ClassVar[dict[str, frozenset[str]]] = {
        "pysqlite": frozenset({"busy_timeout_s"}),
        "aiosqlite": frozenset({"busy_timeout_s"}),
    }

    ASYNC_DRIVERS: ClassVar[dict[str, str]] = {"pysqlite": "aiosqlite"}
    PAUSES: ClassVar[dict[str, str]] = {}
    IS_FILE = True

    @staticmethod
    def product(connection: Connection) -> str:
        return f"SQLite {connection.exec_driver_sql('SELECT sqlite_version()').scalar()}"

    def engine_options(self) -> dict[str, Any]:
        config = self.config
        if is_memory(config.url) and not {"poolclass", "pool", "creator"} & config.options.keys():
            raise ConfigError(
                f"Database {config.name!r} is an in-memory SQLite database: each greenlet would get an empty one of "
                "its own. Use a file ('sqlite:///data.db'), or set `poolclass` in `options` if one connection for all "
                "is what you mean."
            )
        connect_args = config.options.get("connect_args")
        if config.readonly and isinstance(connect_args, Mapping) and connect_args.get("autocommit") is False:
            raise ConfigError(
                f"Database {config.name!r}: with `autocommit` False in `connect_args` each connection would read for "
                "ever what was there at its first statement, since nothing ends a transaction of a `readonly` "
                "database. Remove one of the two."
            )
        return {}

    def connected(self, connection: Any, info: dict[Any, Any]) -> None:
        cursor = connection.cursor()
        # With autocommit=False (Python 3.12) sqlite3 holds a transaction open at all times, and in a transaction the
        # journal mode cannot be changed.
        began = in_transaction(connection)
        try:
            if began:
                cursor.execute("COMMIT")
            self._set_up(cursor)
        finally:
            if began:
                cursor.execute("BEGIN")
            cursor.close()

    def _set_up(self, cursor: Any) -> None:
        try:
            cursor.execute("PRAGMA journal_mode=WAL")  # readers and the writer do not wait for each other
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_READONLY:  # a file that may only be read stays as it is
                raise
        else:
            if self.config.readonly:
                cursor.execute("PRAGMA query_only=ON")

    @staticmethod
    def in_transaction(connection: Any) -> bool:
        # sqlite3 begins none for a change of the schema; in an autocommit mode of the driver's none is ever open.
        return in_transaction(connection)

    @staticmethod
    def is_retryable(error: BaseException) -> bool:
        return is_busy(error)


def is_memory(url: URL) -> bool:
    """Return whether the database has no file."""
    database = url.database or ":memory:"
    return ":memory:" in database or "mode=memory" in database or url.query.get("mode") == "memory"


def in_transaction(connection: Any) -> bool:
    """Return whether a transaction is open on a DBAPI connection, by SQLite's own word; False if it cannot be asked."""
    try:
        return getattr(getattr(connection, "driver_connection", connection), "in_transaction", False) is True
    except (ValueError, sqlite3.ProgrammingError):  # closed
        return False


def is_busy(error: BaseException) -> bool:
    """Return whether another writer was quicker (https://www.sqlite.org/rescode.html#busy)."""
    code: int = getattr(error, "sqlite_errorcode", 0)
    return isinstance(error, sqlite3.OperationalError) and code & 0xFF == sqlite3.SQLITE_BUSY
