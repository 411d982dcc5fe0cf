"""The note of one checkout: who has the connection, since when, and with what it is busy."""

from __future__ import annotations

import weakref
from typing import Any

from sqlalchemy.engine import Connection
from sqlalchemy.pool import ConnectionPoolEntry

from dbsession.core.connection_info import COMMITTING, WIRE, driver_of
from dbsession.core.pool import callsites


class Checkout:
    """The note of one checkout, used again for the next one of the same pool record. Lives as long as the record;
    written by whoever uses the connection. It keeps nothing alive but texts, and code where call sites are recorded."""

    __slots__ = (
        "__weakref__",
        "changed",
        "connection",
        "executing",
        "in_use",
        "label",
        "record",
        "reported",
        "reported_as",
        "reported_since",
        "since",
        "statement",
        "taken_at",
        "taker",
        "thread",
    )

    record: weakref.ref[ConnectionPoolEntry]
    in_use: bool  # what else is here is of the last checkout; whether it goes on
    taker: weakref.ref[Any] | None  # the greenlet or task; another one may use the connection meanwhile
    thread: int  # its native one
    # These two only where call sites are recorded:
    taken_at: list[callsites.CallSite]
    label: str | None  # of the scope in which it was checked out; None: of none, or an implicit one
    statement: str | None
    connection: weakref.ref[Connection] | None  # SQLAlchemy's, that has executed something
    executing: Connection | None  # the one of SQLAlchemy's that executes something just now: with a StaticPool, of many
    since: float  # by time.monotonic(), as `changed`: when `executing` became what it is
    changed: float
    # By the leak watch, perhaps in a thread of its own; it counts for the checkout that began at `reported_since`.
    reported: tuple[str, ...]  # what was said of it
    reported_as: str  # whose it was then
    reported_since: float

    def state(self) -> str:
        """What the connection is busy with: see `Holder`."""
        if self.executing is not None:
            return "executing"
        record = self.record()
        if record is None or record.dbapi_connection is None:
            return "idle"
        if COMMITTING in record.info:
            return "committing"
        wire = record.info.get(WIRE) or driver_of(record.dbapi_connection)
        if getattr(wire, "pinging", False):
            return "pinging"
        if getattr(wire, "streaming", False):
            return "streaming"
        user = None if self.connection is None else self.connection()
        return "idle in transaction" if _in_transaction(record.dbapi_connection, user) else "idle"


def _in_transaction(connection: Any, user: Connection | None) -> bool:
    """Whether a transaction is open on this DBAPI connection: for SQLAlchemy, as `Session.in_transaction()` has it,
    since a SELECT alone may begin none at the server, and holds the connection all the same; or as far as the driver
    tells, else probably."""
    driver = getattr(connection, "driver_connection", connection)  # below SQLAlchemy's adapter of one for asyncio
    try:
        if user is not None and user.in_transaction() and not _autocommits(user, connection):
            return True
        known = getattr(driver, "in_transaction", None)
        if known is None and hasattr(driver, "get_transaction_status"):  # asyncmy, aiomysql
            known = driver.get_transaction_status()
        return bool(known) if known is not None else getattr(connection, "autocommit", False) is not True
    except Exception:  # closed just now
        return False


def _autocommits(user: Connection, connection: Any) -> bool:
    try:
        return user.dialect.detect_autocommit_setting(connection)
    except NotImplementedError:  # not every dialect can tell
        return False
