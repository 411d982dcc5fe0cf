"""A Galera cluster of the tests' own: three MariaDB nodes and haproxy, temporary, on loopback, gone when the tests are.

Everybody writes to the first node while it is up; the others are haproxy's backups. When the writer goes down, haproxy
breaks the connections it has to it.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import random
import secrets
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

import pymysql

from .galera_node import GaleraNode
from .mariadb import OPTIONS
from .processes import Supervised
from .servers import ServerMissing, find_program
from .waiting import wait_until

SIZE = 3
PROVIDERS = ("/usr/lib/galera/libgalera_smm.so", "/usr/lib64/galera-4/libgalera_smm.so")
GALERA = ["--wsrep-on=ON", "--binlog-format=ROW", "--innodb-autoinc-lock-mode=2", "--wsrep-sst-method=rsync"]
HAPROXY = """
global
    maxconn 500
    log stdout format timed daemon notice
defaults
    log global
    mode tcp
    timeout connect 2s
    timeout check 1s
    timeout client 5m
    timeout server 5m
listen writer
    bind 127.0.0.1:{port}
    option mysql-check user haproxy post-41
    default-server check inter 500ms fastinter 100ms fall 2 rise 2 on-marked-down shutdown-sessions
{servers}
"""


class GaleraMissing(Exception):
    """The cluster cannot be had here; the message says what to install."""


def fixed_ports(count: int) -> list[int]:
    """Loopback ports that are free now and that the kernel gives nobody who does not ask for them.

    A node comes back on its old ports. The source port of a connection that somebody opened meanwhile, such as
    haproxy's next try to reach that very node, must not be one of them.
    """
    limit = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports: list[int] = []
    for port in random.sample(range(10_000, limit), k=20 * count):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            ports.append(port)
        if len(ports) == count:
            return ports
    raise RuntimeError(f"{count} free ports below {limit} were not found")


class GaleraCluster:
    """Three nodes and haproxy before them; lives until `close()` or the end of this process.

    `nodes[0]` is the writer. Two accounts: `root` over each node's socket, and `app` over TCP, with all rights.
    """

    def __init__(self) -> None:
        self.password = secrets.token_hex(8)
        self.nodes: list[GaleraNode] = []
        self._proxy: Supervised | None = None
        self._folder: Path | None = None
        command = self._node_command()
        haproxy = self._program("haproxy")
        try:
            self.port, *ports = fixed_ports(1 + 4 * SIZE)
            members = ",".join(f"127.0.0.1:{port}" for port in ports[1::4])
            for number in range(SIZE):
                node = GaleraNode(f"n{number + 1}", ports[4 * number : 4 * number + 4], members, command)
                self.nodes.append(node)
            self._install(self.nodes[0])
            self.nodes[0].start(new_cluster=True)
            self._create_accounts()
            for node in self.nodes[1:]:
                node.start()
            self._start_haproxy(haproxy)
            wait_until(self._writer_is_first, 30, "haproxy leads to the first node")
        except BaseException:
            self.close()
            raise

    @staticmethod
    def _program(name: str) -> str:
        try:
            return find_program(name, "mariadb-server")
        except ServerMissing:
            raise GaleraMissing(f"{name} not found: apt-get install mariadb-server galera-4 haproxy rsync") from None

    def _node_command(self) -> list[str]:
        provider = next(filter(os.path.exists, PROVIDERS), None)
        if provider is None:
            raise GaleraMissing("Galera's provider not found: apt-get install galera-4")
        for program in ("rsync", "wsrep_sst_rsync", "mariadb-install-db"):
            self._program(program)
        command = [self._program("mariadbd"), "--no-defaults", *OPTIONS, *GALERA, f"--wsrep-provider={provider}"]
        if os.geteuid() == 0:
            # Not as root, as whom rsync would send the data as nobody, and fail.
            try:
                pwd.getpwnam("mysql")
            except KeyError:
                raise GaleraMissing("there is no user mysql, whom root's MariaDB server could run as") from None
            command.append("--user=mysql")
        return command

    def _install(self, node: GaleraNode) -> None:
        # The first node only: the others get everything from it.
        command = [self._program("mariadb-install-db"), "--no-defaults", f"--datadir={node.data}"]
        command += ["--auth-root-authentication-method=normal", "--skip-test-db", "--skip-name-resolve"]
        # A server that starts removes what it takes for temporary tables left behind, another's in /tmp as well.
        command += ["--innodb-log-file-size=16M", f"--tmpdir={node.folder}"]
        if os.geteuid() == 0:
            command.append("--user=mysql")
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"mariadb-install-db failed:\n{done.stdout}\n{done.stderr}"

    def _create_accounts(self) -> None:
        with self.nodes[0].root() as cursor:
            # Their passwords are empty, and TCP is open to every user of the machine.
            cursor.execute("SELECT host FROM mysql.global_priv WHERE user = 'root' AND host <> 'localhost'")
            for (host,) in cursor.fetchall():
                cursor.execute("DROP USER root@%s", (host,))
            cursor.execute("CREATE USER haproxy@'127.0.0.1'")  # no password, no rights
            cursor.execute("CREATE USER app@'127.0.0.1' IDENTIFIED BY %s", (self.password,))
            cursor.execute("CREATE DATABASE app CHARACTER SET utf8mb4")
            cursor.execute("GRANT ALL ON app.* TO app@'127.0.0.1'")

    def _start_haproxy(self, haproxy: str) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="dbs-"))
        servers = [f"    server {node.name} 127.0.0.1:{node.port} backup" for node in self.nodes]
        servers[0] = servers[0].removesuffix(" backup")
        config = self._folder / "haproxy.cfg"
        config.write_text(HAPROXY.format(port=self.port, servers="\n".join(servers)))
        self._proxy = Supervised(
            [haproxy, "-db", "-f", str(config)], log=self._folder / "log", remove=self._folder, cwd=self._folder
        )

    def url(self, node: int | None = None) -> str:
        """Of the database `app`, through haproxy; of the node of that index, without it."""
        port = self.port if node is None else self.nodes[node].port
        return f"mysql+pymysql://app:{self.password}@127.0.0.1:{port}/app"

    def writer(self) -> str:
        """The name of the node that haproxy leads to; "" while there is none that works."""
        try:
            connection = pymysql.connect(
                host="127.0.0.1", port=self.port, user="app", password=self.password, connect_timeout=5, read_timeout=5
            )
        except pymysql.err.OperationalError:
            return ""
        try:
            with connection.cursor() as cursor:
                cursor.execute("SELECT @@wsrep_node_name")
                row = cursor.fetchone()
                return str(row[0]) if row else ""
        except pymysql.err.OperationalError:
            return ""
        finally:
            connection.close()

    def _writer_is_first(self) -> bool:
        return self.writer() == self.nodes[0].name

    def ensure_healthy(self) -> None:
        """Undoes whatever a test did to it: all nodes are in, and haproxy leads to the first."""
        for node in self.nodes:
            node.resume()
            if not node.ended():
                node.rejoin()
        wait_until(self._all_in, 60, "all nodes are in the cluster")
        wait_until(self._writer_is_first, 30, "haproxy leads to the first node")

    def _all_in(self) -> bool:
        for node in self.nodes:
            if node.ended():
                node.start()
        # All at one moment: a node that was paused believes for a while that nothing has happened.
        return all(node.is_ready(SIZE) for node in self.nodes)

    def close(self) -> None:
        """Kills all of it and removes the folders. Idempotent."""
        if self._proxy is not None:
            self._proxy.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        for node in self.nodes:
            node.close()
