"""A PostgreSQL server of the tests' own: temporary, on a free loopback port, gone when the tests are."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql
from psycopg.rows import DictRow, dict_row

from .dialects import PostgreSQL
from .servers import Server, find_program, unprivileged
from .waiting import wait_until

# Small and fast: the data need not survive the machine.
OPTIONS = [
    "fsync=off",
    "full_page_writes=off",
    "shared_buffers=32MB",
    "max_connections=300",
    "max_prepared_transactions=20",
    "autovacuum=off",
    "deadlock_timeout=200ms",
    "max_logical_replication_workers=0",
    "log_checkpoints=off",
]

# In its own folder, into which nobody else gets, the superuser needs no password; by TCP it has none that would do.
ACCESS = """\
local all postgres trust
host all all 127.0.0.1/32 scram-sha-256
"""

# In the words of MariaDB's information_schema.processlist.
PROCESSLIST = """
SELECT pid AS id, usename AS user, host(client_addr) || ':' || client_port AS host, datname AS db,
    CASE WHEN state LIKE 'idle%%' THEN 'Sleep' ELSE 'Query' END AS command,
    EXTRACT(EPOCH FROM clock_timestamp() - state_change)::int AS time,
    CASE WHEN wait_event_type = 'Lock' THEN 'waiting for a lock'
        WHEN wait_event = 'PgSleep' THEN 'sleeping' ELSE state END AS state,
    CASE WHEN state LIKE 'idle%%' THEN NULL ELSE query END AS info,
    xact_start IS NOT NULL AND state <> 'idle' AS in_transaction
