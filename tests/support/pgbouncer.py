"""A PgBouncer of the tests' own in front of their PostgreSQL server, in transaction mode."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

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


class PgBouncer(Server):
    """A running PgBouncer, which has what a PostgreSQLServer has, whose databases it leads to: a server connection is a
    client's for one transaction.

    Args:
        server: where it leads to; `root`, `create_database` and `processlist` are this server's.
        pool_size: its server connections, for each database.
    """

    PROGRAM = "pgbouncer"

    def __init__(self, server: PostgreSQLServer, pool_size: int = 20) -> None:
        self._pgbouncer = find_program("pgbouncer", "pgbouncer")
        super().__init__(unprivileged("postgres", "nobody"))  # it refuses root
        self.server, self.password, self._pool_size = server, server.password, pool_size
        try:
            (self.folder / "users").write_text(f'"app" "{self.password}"\n')
            self.start()
        except BaseException:
            self.close()
            raise

    def _command(self, port: int) -> list[str]:
        config = self.folder / "pgbouncer.ini"
        config.write_text(
            CONFIG.format(server=self.server.port, port=port, folder=self.folder, pool_size=self._pool_size)
        )
        return [self._pgbouncer, str(config)]

    def _answers(self) -> bool:
        # By the socket: nobody else's can answer there.
        try:
            with contextlib.closing(self._connect("pgbouncer", host=str(self.folder))):
                return True
        except psycopg.OperationalError:
            return False

    def _connect(self, database: str, host: str) -> psycopg.Connection[Any]:
        return psycopg.connect(
            host=host,
            port=self.port,
            user="app",
            password=self.password,
            dbname=database,
            autocommit=True,
            connect_timeout=20,
        )

    def ensure_running(self) -> None:
        """Undoes whatever a test did to it, or to the server behind it."""
        self.server.ensure_running()
        super().ensure_running()

    @contextlib.contextmanager
    def root(self, database: str | None = None) -> Iterator[psycopg.Cursor[DictRow]]:
        """A cursor of the server, which does not go through here."""
        with self.server.root(database) as cursor:
            yield cursor

    def url(self, database: str, *, port: int | None = None, driver: str = "psycopg") -> str:
        """What `configure` takes; `port` for the way through a proxy."""
        return self.server.url(database, port=port or self.port, driver=driver)

    def create_database(self, name: str) -> str:
        """An empty database that is `app`'s; returns its `url`."""
        self.server.create_database(name)
        return self.url(name)

    def drop_database(self, name: str) -> None:
        """Drops it, after killing the connections that still use it."""
        self.server.drop_database(name)

    def processlist(self, user: str = "app") -> list[dict[str, Any]]:
        """PgBouncer's connections to the server, as PostgreSQLServer.processlist gives them."""
        return self.server.processlist(user)
