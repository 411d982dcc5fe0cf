"""What a test of more than one kind of database says in the words of each: a `Dialect`, by the database's URL.

Needs no driver, so that scripts may import it as they like. What has to be done with all rights is a method of the
server's class, `support.mariadb.MariaDBServer` or `support.postgresql.PostgreSQLServer`.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

from sqlalchemy.exc import InterfaceError, OperationalError


class Dialect:
    """The words of one kind of database. Each of them is SQL, but for the last ones: those are codes of errors."""

    who: ClassVar[str]
    """The server's number of the connection that asks."""
    version: ClassVar[str]
    database: ClassVar[str]
    payload: ClassVar[str]
    """A type for long texts."""
    serial: ClassVar[str]
    """The type of a primary key that counts by itself."""
    port: ClassVar[str]
    """At which the server is."""
    read_only: ClassVar[str]
    """As the first statement of a transaction, what makes it read-only; `read_write` the contrary."""
    read_write: ClassVar[str]
    lock_timeout: ClassVar[str]
    """The setting to be SET for a wait of `short`."""
    dirt: ClassVar[tuple[str, ...]]
    """Statements that change the session, with no right that `app` has not."""
    state: ClassVar[str]
    """All that `dirt` changes, in one value."""

    fail_as_deadlock: ClassVar[str]
    """A statement that fails as the victim of a deadlock does; MariaDB's transaction itself goes on."""
    prepared: ClassVar[str]
    """The transactions that are prepared and not committed, of two-phase."""
    remember: ClassVar[str]
    """Something that only this session knows; `recall` reads it."""
    recall: ClassVar[str]
    isolation: ClassVar[str]
    """The transaction's isolation level."""
    connect_args: ClassVar[dict[str, Any]]
    """The driver's arguments that set something as a connection is opened."""
    fresh: ClassVar[tuple[str, ...]]
    """Some of what is in `state` then, with the isolation level READ COMMITTED."""
    connected: ClassVar[str]
    """How many connections count where a limit is set, and nothing is left of those that have ended."""
    idle_timeout: ClassVar[tuple[str, Any]]
    """The server's setting, and a value, for ending connections that are idle for two seconds."""
    sends_streams: ClassVar[bool]
    """Whether a stream's rows come by themselves, so that its connection is given up where nobody reads them on."""

    CANCELLED: ClassVar[Any]  # a statement that somebody has ended
    DEADLOCK: ClassVar[Any]
    LOCKED: ClassVar[Any]  # NOWAIT, or a lock wait that has taken too long
    READ_ONLY: ClassVar[Any]  # a write that the server refuses
    OWN_READ_ONLY: ClassVar[Any]  # a write in a read-only transaction
    UNKNOWN_TABLE: ClassVar[Any]
    LOST: ClassVar[frozenset[Any]]  # the connection, or the way to the server

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other)

    def __hash__(self) -> int:
        return hash(type(self))

    @staticmethod
    def sleep(seconds: float) -> str:
        """An expression that waits at the server, and is 0 then."""
        raise NotImplementedError

    @staticmethod
    def numbers(last: int) -> str:
        """What is read FROM: rows with the numbers from 1 to `last`, called seq."""
        raise NotImplementedError

    @staticmethod
    def code(error: Any) -> Any:
        """The server's code of an error that SQLAlchemy raised; the driver's where the server has sent none."""
        raise NotImplementedError

    @staticmethod
    def is_full(error: Any) -> bool:
        """Whether the server has no room for one more connection."""
        return re.search("too many connections|1203|1226", str(error), re.IGNORECASE) is not None

    def is_lost(self, error: Any) -> bool:
        """Whether it says that the connection is lost, or that there is no way to the server."""
        return self.code(error) in self.LOST


