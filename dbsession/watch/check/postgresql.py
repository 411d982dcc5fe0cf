"""What PostgreSQL is asked, and what is right and wrong with its answers; also where a pooler stands in between."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy.engine import Connection

from dbsession.errors import driver_number
from dbsession.watch.check.facts import Facts, Limit, ServerFacts
from dbsession.watch.check.finding import Finding
from dbsession.watch.check.kind import Kind, of_recycling, of_time_zone, of_tls


@dataclass(frozen=True)
class PostgreSQLFacts(ServerFacts):
    """What a PostgreSQL server says of itself. `host` is "[local]" by a Unix socket.

    Attributes:
        database: the one that the URL leads to.
        started_at: when the server was started, which no two of them share.
        superuser_reserved_connections: kept for superusers; `reserved_connections` (16) for a role of their own.
        role_limit: the CONNECTION LIMIT of the account; None: none. `database_limit` is the database's.
        client_backends: the connections of everybody at the moment, with the one that asked.
        statement_timeout_s: 0 for none, as the other three have it.
        client_connection_check_interval_s: how often a statement's client is looked for; from 14 on.
        standby: whether it is in recovery, and so takes no writes.
        read_only: where `default_transaction_read_only` was set; None: nowhere.
        sslmode: the driver's; None: not known.
        pooler: whether a pooler stands between: the backend is not the one that the driver was told.
    """

    database: str
    started_at: str
    superuser_reserved_connections: int
    reserved_connections: int
    role_limit: int | None
    database_limit: int | None
    client_backends: int
    statement_timeout_s: float
    idle_in_transaction_session_timeout_s: float
    idle_session_timeout_s: float
    client_connection_check_interval_s: float
    standby: bool
    read_only: str | None
    sslmode: str | None
    pooler: bool

    @property
    def identity(self) -> object:
        return self.started_at, self.port  # its host is another one by each way that leads to it

    @property
    def in_use(self) -> int:
        return self.client_backends

    @property
    def reserved(self) -> int:
        return self.superuser_reserved_connections + self.reserved_connections

    @property
    def pooled(self) -> bool:
        return self.pooler

    @property
    def limits(self) -> tuple[Limit, ...]:
        of_role, of_database = self.role_limit, self.database_limit
        role, database = f"role {self.account}", f"database {self.database}"
        found = []
        if of_role is not None:
            found.append(Limit("account_budget", role, f"the CONNECTION LIMIT {of_role} of the {role}", of_role))
        if of_database is not None:
            setting = f"the CONNECTION LIMIT {of_database} of the {database}"
            found.append(Limit("database_budget", database, setting, of_database))
        return tuple(found)


_TIMES = (
    *("statement_timeout", "idle_in_transaction_session_timeout"),
    *("idle_session_timeout", "client_connection_check_interval"),
)
_SETTINGS = (
    *("port", "TimeZone", "max_connections", "superuser_reserved_connections", "reserved_connections"),
    *("default_transaction_read_only", *_TIMES),
)
# Superusers have no limits. Whose rows of pg_stat_activity one may not read, of those one sees pid and database.
_SERVER = """
SELECT coalesce(host(inet_server_addr()), '[local]') AS host, session_user AS account, current_database() AS database,
       to_char(pg_postmaster_start_time() AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') AS started_at,
       extract(timezone FROM now())::int AS utc_offset_s,
       pg_is_in_recovery() AS standby,
       (SELECT rolconnlimit FROM pg_roles WHERE rolname = session_user AND NOT rolsuper) AS role_limit,
       (SELECT datconnlimit FROM pg_database WHERE datname = current_database()) AS database_limit,
       (SELECT rolsuper FROM pg_roles WHERE rolname = session_user) AS is_superuser,
       (SELECT count(*) FROM pg_stat_activity WHERE datid IS NOT NULL AND usesysid IS NOT NULL
           AND coalesce(backend_type, 'client backend') = 'client backend') AS client_backends,
       (SELECT version || ', ' || cipher FROM pg_stat_ssl WHERE pid = pg_backend_pid() AND ssl) AS tls,
       pg_backend_pid() AS pid
"""


def _ask(connection: Connection) -> dict[str, Any]:
    driver: Any = connection.connection.dbapi_connection  # detached: it has no driver_connection
    names = ", ".join(f"'{name}'" for name in _SETTINGS)
    rows = connection.exec_driver_sql(f"SELECT name, setting, source FROM pg_settings WHERE name IN ({names})").all()
    values = {name: setting for name, setting, _ in rows}
    sources = {name: source for name, _, source in rows}
    found = dict(connection.exec_driver_sql(_SERVER).mappings().one())
    told, is_superuser = _told_pid(driver), found.pop("is_superuser")
    pooler = told is not None and told != found.pop("pid")
    found.pop("pid", None)
    tls, sslmode = _tls_of(driver)
    if pooler:  # the server's word is of the pooler's connection to it
        found["tls"] = tls and f"{tls}, to the pooler"
    for key in ("role_limit", "database_limit"):
        most = found[key]
        found[key] = None if is_superuser or most is None or most < 0 else most
    found |= {f"{name}_s": int(values.get(name, 0)) / 1000 for name in _TIMES}  # the last two from 14 on
    server = PostgreSQLFacts(
        **found,
        port=int(values["port"]),
        time_zone=values["TimeZone"],
        isolation=connection.get_isolation_level(),
        max_connections=int(values["max_connections"]),
        superuser_reserved_connections=int(values["superuser_reserved_connections"]),
        reserved_connections=int(values.get("reserved_connections", 0)),  # from 16 on
        read_only=sources["default_transaction_read_only"] if values["default_transaction_read_only"] == "on" else None,
        sslmode=sslmode,
        pooler=pooler,
    )
    return {"server": server}


def _told_pid(driver: Any) -> int | None:
    """Return the backend's pid that the driver was told at the connection's start: a pooler makes one up."""
    info = getattr(driver, "info", None)  # psycopg, psycopg2
    pid = getattr(info, "backend_pid", None)
    return pid if isinstance(pid, int) else None


def _tls_of(driver: Any) -> tuple[str | None, str | None]:
    """Return whether our end of the connection is encrypted, and the `sslmode` that says how it may be; both None where
    the driver does not tell."""
    info: Any = getattr(driver, "info", None)
    if hasattr(info, "dsn_parameters"):  # psycopg2
        in_use, mode = info.ssl_in_use, info.dsn_parameters.get("sslmode")
    elif hasattr(info, "get_parameters"):  # psycopg: those that are not libpq's defaults
        in_use, mode = driver.pgconn.ssl_in_use, info.get_parameters().get("sslmode", "prefer")
    else:
        return None, None
    return "TLS" if in_use else None, mode


# -- what is right and wrong with it ---------------------------------------------------------------------------

_OURS = ("client", "session")
"""Where a setting comes from that this very connection has made."""


def _findings(facts: Facts) -> Iterator[Finding]:
    server, name = facts.server, (facts.name,)
    if not isinstance(server, PostgreSQLFacts):
        return
    if server.pooler:
        yield Finding("info", "pooler", name, "PgBouncer, or a pooler like it, stands between", _POOLER)
    yield _of_tls(name, server)
    yield of_time_zone(name, server, "TimeZone")
    yield Finding("ok", "isolation", name, f"isolation level {server.isolation}")
    yield _of_writes(name, server)
    limits = f"max_connections {server.max_connections}"
    if server.reserved:
        limits += f", {server.reserved} of them reserved"
    limits += f", {server.client_backends} in use now, with this check's own"
    yield Finding("ok", "connections", name, "; ".join([limits, *(each.setting for each in server.limits)]))
    yield from _of_timeouts(name, server)
    if server.idle_session_timeout_s:
        yield from of_recycling(name, "idle_session_timeout", server.idle_session_timeout_s, facts.pool)


_POOLER = (
    "In its transaction mode nothing that a session sets is kept from one transaction to the next, and another client "
    "may meet it: SET, LISTEN, advisory locks, temporary tables, PREPARE. Use SET LOCAL, set_config(..., true) and "
    "pg_advisory_xact_lock(); for the others give the work a URL that leads to the server itself."
)


def _of_tls(name: tuple[str, ...], server: PostgreSQLFacts) -> Finding:
    if not server.tls and server.host == "[local]" and not server.pooler:
        return Finding("ok", "tls", name, "no TLS, by a Unix socket")
    if server.tls and server.sslmode in ("allow", "prefer"):
        found = f"TLS: {server.tls}; but sslmode {server.sslmode} would go on without it"
        advice = "Unless only this machine can listen in, give the URL `?sslmode=verify-full&sslrootcert=`."
        return Finding("info", "tls", name, found, advice)
    return of_tls(name, server, "`?sslmode=verify-full&sslrootcert=`")


def _of_writes(name: tuple[str, ...], server: PostgreSQLFacts) -> Finding:
    ours = server.read_only in _OURS
    if server.standby and not ours:
        advice = "Give the URL of the primary, or configure it with `readonly`."
        return Finding("warning", "writable", name, "a standby, in recovery: it refuses writes", advice)
    if server.standby:
        return Finding("ok", "writable", name, "a standby, in recovery; and read-only by this configuration")
    if ours:
        return Finding("ok", "writable", name, "read-only by this configuration")
    if server.read_only is not None:
        found = f"it refuses writes: default_transaction_read_only is on (by pg_settings' source: {server.read_only})"
        return Finding("warning", "writable", name, found, "Turn it off there, or configure it with `readonly`.")
    return Finding("ok", "writable", name, "it takes writes")


def _of_timeouts(name: tuple[str, ...], server: PostgreSQLFacts) -> Iterator[Finding]:
    timeout_s, looks_s = server.statement_timeout_s, server.client_connection_check_interval_s
    found = f"statement_timeout {timeout_s:g} s, client_connection_check_interval {looks_s:g} s"
    if timeout_s or looks_s:
        yield Finding("ok", "statement_timeout", name, found)
    else:
        advice = (
            "A statement whose worker was killed runs on, and keeps its locks: ALTER ROLE ... SET "
            "client_connection_check_interval = '10s' (PostgreSQL 14), or statement_timeout above your longest."
        )
        yield Finding("info", "statement_timeout", name, f"{found}: no limit", advice)
    idle_s = server.idle_in_transaction_session_timeout_s
    found = f"idle_in_transaction_session_timeout {idle_s:g} s"
    if idle_s:
        yield Finding("ok", "idle_in_transaction", name, found)
    else:
        advice = (
            "A transaction that was forgotten keeps its locks: ALTER ROLE ... SET it, above your longest pause in one."
        )
        yield Finding("info", "idle_in_transaction", name, f"{found}: no limit", advice)


# What the SQLSTATE means to whoever deploys.
_ADVICE: dict[int | str, str] = {
    "08P01": "The pooler refuses what the connection asks for as it starts: `options`, which `readonly` needs, too. "
    "Give the URL of the server itself; PgBouncer's ignore_startup_parameters would only drop it.",
    "28000": "The server refuses the account from here: see its pg_hba.conf, and the role's LOGIN.",
    "28P01": "The server refuses the account or its password: correct the URL, or the account at the server.",
    "3D000": "The server has no database of that name: create it, or correct the URL.",
    "42501": "The account has no rights on the database: GRANT it CONNECT.",
    "53300": "The server, the role, the database or the pooler has no connection left: end what holds them, or raise "
    "the limit (max_connections, CONNECTION LIMIT, max_client_conn).",
    "57P03": "The server is starting, ending or in recovery: wait, and look at its log.",
}

# libpq gives an error at connecting no SQLSTATE, only a text; these are the server's and PgBouncer's, in English.
_TEXTS = (
    (re.compile(r"unsupported startup parameter"), "08P01"),
    (re.compile(r"(password|SASL) authentication failed|no password supplied|wrong password"), "28P01"),
    (re.compile(r'role ".*" (does not exist|is not permitted)|no pg_hba\.conf entry|no such user'), "28000"),
    (re.compile(r"(peer|ident) authentication failed", re.I), "28000"),
    (re.compile(r'(database ".*" does not exist|no such database)'), "3D000"),
    (re.compile(r"permission denied for database"), "42501"),
    (re.compile(r"too many (clients|connections)|remaining connection slots|no more connections allowed"), "53300"),
    (re.compile(r"the database system is "), "57P03"),
)


def _number(error: BaseException) -> int | str | None:
    number = driver_number(error)
    if number is None:
        said = str(getattr(error, "orig", error))
        number = next((state for text, state in _TEXTS if text.search(said)), None)
    return number


KIND = Kind(
    _ask,
    _findings,
    _ADVICE,
    "Look at the URL's host, port and TLS arguments, at the server's log, and at what is in between.",
    _number,
)
