"""What a database, its driver and its pool say of themselves when asked. No judgement: that is `findings`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import gevent
from gevent import monkey
from sqlalchemy import Integer, literal_column, select
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool, Pool, QueuePool, StaticPool

from dbsession.core.backends import KINDS, kind_of
from dbsession.core.backends.base import Backend
from dbsession.core.backends.mysql import MySQL
from dbsession.core.backends.sqlite import SQLite, in_transaction
from dbsession.errors import describe, driver_number
from dbsession.green import hub

BOUND_S = 15.0
"""Seconds that all databases have together; above PyMySQL's connect timeout of 10, which says more."""

ROUND_TRIPS = 5
_ONE = select(literal_column("1", Integer))


@dataclass(frozen=True)
class PoolFacts:
    """What is known of one process's pool.

    Attributes:
        limit: connections that it opens at most; None: as many as are asked for.
        keeps: whether it keeps idle ones.
        recycle_s: age at which one is replaced; None: never.
        pre_ping: whether one is tested at its checkout.
    """

    limit: int | None
    keeps: bool
    recycle_s: int | None
    pre_ping: bool


@dataclass(frozen=True)
class ServerFacts:
    """What a MySQL or MariaDB server says of itself. `host` and `port` are by their own account, the same for every way
    to the server."""

    host: str
    port: int
    account: str
    tls: str | None
    time_zone: str
    utc_offset_s: int
    sql_mode: str
    isolation: str
    max_connections: int
    max_user_connections: int
    wait_timeout_s: int
    threads_connected: int


@dataclass(frozen=True)
class FileFacts:
    """What SQLite says of its file. `writable`: None if the database is configured as read-only, or somebody holds its
    lock."""

    journal_mode: str
    writable: bool | None


@dataclass(frozen=True)
class Facts:
    """One database. `version` is None when it could not be reached; `error` says why, or what went wrong later.

    Attributes:
        driver: as in the URL, `mysql+pymysql`.
        latency_ms: a round trip, the median of ROUND_TRIPS.
        cooperative: whether another greenlet ran while the driver waited; None: not patched, or not measured.
        error_number: the driver's.
    """

    name: str
    driver: str
    pool: PoolFacts
    version: str | None = None
    latency_ms: float | None = None
    cooperative: bool | None = None
    server: ServerFacts | None = None
    file: FileFacts | None = None
    error: str | None = None
    error_number: int | None = None

    @property
    def is_file(self) -> bool:
        """Whether the database is a file, and no server."""
        return KINDS.get(self.driver.partition("+")[0], Backend).IS_FILE


def gather_all(engines: Mapping[str, Engine]) -> list[Facts]:
    """Ask all databases at once; takes BOUND_S at most. Switches greenlets.

    Each is asked in a native thread of its own, which has a hub of its own if gevent has patched: a driver that blocks
    then stops that thread, and neither the caller's hub nor the other databases. A thread that is late is left alone;
    it ends when its driver gives up, or with the process.
    """
    if _patched():
        # The first hub of a process imports its loop and its resolver. The import's lock is patched, too, and needs a
        # hub to wait: two threads that both make the first one wait for each other for ever.
        _ = gevent.get_hub().resolver
    jobs = [_Job(name, engine) for name, engine in engines.items()]
    end = time.monotonic() + BOUND_S
    return [job.result(end - time.monotonic()) for job in jobs]


class _Job:
    """One database being asked. `_facts` is written once, by its thread, before it wakes the waiter."""

    def __init__(self, name: str, engine: Engine) -> None:
        self._name = name
        self._engine = engine
        self._facts: Facts | None = None
        self._waiter = hub.Waiter()
        hub.run_in_thread(self._run)

    def _run(self) -> None:
        try:
            self._facts = gather(self._name, self._engine)
        finally:
            home = hub.here()
            if home is not None:
                gevent.sleep(0)  # what another thread waits for may be in its queue: the end of a lock, say
                home.destroy(destroy_loop=True)  # its descriptors are not closed with its thread
            self._waiter.wake()

    def result(self, timeout_s: float) -> Facts:
        self._waiter.wait(max(timeout_s, 0.0))
        if self._facts is None:
            return replace(_blank(self._name, self._engine), error=f"no answer within {BOUND_S:g} s")
        return self._facts


