"""One node of a Galera cluster, and what steers it from any process; see `support.galera` for the cluster."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pymysql
import pymysql.cursors

from .processes import Supervised, pause_process
from .waiting import wait_until

PROVIDER_OPTIONS = {
    # A dead node is put out after 2 s instead of 5; a node refuses to start unless it looks more often, too.
    "evs.keepalive_period": "PT0.5S",
    "evs.inactive_check_period": "PT0.5S",
    "evs.suspect_timeout": "PT2S",
    # One that was put out may be back after 1 s instead of 5, and one that was killed comes back as a new member.
    "gmcast.time_wait": "PT1S",
    "pc.recovery": "NO",
    "gcache.size": "8M",
}


class NodeControl:
    """Steers a node from any process; holds nothing open between calls.

    Args:
        path: of its unix socket, where it lets `root` in.
        pid: of its mariadbd, while that runs or its supervisor has not been closed.
    """

    def __init__(self, path: Path | str, pid: int = 0) -> None:
        self.socket, self.pid = path, pid

    def kill(self) -> None:
        """SIGKILL."""
        self._signal(signal.SIGKILL)

    def pause(self) -> None:
        """SIGSTOP: the kernel still accepts connections and bytes, but no answer comes until `resume()`."""
        assert self.pid > 0, "the node was not started"  # 0 would be our own process group
        pause_process(self.pid)

    def resume(self) -> None:
        """Ends a `pause()`; the others may have put it out meanwhile, and it does not know yet."""
        self._signal(signal.SIGCONT)

    def _signal(self, signum: int) -> None:
        assert self.pid > 0, "the node was not started"  # 0 would be our own process group
        os.kill(self.pid, signum)

    @contextlib.contextmanager
    def root(self) -> Iterator[pymysql.cursors.Cursor]:
        """A cursor with all rights, in autocommit mode; reading, it sees all that any node has committed."""
        connection = pymysql.connect(
            unix_socket=str(self.socket), user="root", autocommit=True, connect_timeout=5, read_timeout=30
        )
        try:
            with connection.cursor() as cursor:
                cursor.execute("SET wsrep_sync_wait = 15")
                yield cursor
        finally:
            connection.close()

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        """What a query gives."""
        with self.root() as cursor:
            cursor.execute(query)
            return list(cursor.fetchall())

    def status(self) -> dict[str, str]:
        """Its wsrep_... status variables."""
        with self.root() as cursor:
            cursor.execute("SET wsrep_sync_wait = 0")  # a node outside the cluster has to answer as well
            cursor.execute("SHOW GLOBAL STATUS LIKE 'wsrep%'")
            return {str(name): str(value) for name, value in cursor.fetchall()}

    def is_ready(self, size: int | None = None) -> bool:
        """Whether it takes requests, as an up to date node of a cluster, with `size` nodes if given."""
        # Tried plainly first: PyMySQL forgets to close a unix socket that is refused.
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(str(self.socket)):
                return False
        wanted = {"wsrep_ready": "ON", "wsrep_cluster_status": "Primary", "wsrep_local_state_comment": "Synced"}
        if size is not None:
            wanted["wsrep_cluster_size"] = str(size)
        try:
            return wanted.items() <= self.status().items()
        except pymysql.err.OperationalError:
            return False

    def isolate(self) -> None:
        """Cuts it off from the others: returns when it is non-Primary, where each statement gets error 1047."""
        self._provider_option("gmcast.isolate=1")
        wait_until(lambda: self.status()["wsrep_cluster_status"] == "non-Primary", 30, "the node is non-Primary")

    def rejoin(self) -> None:
        """Ends an `isolate()`; returns when it takes requests."""
        self._provider_option("gmcast.isolate=0")
        wait_until(self.is_ready, 60, "the node is back in the cluster")

    def _provider_option(self, option: str) -> None:
        with self.root() as cursor:
            cursor.execute("SET GLOBAL wsrep_provider_options = %s", (option,))


class GaleraNode(NodeControl):
    """One mariadbd of the cluster; `close()` or the end of this process kills it and removes its folder.

    Args:
        name: as haproxy and the cluster call it.
        ports: for clients, replication, incremental and full state transfer.
        members: the replication addresses of all nodes.
        command: mariadbd and the options that all nodes share.
    """

    def __init__(self, name: str, ports: list[int], members: str, command: list[str]) -> None:
        self.name = name
        self.port, replication, incremental, full = ports
        # In /tmp, because mariadbd runs as mysql where root runs the tests, and root's TMPDIR may be root's alone.
        self.folder = Path(tempfile.mkdtemp(prefix="dbs-", dir="/tmp"))
        self.log = self.folder / "log"
        self.data = self.folder / "data"
        self.data.mkdir()
        if os.geteuid() == 0:
            for path in (self.folder, self.data):
                shutil.chown(path, "mysql", "mysql")
        super().__init__(self.folder / "sock")
        self._process: Supervised | None = None
        provider_options = {
            **PROVIDER_OPTIONS,
            "base_port": replication,
            "gmcast.listen_addr": f"tcp://127.0.0.1:{replication}",
            "ist.recv_addr": f"127.0.0.1:{incremental}",
        }
        self._members = members
        self._command = [
            *command,
            f"--datadir={self.data}",
            f"--socket={self.socket}",
            f"--pid-file={self.folder / 'pid'}",
            f"--tmpdir={self.folder}",
            "--bind-address=127.0.0.1",
            f"--port={self.port}",
            f"--wsrep-node-name={name}",
            f"--wsrep-node-address=127.0.0.1:{replication}",
            f"--wsrep-sst-receive-address=127.0.0.1:{full}",
            "--wsrep-provider-options=" + ";".join(f"{key}={value}" for key, value in provider_options.items()),
        ]

    def start(self, *, new_cluster: bool = False) -> None:
        """Returns when it takes requests: as the first node of a new cluster, or with the content of another one."""
        self.close(keep_folder=True)
        if new_cluster:
            role = ["--wsrep-new-cluster", "--wsrep-cluster-address=gcomm://"]
        else:
            role = [f"--wsrep-cluster-address=gcomm://{self._members}"]
        self._process = Supervised([*self._command, *role], log=self.log, remove=self.folder, cwd=self.folder)
        self.pid = self._process.pid
        try:
            wait_until(lambda: self.ended() or self.is_ready(), 60, f"{self.name} takes part in the cluster")
            if self.ended():
                raise RuntimeError(f"{self.name} ended at once")
        except BaseException as error:
            error.add_note("\n".join(self.log.read_text(errors="replace").splitlines()[-60:]))
            raise

    def ended(self) -> bool:
        """Whether it does not run, because of `kill()` or by itself."""
        return self._process is None or self._process.poll() is not None

    def close(self, *, keep_folder: bool = False) -> None:
        """Kills it. Idempotent."""
        self.pid = 0
        if self._process is not None:
            self._process.close(keep_folder=keep_folder)
        if not keep_folder:
            shutil.rmtree(self.folder, ignore_errors=True)
