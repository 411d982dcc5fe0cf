"""A MariaDB server of the tests' own: temporary, on a free loopback port, gone when the tests are."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pymysql
import pymysql.cursors
from sqlalchemy.engine import make_url

from .dialects import MariaDB
from .servers import Server, find_program

# Small and fast: the data need not survive the machine.
OPTIONS = [
    "--innodb-buffer-pool-size=64M",
    "--innodb-log-file-size=16M",
    "--innodb-flush-log-at-trx-commit=2",
    "--innodb-fast-shutdown=2",
    "--skip-log-bin",
    "--performance-schema=OFF",
    "--skip-name-resolve",
    "--max-connections=500",
]


def login(url: str, **more: Any) -> dict[str, Any]:
    """The arguments of PyMySQL's connect() for a `url` of ours, and `more` of them, which come first."""
    parts = make_url(url)
    account = {"user": parts.username, "password": parts.password, "database": parts.database}
    return {"host": parts.host, "port": parts.port, **account, **more}


@contextlib.contextmanager
def connected(to: Callable[..., Any], url: str, **more: Any) -> Iterator[Any]:
    """A connection by `to`: pymysql.connect, or a class such as ours; closed at the end. `more` is as by `login()`."""
    connection = to(**login(url, **more))
    try:
        yield connection
    finally:
        connection.close()