def gather(name: str, engine: Engine) -> Facts:
    """Ask one database, on a connection opened by its engine, and so by whatever listens to that, but outside the
    limit of its pool, and closed at the end. Switches greenlets, or blocks, for as long as the driver does."""
    found, kind = _blank(name, engine), kind_of(engine.url)
    try:
        with engine.connect() as connection:
            if isinstance(engine.pool, QueuePool):
                connection.detach()  # a connection belongs to its thread, which ends
            found = replace(found, version=kind.product(connection), latency_ms=_latency_ms(connection))
            asked = _QUESTIONS.get(kind)
            if asked is not None:
                found = replace(found, **asked(connection))
            return replace(found, cooperative=_cooperates(connection))
    except Exception as error:  # a driver may raise anything; its text may hold the password and is not shown
        return replace(found, error=describe(error), error_number=driver_number(error))


def _blank(name: str, engine: Engine) -> Facts:
    return Facts(name, engine.url.drivername, _pool(engine.pool))


def _pool(pool: Pool) -> PoolFacts:
    limit: int | None = None
    if isinstance(pool, QueuePool):
        # Private, like the two below, and nothing public tells them. tests/unit/test_private_names.py fails loudly.
        limit = pool.size() + pool._max_overflow if pool.size() and pool._max_overflow >= 0 else None
    elif isinstance(pool, StaticPool):
        limit = 1
    recycle_s = int(pool._recycle)
    return PoolFacts(limit, not isinstance(pool, NullPool), recycle_s if recycle_s >= 0 else None, pool._pre_ping)


def _latency_ms(connection: Connection) -> float:
    taken = []
    for _ in range(ROUND_TRIPS):
        started = time.perf_counter()
        connection.execute(_ONE).all()
        taken.append((time.perf_counter() - started) * 1000)
    return round(statistics.median(taken), 3)


def _server(connection: Connection) -> dict[str, ServerFacts]:
    result = connection.exec_driver_sql(
        "SELECT @@hostname AS host, @@port AS port, CURRENT_USER() AS account, @@session.time_zone AS time_zone,"
        " @@system_time_zone AS system_zone, TIMESTAMPDIFF(SECOND, UTC_TIMESTAMP(), NOW()) AS utc_offset_s,"
        " @@session.sql_mode AS sql_mode, @@max_connections AS max_connections,"
        " @@session.max_user_connections AS max_user_connections, @@session.wait_timeout AS wait_timeout_s"
    )
    found = dict(result.mappings().one())
    system_zone = found.pop("system_zone")
    if found["time_zone"] == "SYSTEM":
        found["time_zone"] = f"SYSTEM ({system_zone})"
    cipher, protocol = (_status(connection, f"SESSION STATUS LIKE 'Ssl_{name}'") for name in ("cipher", "version"))
    server = ServerFacts(
        **found,
        tls=f"{protocol}, {cipher}" if cipher else None,
        isolation=connection.get_isolation_level(),
        threads_connected=int(_status(connection, "GLOBAL STATUS LIKE 'Threads_connected'")),
    )
    return {"server": server}


def _status(connection: Connection, what: str) -> str:
    row = connection.exec_driver_sql(f"SHOW {what}").first()
    return "" if row is None else str(row[1])


def _file(connection: Connection) -> dict[str, FileFacts]:
    journal_mode = str(connection.exec_driver_sql("PRAGMA journal_mode").scalar())
    if connection.exec_driver_sql("PRAGMA query_only").scalar():
        return {"file": FileFacts(journal_mode, None)}
    try:
        # Rolled back. BEGIN IMMEDIATE alone does not fail where only reading is allowed.
        if not in_transaction(connection.connection.dbapi_connection):  # one is, with autocommit=False
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        version = connection.exec_driver_sql("PRAGMA user_version").scalar()
        connection.exec_driver_sql(f"PRAGMA user_version = {version:d}")
    except SQLAlchemyError as error:
        name = getattr(getattr(error, "orig", None), "sqlite_errorname", "")
        if name.startswith("SQLITE_BUSY"):
            return {"file": FileFacts(journal_mode, None)}
        if name.startswith("SQLITE_READONLY"):
            return {"file": FileFacts(journal_mode, False)}
        raise
    connection.rollback()
    return {"file": FileFacts(journal_mode, True)}


# What is asked of a kind of database besides its name and its latency, as Facts' attributes.
_QUESTIONS: dict[type[Backend], Callable[[Connection], dict[str, Any]]] = {MySQL: _server, SQLite: _file}


def _patched() -> bool:
    return monkey.is_module_patched("socket")


def _cooperates(connection: Connection) -> bool | None:
    """Measure whether greenlets run while the driver waits, since no list of drivers knows what was patched. A greenlet
    just spawned runs first thing when anybody switches to the hub, however long the wait is then."""
    pause = kind_of(connection.engine.url).PAUSES.get(connection.dialect.name)
    if pause is None or not _patched():
        return None
    turns: list[bool] = []
    other = gevent.spawn(turns.append, True)
    connection.exec_driver_sql(pause).all()
    ran = bool(turns)
    other.join()
    return ran
