"""What is right and wrong with one database, and what to change."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from dbsession.core.sources import misspelt_variables
from dbsession.watch.check.probe import Facts, FileFacts, PoolFacts, ServerFacts

LEVELS = ("ok", "info", "warning", "error")


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        level: one of LEVELS.
        check: what was looked at; stable, for scripts.
        databases: the names that it is about; none: all of them.
        found: what is, with its values.
        change: what to do about it; empty when there is nothing to do.
    """

    level: str
    check: str
    databases: tuple[str, ...]
    found: str
    change: str = ""


def worst(findings: Iterable[Finding]) -> str:
    """Return the worst level of the findings: `error`, `warning`, or `ok` for everything below."""
    rank = max((LEVELS.index(finding.level) for finding in findings), default=0)
    return LEVELS[rank] if rank >= LEVELS.index("warning") else "ok"


# What the driver's number means to whoever deploys. MySQL's; other drivers give none.
_ADVICE = {
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


def of(facts: Facts) -> Iterator[Finding]:
    """The findings on one database. Which are made depends on what it could be asked."""
    name = (facts.name,)
    if facts.version is None:
        yield Finding("error", "reachable", name, f"no connection: {facts.error}", _how_to_connect(facts))
        return
    what = f"{facts.version} by {facts.driver}, {facts.latency_ms or 0:.1f} ms a round trip"
    yield Finding("ok", "reachable", name, what)
    if facts.error is not None:
        advice = "See what the account may read; the rest was not looked at."
        yield Finding("warning", "facts", name, f"it did not tell everything: {facts.error}", advice)
    if facts.server is not None:
        yield from _of_server(name, facts.server)
        yield from _of_recycling(name, facts.server.wait_timeout_s, facts.pool)
    if facts.file is not None:
        yield from _of_file(name, facts.file)
    if facts.cooperative is not None:
        yield _of_driver(name, facts)


def of_environment() -> Iterator[Finding]:
    """The findings on the environment: variables that nothing reads, and are like one of ours. No value is shown."""
    for variable, meant in misspelt_variables():
        found = f"the environment has {variable}, which nothing reads"
        yield Finding("warning", "environment", (), found, f"Did you mean {meant}? Rename it, or remove it.")


def _how_to_connect(facts: Facts) -> str:
    if facts.is_file:
        return "See that the file's folder exists, and that this user may write to both."
    advice = _ADVICE.get(facts.error_number or 0)
    return advice or "Look at the URL's host and port, at the server's log, and at what is in between."


def _of_server(name: tuple[str, ...], server: ServerFacts) -> Iterator[Finding]:
    if server.tls:
        yield Finding("ok", "tls", name, f"TLS: {server.tls}")
    else:
        advice = "Unless only this machine can listen in, give the server a certificate, and the URL `?ssl_ca=`."
        yield Finding("info", "tls", name, "no TLS", advice)
    hours, minutes = divmod(abs(server.utc_offset_s) // 60, 60)
    zone = f"time zone {server.time_zone}, UTC{'-' if server.utc_offset_s < 0 else '+'}{hours:02d}:{minutes:02d}"
    if server.utc_offset_s:
        advice = "NOW() is not UTC there: let the application write the times, or set time_zone at the server."
        yield Finding("info", "time_zone", name, zone, advice)
    else:
        yield Finding("ok", "time_zone", name, zone)
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


def _of_recycling(name: tuple[str, ...], wait_timeout_s: int, pool: PoolFacts) -> Iterator[Finding]:
    if not pool.keeps:
        return
    age = "never" if pool.recycle_s is None else f"{pool.recycle_s} s"
    if pool.recycle_s is not None and pool.recycle_s < wait_timeout_s:
        found = f"pool_recycle {age}, below the server's wait_timeout {wait_timeout_s} s"
        yield Finding("ok", "pool_recycle", name, found)
        return
    found = (
        f"pool_recycle {age}, not below the server's wait_timeout {wait_timeout_s} s, which closes idle connections: "
    )
    advice = f"Set pool_recycle below {wait_timeout_s}, or raise wait_timeout at the server."
    if pool.pre_ping:
        found += "each is found dead at its checkout, and replaced"
        yield Finding("warning", "pool_recycle", name, found, advice)
    else:
        found += "without pool_pre_ping nothing notices before a statement fails"
        yield Finding("error", "pool_recycle", name, found, advice)


def _of_file(name: tuple[str, ...], file: FileFacts) -> Iterator[Finding]:
    if file.journal_mode == "wal":
        yield Finding("ok", "journal_mode", name, "journal mode WAL")
    else:
        advice = "Readers and the writer wait for each other: put the file on a local disk that may be written."
        yield Finding("warning", "journal_mode", name, f"journal mode {file.journal_mode}, not WAL", advice)
    if file.writable:
        yield Finding("ok", "writable", name, "it may be written")
    elif file.writable is None:
        yield Finding(
            "info", "writable", name, "whether it may be written was not tried: read-only, or its lock is taken"
        )
    else:
        advice = "Give this user the right to write the file and its folder, or configure it with `readonly`."
        yield Finding("error", "writable", name, "it may not be written", advice)


def _of_driver(name: tuple[str, ...], facts: Facts) -> Finding:
    if facts.cooperative:
        return Finding("ok", "driver", name, f"{facts.driver} lets other greenlets run while it waits")
    advice = "Use mysql+pymysql or postgresql+psycopg, patched by gevent first; for psycopg2, psycogreen."
    return Finding(
        "error", "driver", name, f"{facts.driver} stops every greenlet of a gevent worker while it waits", advice
    )