class MariaDBServer(Server):
    """A running MariaDB server. Two accounts: `root` over the socket in its private folder, and `app` over TCP, with
    all rights on the databases that `create_database` made.

    Args:
        options: command line options in addition to OPTIONS, or in place of some: the last one counts.
    """

    PROGRAM = "mariadbd"
    dialect = MariaDB()

    def __init__(self, *options: str) -> None:
        self._mariadbd = find_program("mariadbd", "mariadb-server")
        install_db = find_program("mariadb-install-db", "mariadb-server")
        super().__init__()
        self.socket = self.folder / "sock"
        try:
            # --no-defaults comes first: no configuration of the machine or the user is read.
            common = ["--no-defaults", f"--datadir={self.folder / 'data'}"]
            if os.geteuid() == 0:
                common.append("--user=root")  # mariadbd refuses root unless told; the folder is root's alone
            self._options = [*common, *OPTIONS, *options]
            self._options += [f"--socket={self.socket}", "--bind-address=127.0.0.1"]
            self._options += [f"--pid-file={self.folder / 'pid'}", f"--tmpdir={self.folder}"]
            install = [install_db, *common, "--auth-root-authentication-method=normal", "--skip-test-db"]
            # A server that starts removes what it takes for temporary tables left behind, another's in /tmp as well.
            install.append(f"--tmpdir={self.folder}")
            self._install([*install, "--skip-name-resolve", "--innodb-log-file-size=16M"])
            self.start()
            with self.root() as cursor:
                # Their passwords are empty, and TCP is open to every user of the machine.
                cursor.execute("SELECT host FROM mysql.global_priv WHERE user = 'root' AND host <> 'localhost'")
                for row in cursor.fetchall():
                    cursor.execute("DROP USER root@%s", (row["host"],))
                cursor.execute("CREATE USER app@'127.0.0.1' IDENTIFIED BY %s", (self.password,))
        except BaseException:
            self.close()
            raise

    def _command(self, port: int) -> list[str]:
        return [self._mariadbd, *self._options, f"--port={port}"]

    def _answers(self) -> bool:
        # By the socket: nobody else's server can answer there. Tried plainly first, because PyMySQL forgets
        # to close a unix socket that is refused, and the ResourceWarning fails some test later on.
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(str(self.socket)):
                return False
        try:
            with self.root():
                return True
        except pymysql.err.OperationalError:
            return False

    @contextlib.contextmanager
    def root(self, database: str | None = None) -> Iterator[pymysql.cursors.DictCursor]:
        """A cursor with all rights, in autocommit mode, that no test's TCP trouble reaches; in this database."""
        connection = pymysql.connect(
            unix_socket=str(self.socket),
            user="root",
            database=database,
            autocommit=True,
            connect_timeout=20,
            read_timeout=30,
            ssl_disabled=True,  # a context of PyMySQL's takes longer than all the rest
            cursorclass=pymysql.cursors.DictCursor,
        )
        try:
            with connection.cursor() as cursor:
                yield cursor
        finally:
            connection.close()

    def url(self, database: str, *, port: int | None = None, driver: str = "pymysql") -> str:
        """What `configure` takes; `port` for the way through a proxy."""
        return f"mysql+{driver}://app:{self.password}@127.0.0.1:{port or self.port}/{database}"

    def create_database(self, name: str) -> str:
        """An empty utf8mb4 database on which `app` has all rights; returns its `url`."""
        with self.root() as cursor:
            cursor.execute(f"CREATE DATABASE `{name}` CHARACTER SET utf8mb4")
            # In GRANT, unlike elsewhere, _ and % in a database name are wildcards.
            pattern = name.replace("_", r"\_")
            cursor.execute(f"GRANT ALL ON `{pattern}`.* TO app@'127.0.0.1'")
        return self.url(name)

    def drop_database(self, name: str) -> None:
        """Drops it, after killing the connections that still use it."""
        with self.root() as cursor:
            for process in self.processlist():
                if process["db"] == name:
                    with contextlib.suppress(pymysql.err.OperationalError):  # gone meanwhile
                        cursor.execute("KILL %s", (process["id"],))
            cursor.execute("SET lock_wait_timeout = 20")
            cursor.execute(f"DROP DATABASE IF EXISTS `{name}`")

    def processlist(self, user: str = "app") -> list[dict[str, Any]]:
        """The user's connections at the server: id, user, host, db, command, time, state, info ..."""
        with self.root() as cursor:
            cursor.execute("SELECT * FROM information_schema.processlist WHERE user = %s", (user,))
            return [{key.lower(): value for key, value in row.items()} for row in cursor.fetchall()]

    def open_transactions(self) -> int:
        """How many there are at the server, just now."""
        # Not information_schema.innodb_trx: who reads that again within 100 ms sees what it was before.
        with self.root() as cursor:
            cursor.execute("SHOW ENGINE INNODB STATUS")
            row = cursor.fetchone()
        assert row is not None
        # Before that there are those of the latest deadlock, however old.
        return str(row["Status"]).partition("LIST OF TRANSACTIONS FOR EACH SESSION")[2].count(", ACTIVE ")

    def kill_connection(self, number: int) -> None:
        """What an operator does, or a proxy: the connection is gone."""
        with self.root() as cursor:
            cursor.execute("KILL %s", (number,))

    def kill_statement(self, number: int) -> None:
        """End what a connection runs; the connection stays."""
        with self.root() as cursor:
            cursor.execute("KILL QUERY %s", (number,))

    def kills(self) -> int | str:
        """How often somebody has asked it to end a statement or a connection."""
        return self.status("Com_kill")

    def setting(self, name: str) -> Any:
        """What new sessions have of a variable."""
        with self.root() as cursor:
            cursor.execute(f"SELECT @@GLOBAL.{name} AS value")
            row = cursor.fetchone()
        assert row is not None
        return row["value"]

    def set_global(self, name: str, value: Any) -> None:
        """For sessions that begin later, or for all, as the variable is."""
        with self.root() as cursor:
            cursor.execute(f"SET GLOBAL {name} = %s", (value,))

    def refuse_writes(self, refuse: bool) -> None:
        """Be a primary that was demoted; False: be one again."""
        with self.root() as cursor:
            cursor.execute("SELECT * FROM information_schema.user_privileges WHERE grantee LIKE %s", ("%app%",))
            assert {row["PRIVILEGE_TYPE"] for row in cursor.fetchall()} == {"USAGE"}, "who has more is not refused"
        self.set_global("read_only", int(refuse))

    @contextlib.contextmanager
    def user_with_few(self, database: str) -> Iterator[Callable[[int], None]]:
        """A user `few` of a database, with `app`'s password, and what sets how many connections he may have."""
        with self.root() as cursor:

            def allow(count: int) -> None:
                cursor.execute(f"ALTER USER few@'127.0.0.1' WITH MAX_USER_CONNECTIONS {count}")

            cursor.execute("CREATE USER few@'127.0.0.1' IDENTIFIED BY %s", (self.password,))
            cursor.execute(f"GRANT ALL ON {database}.* TO few@'127.0.0.1'")
            yield allow
            cursor.execute("DROP USER few@'127.0.0.1'")

    def set_password(self, password: str) -> None:
        """Let `app` in with this one only."""
        with self.root() as cursor:
            cursor.execute("SET PASSWORD FOR app@'127.0.0.1' = PASSWORD(%s)", (password,))
        self.password = password

    def limit_connections(self, limit: int | None) -> None:
        """Have no room for more connections, 10 at least; None: as before."""
        self.set_global("max_connections", limit or 500)

    def status(self, name: str) -> int | str:
        """A server-wide counter or state, such as Com_rollback or Threads_connected."""
        with self.root() as cursor:
            cursor.execute("SHOW GLOBAL STATUS LIKE %s", (name,))
            row = cursor.fetchone()
        assert row is not None, f"no such status variable: {name}"
        value = str(row["Value"])
        return int(value) if value.isdigit() else value
