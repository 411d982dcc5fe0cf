"""What SQLite is asked of its file, and what is right and wrong with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sqlalchemy.engine import Connection
from sqlalchemy.exc import SQLAlchemyError

from dbsession.core.backends.sqlite import in_transaction
from dbsession.watch.check.facts import Facts, FileFacts
from dbsession.watch.check.finding import Finding
from dbsession.watch.check.kind import Kind


def _ask(connection: Connection) -> dict[str, Any]:
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


def _findings(facts: Facts) -> Iterator[Finding]:
    file, name = facts.file, (facts.name,)
    if file is None:
        return
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


KIND = Kind(_ask, _findings, otherwise="See that the file's folder exists, and that this user may write to both.")