FROM pg_stat_activity WHERE usename = %s AND backend_type = 'client backend'
"""


class PostgreSQLServer(Server):
    """A running PostgreSQL server. Two accounts: `postgres`, with all rights, over the socket in the server's private
    folder, and `app` over TCP, to whom the databases belong that `create_database` made.

    Args:
        options: settings ("name=value") in addition to OPTIONS, or in place of some: the last one counts.
    """

    PROGRAM = "postgres"
    dialect = PostgreSQL()
    STOP = signal.SIGINT  # "fast": SIGTERM's waits for the clients
    END = signal.SIGQUIT  # "immediate", which takes its shared memory away, too

    def __init__(self, *options: str) -> None:
        initdb = Path(find_program("initdb", "postgresql")).resolve()
        self._postgres = initdb.with_name("postgres")  # of the same version
        super().__init__(unprivileged("postgres", "nobody"))  # it refuses root
        try:
            data = self.folder / "data"
            self._options = [f"--{option}" for option in (*OPTIONS, *options)]
            self._options += ["-D", str(data), f"--unix_socket_directories={self.folder}"]
            self._options += ["--listen_addresses=127.0.0.1", "--unix_socket_permissions=0700"]
            install = [
                str(initdb),
                "-D",
                str(data),
                "--username=postgres",
                "--encoding=UTF8",
                "--locale=C",
                "--no-sync",
            ]
            self._install([*install, "--auth=reject"])
            (data / "pg_hba.conf").write_text(ACCESS)
            self.start()
            with self.root() as cursor:
                role = sql.SQL("CREATE ROLE app LOGIN PASSWORD {}").format(sql.Literal(self.password))
                cursor.execute(role)
                cursor.execute("CREATE ROLE other")
                cursor.execute("GRANT other TO app")
        except BaseException:
            self.close()
            raise

    def _command(self, port: int) -> list[str]:
        return [str(self._postgres), *self._options, f"--port={port}"]

    def _answers(self) -> bool:
        # By the socket: nobody else's server can answer there.
        try:
            with self.root():
                return True
        except psycopg.OperationalError:
            return False

    @contextlib.contextmanager
    def root(self, database: str | None = None) -> Iterator[psycopg.Cursor[DictRow]]:
        """A cursor with all rights, in autocommit mode, that no test's TCP trouble reaches; in this database."""
        connection = psycopg.connect(
            host=str(self.folder),
            port=self.port,
            user="postgres",
            dbname=database or "postgres",
            autocommit=True,
            connect_timeout=20,
            row_factory=dict_row,
        )
        with contextlib.closing(connection), connection.cursor() as cursor:
            yield cursor

    def url(self, database: str, *, port: int | None = None, driver: str = "psycopg") -> str:
        """What `configure` takes; `port` for the way through a proxy."""
        return f"postgresql+{driver}://app:{self.password}@127.0.0.1:{port or self.port}/{database}"

    def create_database(self, name: str) -> str:
        """An empty database that is `app`'s; returns its `url`."""
        with self.root() as cursor:
            cursor.execute(sql.SQL("CREATE DATABASE {} OWNER app").format(sql.Identifier(name)))
        with self.root(name) as cursor:  # what a test creates in it with all rights is `app`'s to use, too
            cursor.execute("ALTER DEFAULT PRIVILEGES GRANT ALL ON TABLES TO app")
        return self.url(name)

    def drop_database(self, name: str) -> None:
        """Drops it, after killing the connections that still use it."""
        with self.root() as cursor:
            cursor.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))

    def processlist(self, user: str = "app") -> list[dict[str, Any]]:
        """The user's connections at the server: id, user, host, db, command, time, state, info; and whether it is
        in_transaction."""
        with self.root() as cursor:
            return list(cursor.execute(PROCESSLIST, (user,)).fetchall())

    def open_transactions(self) -> int:
        """How many of `app`'s there are at the server, just now."""
        return sum(process["in_transaction"] for process in self.processlist())

    def kill_connection(self, number: int) -> None:
        """What an operator does, or a proxy: the connection is gone."""
        with self.root() as cursor:
            cursor.execute("SELECT pg_terminate_backend(%s)", (number,))

    def kill_statement(self, number: int) -> None:
        """End what a connection runs; the connection stays."""
        with self.root() as cursor:
            cursor.execute("SELECT pg_cancel_backend(%s)", (number,))

    def kills(self) -> int:
        """How often somebody has asked it to end a statement, and has met one."""
        return self.log.read_text(errors="replace").count("canceling statement due to user request")

    def setting(self, name: str) -> Any:
        """What new sessions have of a setting."""
        with self.root() as cursor:
            return cursor.execute("SELECT current_setting(%s) AS value", (name,)).fetchone()["value"]

    def set_global(self, name: str, value: Any) -> None:
        """For new sessions, and at its next statement for each that there is."""
        with self.root() as cursor:
            text = sql.SQL("ALTER SYSTEM SET {} = {}").format(sql.Identifier(name), sql.Literal(str(value)))
            cursor.execute(text)
            cursor.execute("SELECT pg_reload_conf()")
        # The first process reads it a moment later.
        wait_until(lambda: self.setting(name) == str(value), 20, f"{name} is {value}")

    def refuse_writes(self, refuse: bool) -> None:
        """Be a primary that was demoted; False: be one again."""
        self.set_global("default_transaction_read_only", "on" if refuse else "off")

    @contextlib.contextmanager
    def user_with_few(self, database: str) -> Iterator[Callable[[int], None]]:
        """A user `few` of a database, with `app`'s password, and what sets how many connections he may have."""
        with self.root(database) as cursor:

            def allow(count: int) -> None:
                cursor.execute(f"ALTER ROLE few CONNECTION LIMIT {count}")

            cursor.execute(sql.SQL("CREATE ROLE few LOGIN PASSWORD {}").format(sql.Literal(self.password)))
            yield allow
            cursor.execute("DROP ROLE few")

    def set_password(self, password: str) -> None:
        """Let `app` in with this one only."""
        with self.root() as cursor:
            cursor.execute(sql.SQL("ALTER ROLE app PASSWORD {}").format(sql.Literal(password)))
        self.password = password

    def limit_connections(self, limit: int | None) -> None:
        """Have no room for more connections of `app`; None: as before."""
        with self.root() as cursor:
            cursor.execute(f"ALTER ROLE app CONNECTION LIMIT {-1 if limit is None else limit}")
