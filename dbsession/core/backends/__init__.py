"""What differs from database to database: one class for each kind, found by the URL."""

from __future__ import annotations

from sqlalchemy.engine import URL
from sqlalchemy.exc import NoSuchModuleError

from dbsession.core.backends.base import Backend
from dbsession.core.backends.mysql import MySQL
from dbsession.core.backends.postgresql import PostgreSQL
from dbsession.core.backends.sqlite import SQLite

KINDS: dict[str, type[Backend]] = {
    "mysql": MySQL,
    "mariadb": MySQL,
    "postgresql": PostgreSQL,
    "sqlite": SQLite,
}
"""The kinds of database that have a class of their own, by SQLAlchemy's name of the dialect."""


def kind_of(url: URL) -> type[Backend]:
    """Return the class in core of the database at `url`."""
    return KINDS.get(url.get_backend_name(), Backend)


def driver_of(url: URL) -> str | None:
    """Return the name of the driver, the dialect's default one where the URL names none; None: no such dialect."""
    try:
        url.get_dialect()  # get_driver_name() would give what stands behind the +, whatever it is
        return url.get_driver_name().removesuffix("_async")  # SQLAlchemy's other name of psycopg, in asyncio
    except NoSuchModuleError:
        return None


def is_retryable(error: BaseException) -> bool:
    """Return whether some database asks by `error` for the whole unit of work to be run again."""
    return any(kind.is_retryable(error) for kind in set(KINDS.values()))