class MariaDB(Dialect):
    who = "CONNECTION_ID()"
    version = "VERSION()"
    database = "DATABASE()"
    payload = "LONGTEXT"
    serial = "INTEGER PRIMARY KEY AUTO_INCREMENT"
    port = "@@port"
    read_only = "SET SESSION TRANSACTION READ ONLY"
    read_write = "SET SESSION TRANSACTION READ WRITE"
    lock_timeout = "SET SESSION innodb_lock_wait_timeout = 1"
    dirt = (
        "SET @who = 'alice'",
        "SET time_zone = '+05:00'",
        "SET sql_mode = ''",
        "SET SESSION TRANSACTION ISOLATION LEVEL READ UNCOMMITTED",
        "SET NAMES latin1",
        "SET lock_wait_timeout = 3",
        "SET group_concat_max_len = 4",
        "CREATE TEMPORARY TABLE private (n INT)",
        "INSERT INTO private VALUES (1)",
        "SELECT GET_LOCK('dbs', 0)",
        "SET autocommit = 1",
    )
    state = (
        "SELECT CONVERT(CONCAT_WS('|',"
        " COALESCE(@who, 'nobody'), @@time_zone, @@sql_mode, @@tx_isolation, @@autocommit,"
        " @@character_set_client, @@character_set_connection, @@character_set_results, @@collation_connection,"
        " @@lock_wait_timeout, @@group_concat_max_len, DATABASE(), COALESCE(IS_USED_LOCK('dbs'), 'free')"
        ") USING utf8mb4)"
    )
    fail_as_deadlock = "SIGNAL SQLSTATE '40001' SET MYSQL_ERRNO = 1213, MESSAGE_TEXT = 'Deadlock found'"
    prepared = "XA RECOVER"
    remember = "SET @mine = 1"
    recall = "SELECT @mine"
    isolation = "@@tx_isolation"
    connect_args: ClassVar[dict[str, Any]] = {"init_command": "SET lock_wait_timeout = 77"}
    fresh = ("nobody", "utf8mb4", "77", "READ-COMMITTED")
    connected = (
        "SELECT variable_value + 0 FROM information_schema.global_status WHERE variable_name = 'Threads_connected'"
    )
    idle_timeout = ("wait_timeout", 2)
    sends_streams = True

    CANCELLED = 1317
    DEADLOCK = 1213
    LOCKED = 1205
    READ_ONLY = 1290
    OWN_READ_ONLY = 1792
    UNKNOWN_TABLE = 1146
    LOST = frozenset({1053, 1927, 2003, 2006, 2013})

    @staticmethod
    def sleep(seconds: float) -> str:
        return f"SLEEP({seconds:g})"

    @staticmethod
    def numbers(last: int) -> str:
        return f"seq_1_to_{last}"

    @staticmethod
    def code(error: Any) -> Any:
        return int(error.orig.args[0])


class PostgreSQL(Dialect):
    who = "pg_backend_pid()"
    version = "version()"
    database = "current_database()"
    payload = "TEXT"
    serial = "INTEGER PRIMARY KEY GENERATED BY DEFAULT AS IDENTITY"
    port = "inet_server_port()"
    read_only = "SET TRANSACTION READ ONLY"
    read_write = "SET TRANSACTION READ WRITE"
    lock_timeout = "SET SESSION lock_timeout = '1s'"
    dirt = (
        "SELECT set_config('app.who', 'alice', false)",
        "SET timezone = '+05'",
        "SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL SERIALIZABLE",
        "SET client_encoding = 'LATIN1'",
        "SET lock_timeout = 3",
        "SET search_path = pg_catalog",
        "SET search_path = public",
        "CREATE TEMPORARY TABLE private (n INT)",
        "INSERT INTO private VALUES (1)",
        "SELECT pg_advisory_lock(2718)",
        "LISTEN dbs",
        "PREPARE dbs AS SELECT 1",
        "DECLARE dbs CURSOR WITH HOLD FOR SELECT 1",
        "SET ROLE other",
    )
    state = (
        "SELECT concat_ws('|', coalesce(nullif(current_setting('app.who', true), ''), 'nobody'),"
        " current_setting('timezone'), current_setting('default_transaction_isolation'),"
        " current_setting('client_encoding'), current_setting('lock_timeout'), current_setting('search_path'),"
        " (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = 2718 AND pid = pg_backend_pid()),"
        " (SELECT count(*) FROM pg_listening_channels()),"
        " (SELECT count(*) FROM pg_prepared_statements WHERE from_sql),"
        " (SELECT count(*) FROM pg_cursors WHERE is_holdable), current_user)"
    )
    fail_as_deadlock = "DO $$ BEGIN RAISE EXCEPTION 'deadlock detected' USING ERRCODE = '40P01'; END $$"
    prepared = "SELECT gid FROM pg_prepared_xacts"
    remember = "SELECT set_config('app.mine', '1', false)"
    recall = "SELECT nullif(current_setting('app.mine', true), '')"
    isolation = "current_setting('transaction_isolation')"
    connect_args: ClassVar[dict[str, Any]] = {"options": "-c lock_timeout=77"}
    fresh = ("nobody", "UTF8", "77ms", "read committed")
    connected = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'app'"
    idle_timeout = ("idle_session_timeout", "2s")
    sends_streams = False

    CANCELLED = "57014"
    DEADLOCK = "40P01"
    LOCKED = "55P03"
    READ_ONLY = "25006"
    OWN_READ_ONLY = "25006"
    UNKNOWN_TABLE = "42P01"
    LOST = frozenset({None, "57P01", "57P02", "57P03", "08000", "08001", "08003", "08004", "08006", "08P01"})

    @staticmethod
    def sleep(seconds: float) -> str:
        return f"(SELECT 0 FROM pg_sleep({seconds:g}))"

    @staticmethod
    def numbers(last: int) -> str:
        return f"generate_series(1, {last}) AS numbers(seq)"

    @staticmethod
    def code(error: Any) -> Any:
        for name in ("sqlstate", "pgcode"):  # psycopg and asyncpg, psycopg2
            found = getattr(error.orig, name, None)
            if isinstance(found, str):
                return found
        return None

    def is_lost(self, error: Any) -> bool:
        # Without a code it is libpq's own; whatever else the driver raises is none of these.
        return isinstance(error, (OperationalError, InterfaceError)) and super().is_lost(error)


def dialect_of(url: str) -> Dialect:
    """The words of the database that this URL leads to."""
    return PostgreSQL() if url.startswith("postgresql") else MariaDB()
