"""A MariaDB server of the tests' own: temporary, on a free loopback port, gone when the tests are."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pymysql
import pymysql.cursors
from sqlalchemy.engine import make_url

from .processes import Supervised, pause_process
from .waiting import wait_until

# Where distributions put it; not on every user's PATH.
SBIN = os.pathsep.join(["/usr/sbin", "/usr/local/sbin", "/sbin"])

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


class MariaDBMissing(Exception):
    """No MariaDB server is installed; the message says what to do."""


def find_program(name: str) -> str:
    """The path of one of MariaDB's programs; MariaDBMissing when there is none."""
    found = shutil.which(name, path=os.environ.get("PATH", "") + os.pathsep + SBIN)
    if found is None:
        raise MariaDBMissing(f"{name} not found: install MariaDB (Debian: apt-get install mariadb-server)")
    return found


def free_port() -> int:
    """A loopback port that was free a moment ago; whoever uses it must be ready to try another."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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


class MariaDBServer:
    """A running server; lives until `close()` or the end of this process, and its data folder with it.

    `stop()`, `kill()` and `pause()` take it away for a while, on the same port; `start()` and `resume()`
    bring it back. Two accounts: `root` over the socket in its private folder, and `app` over TCP, with all
    rights on the databases that `create_database` made.

    Args:
        options: command line options in addition to OPTIONS, or in place of some: the last one counts.
    """

    def __init__(self, *options: str) -> None:
        mariadbd, install_db = find_program("mariadbd"), find_program("mariadb-install-db")
        self.folder = Path(tempfile.mkdtemp(prefix="dbs-"))
        if len(os.fsencode(self.folder)) > 80:  # a unix socket's path is limited to 107 bytes
            self.folder.rmdir()
            self.folder = Path(tempfile.mkdtemp(prefix="dbs-", dir="/tmp"))
        self.log = self.folder / "log"
        self.socket = self.folder / "sock"
        self.password = secrets.token_hex(8)
        self.port = 0
        self._process: Supervised | None = None
        try:
            # --no-defaults comes first: no configuration of the machine or the user is read.
            common = ["--no-defaults", f"--datadir={self.folder / 'data'}"]
            if os.geteuid() == 0:
                common.append("--user=root")  # mariadbd refuses root unless told; the folder is root's alone
            self._command = [mariadbd, *common, *OPTIONS, *options]
            self._command += [f"--socket={self.socket}", "--bind-address=127.0.0.1"]
            self._command += [f"--pid-file={self.folder / 'pid'}", f"--tmpdir={self.folder}"]
            install = [install_db, *common, "--auth-root-authentication-method=normal", "--skip-test-db"]
            # A server that starts removes what it takes for temporary tables left behind, another's in /tmp as well.
            install.append(f"--tmpdir={self.folder}")
            done = subprocess.run(
                [*install, "--skip-name-resolve", "--innodb-log-file-size=16M"],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=300,
            )
            assert done.returncode == 0, f"mariadb-install-db failed:\n{done.stdout}\n{done.stderr}"
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

    # -- its life ------------------------------------------------------------------------------------------

    @property
    def pid(self) -> int:
        """Of mariadbd itself."""
        assert self._process is not None, "the server is stopped"
        return self._process.pid

    def start(self) -> None:
        """Returns when it answers; on the port it had before, if it had one."""
        for attempt in range(5):
            if self._process is not None:
                self._process.close(keep_folder=True)
            port = self.port or free_port()
            log_start = self.log.stat().st_size if self.log.exists() else 0
            self._process = Supervised(
                [*self._command, f"--port={port}"], log=self.log, remove=self.folder, cwd=self.folder
            )
            wait_until(lambda: self._ended() or self._answers(), 60, f"mariadbd answers; see {self.log}")
            if not self._ended():
                self.port = port
                return
            text = self.log.read_text(errors="replace")[log_start:]
            if self.port or "Address already in use" not in text or attempt == 4:
                raise RuntimeError(f"mariadbd ended at once:\n{text}")

    def _ended(self) -> bool:
        assert self._process is not None
        return self._process.poll() is not None

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

    def stop(self) -> None:
        """An orderly shutdown: clients get an error packet or a closed socket."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL: what it has not written is lost, the kernel closes its sockets."""
        self._end(signal.SIGKILL)

    def _end(self, signum: int) -> None:
        # Its supervisor stays until start() or close(), and still removes the folder if this process dies.
        if self._process is not None:
            self.resume()
            self._process.signal(signum)
            self._process.wait(60)

    def restart(self) -> None:
        """`stop()`, then `start()`."""
        self.stop()
        self.start()

    def pause(self) -> None:
        """SIGSTOP: the kernel still accepts connections and bytes, but no answer comes until `resume()`."""
        assert self._process is not None and self._process.poll() is None
        pause_process(self._process.pid)

    def resume(self) -> None:
        """Ends a `pause()`; does nothing otherwise."""
        assert self._process is not None
        self._process.signal(signal.SIGCONT)

    def ensure_running(self) -> None:
        """Undoes whatever a test did to it."""
        self.resume()
        if self._ended():
            self.start()

    def close(self) -> None:
        """Kills it and removes its folder. Idempotent."""
        if self._process is not None:
            self._process.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    # -- its content ---------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def root(self) -> Iterator[pymysql.cursors.DictCursor]:
        """A cursor with all rights, in autocommit mode, that no test's TCP trouble reaches."""
        connection = pymysql.connect(
            unix_socket=str(self.socket),
            user="root",
            autocommit=True,
            connect_timeout=20,
            read_timeout=30,
            cursorclass=pymysql.cursors.DictCursor,
        )
        try:
            with connection.cursor() as cursor:
                yield cursor
        finally:
            connection.close()

    def url(self, database: str, *, port: int | None = None) -> str:
        """What `configure` takes; `port` for the way through a proxy."""
        return f"mysql+pymysql://app:{self.password}@127.0.0.1:{port or self.port}/{database}"

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

    def status(self, name: str) -> int | str:
        """A server-wide counter or state, such as Com_rollback or Threads_connected."""
        with self.root() as cursor:
            cursor.execute("SHOW GLOBAL STATUS LIKE %s", (name,))
            row = cursor.fetchone()
        assert row is not None, f"no such status variable: {name}"
        value = str(row["Value"])
        return int(value) if value.isdigit() else value
