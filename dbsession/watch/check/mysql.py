"""What MySQL and MariaDB are asked, and what is right and wrong with their answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy.engine import Connection

from dbsession.watch.check.facts import Facts, Limit, ServerFacts
from dbsession.watch.check.finding import Finding
from dbsession.watch.check.kind import Kind, of_recycling, of_time_zone, of_tls


@dataclass(frozen=True)
class MySQLFacts(ServerFacts):
    """What a MySQL or MariaDB server says of itself."""

    sql_mode: str
    max_user_connections: int
    wait_timeout_s: int
    threads_connected: int

    @property
    def in_use(self) -> int:
        return self.threads_connected

    @property
    def limits(self) -> tuple[Limit, ...]:
        most = self.max_user_connections
        setting = f"max_user_connections {most}"
        return (Limit("account_budget", self.account, setting, most),) if most else ()


def _ask(connection: Connection) -> dict[str, Any]:
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
    server = MySQLFacts(
        **found,
        tls=f"{protocol}, {cipher}" if cipher else None,
        isolation=connection.get_isolation_level(),
        threads_connected=int(_status(connection, "GLOBAL STATUS LIKE 'Threads_connected'")),
    )
    return {"server": server}


def _status(connection: Connection, what: str) -> str:
    row = connection.exec_driver_sql(f"SHOW {what}").first()
    return "" if row is None else str(row[1])


def _findings(facts: Facts) -> Iterator[Finding]:
    server, name = facts.server, (facts.name,)
    if not isinstance(server, MySQLFacts):
        return
    yield of_tls(name, server, "`?ssl_ca=`")
    yield of_time_zone(name, server, "time_zone")
    mode = server.sql_mode.replace(",", ", ")
    if {"STRICT_TRANS_TABLES", "STRICT_ALL_TABLES"} & set(mode.split(", ")):
        yield Finding("ok", "sql_mode", name, f"sql_mode {mode}")
    else:
        advice = "The server cuts and converts values that do not fit: add STRICT_TRANS_TABLES to sql_mode."
        yield Finding("warning", "sql_mode", name, f"sql_mode is not strict: {mode or 'empty'}", advice)
    yield Finding("ok", "isolation", name, f"isolation level {server.isolation}")
    limits = f"max_connections {server.max_connections}, {server.threads_connected} in use now, with this check's own"
    if server.max_user_connections:
        limits += f"; max_user_connections {server.max_user_connections}"
    yield Finding("ok", "connections", name, limits)
    yield from of_recycling(name, "wait_timeout", server.wait_timeout_s, facts.pool)


# What the driver's number means to whoever deploys.
_ADVICE: dict[int | str, str] = {
    1040: "max_connections is reached at the server: end what holds them, or raise it there.",
    1044: "The account has no rights on the database: GRANT them.",
    1045: "The server refuses the account or its password: correct the URL, or the account at the server.",
    1049: "The server has no database of that name: create it, or correct the URL.",
    1130: "The server refuses this host: create the account for it.",
    1203: "max_user_connections is reached at the server: end what holds them, or raise it there.",
    1226: "A limit of the account is reached at the server: raise it there.",
    2003: "Nothing answers there: look at the URL's host and port, at the server, and at what is in between.",
    2013: "It did not answer in time, or broke off: look at the server's log, and at what is in between.",
}

KIND = Kind(_ask, _findings, _ADVICE)
