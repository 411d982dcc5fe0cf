"""A PgBouncer of the tests' own in front of their PostgreSQL server, in transaction mode."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

import psycopg
from psycopg.rows import DictRow

from .postgresql import PostgreSQLServer
from .servers import Server, find_program, unprivileged

CONFIG = """\
[databases]
* = host=127.0.0.1 port={server}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir = {folder}
auth_type = scram-sha-256
auth_file = {folder}/users
admin_users = app
pool_mode = transaction
default_pool_size = {pool_size}
max_client_conn = 500
server_login_retry = 1
"""


class PgBouncer(PostgreSQLServer):
    """A running PgBouncer, whose databases are those of the server behind it: one of its connections to the server is a
    client's for one transaction. Whatever is done with all rights does not go through it.

    Args:
        server: where it leads to.
        pool_size: its connections to the server, for each database.
    """

    PROGRAM = "pgbouncer"
    STOP = signal.SIGTERM
    END = 0

    def __init__(self, server: PostgreSQLServer, pool_size: int = 20) -> None:
        self._pgbouncer = find_program("pgbouncer", "pgbouncer")
        Server.__init__(self, unprivileged("postgres", "nobody"))  # it refuses root
        self.server, self.password, self._pool_size = server, server.password, pool_size
        try:
            (self.folder / "users").write_text(f'"app" "{self.password}"\n')
            self.start()
        except BaseException:
            self.close()
            raise

    def _command(self, port: int) -> list[str]:
        config = self.folder / "pgbouncer.ini"
        values = {"server": self.server.port, "port": port, "folder": self.folder, "pool_size": self._pool_size}
        config.write_text(CONFIG.format_map(values))
        return [self._pgbouncer, str(config)]

    def _answers(self) -> bool:
        # By the socket: nobody else's can answer there.
        with contextlib.suppress(psycopg.OperationalError):
            where = {"host": str(self.folder), "port": self.port, "dbname": "pgbouncer"}
            psycopg.connect(**where, user="app", password=self.password, connect_timeout=20).close()
            return True
        return False

    def ensure_running(self) -> None:
        """Undoes whatever a test did to it, or to the server behind it."""
        self.server.ensure_running()
        super().ensure_running()

    @contextlib.contextmanager
    def root(self, database: str | None = None) -> Iterator[psycopg.Cursor[DictRow]]:
        """The server's own, as it is."""
        with self.server.root(database) as cursor:
            yield cursor
