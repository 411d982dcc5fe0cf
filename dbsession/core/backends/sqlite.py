"""What every SQLite database needs, whatever opens it: a file and not memory, and WAL."""

from __future__ import annotations

import sqlite3
from typing import Any

from sqlalchemy.engine import URL

from dbsession.errors import ConfigError


def is_memory(url: URL) -> bool:
    """Whether the database has no file."""
    database = url.database or ":memory:"
    return ":memory:" in database or "mode=memory" in database or url.query.get("mode") == "memory"


def refuse_memory(name: str, url: URL, options: dict[str, Any]) -> None:
    """Raise ConfigError for an in-memory database without a pool class."""
    if is_memory(url) and not {"poolclass", "pool", "creator"} & options.keys():
        raise ConfigError(
            f"Database {name!r} is an in-memory SQLite database: each greenlet would get an empty one of its own. Use "
            "a file ('sqlite:///data.db'), or set `poolclass` in `options` if one connection for all is what you mean."
        )


def set_pragmas(connection: Any, readonly: bool) -> None:
    """Prepare a DBAPI connection just opened. May switch greenlets."""
    cursor = connection.cursor()
    try:
        cursor.execute("PRAGMA journal_mode=WAL")  # readers and the writer do not wait for each other
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_READONLY:  # a file that may only be read stays as it is
            raise
    else:
        if readonly:
            cursor.execute("PRAGMA query_only=ON")
    finally:
        cursor.close()
