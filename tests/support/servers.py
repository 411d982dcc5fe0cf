"""What every database server of the tests' own has: an account it runs as, a private folder, a port, and a life."""

from __future__ import annotations

import contextlib
import glob
import os
import pwd
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
from pathlib import Path
from typing import ClassVar

import pytest

from .processes import Supervised, child_pids, pause_process, wait_gone
from .waiting import wait_until

# Where distributions put servers; not on every user's PATH.
FOLDERS = ["/usr/sbin", "/usr/local/sbin", "/sbin"]
POSTGRESQL_FOLDERS = sorted(glob.glob("/usr/lib/postgresql/*/bin"), key=lambda path: -int(Path(path).parent.name))


# The fixtures that a test of every kind of server is run with; all but the first one in the slow run.
SERVERS = [
    pytest.param("mariadb", marks=pytest.mark.mariadb),
    pytest.param("postgresql", marks=[pytest.mark.postgresql, pytest.mark.slow]),
]


def on(*names: str, slow: tuple[str, ...] = ()) -> pytest.MarkDecorator:
    """The fixture `server` is these ones, of `mariadb`, `postgresql`, `pgbouncer` and
    `mariadb_resolving`; those `slow` in the slow run.

    With fewer of them than there are, the claim is these servers' own: the test says why.
    """
    kinds = {"pgbouncer": "postgresql", "mariadb_resolving": "mariadb"}
    marks = {name: [getattr(pytest.mark, kinds.get(name, name))] for name in names + slow}
    params = [pytest.param(name, marks=marks[name] + [pytest.mark.slow] * (name in slow)) for name in names + slow]
    return pytest.mark.parametrize("server", params, indirect=True)


class ServerMissing(Exception):
    """A server is not installed; the message says what to do."""


def find_program(name: str, package: str) -> str:
    """The path of one of a server's programs; ServerMissing, with Debian's package of it, when there is none."""
    folders = [os.environ.get("PATH", ""), *FOLDERS, *POSTGRESQL_FOLDERS]
    found = shutil.which(name, path=os.pathsep.join(folders))
    if found is None:
        raise ServerMissing(f"{name} not found: apt-get install {package}")
    return found


def free_port() -> int:
    """A loopback port that was free a moment ago; whoever uses it must be ready to try another."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def unprivileged(*names: str) -> pwd.struct_passwd | None:
    """Whom a server that refuses root runs as: the first of these users that there is; None when we are not root."""
    if os.geteuid() != 0:
        return None
    known = {user.pw_name: user for user in pwd.getpwall()}
    for name in names:
        if name in known:
            return known[name]
    raise ServerMissing(f"there is no user {' or '.join(names)}, whom root's server could run as")


def run_as(user: pwd.struct_passwd | None) -> list[str]:
    """What a command begins with that this user is to run, in the same process; nothing for None."""
    if user is None:
        return []
    return ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups", "--"]


def private_folder(user: pwd.struct_passwd | None = None) -> Path:
    """A new folder into which only its owner gets: this user, or we."""
    folder = Path(tempfile.mkdtemp(prefix="dbs-"))
    reached = user is None or all(parent.stat().st_mode & stat.S_IXOTH for parent in folder.parents)
    if len(os.fsencode(folder)) > 80 or not reached:  # a unix socket's path is limited to 107 bytes
        folder.rmdir()
        folder = Path(tempfile.mkdtemp(prefix="dbs-", dir="/tmp"))
    if user is not None:
        os.chown(folder, user.pw_uid, user.pw_gid)
    return folder


class Server:
    """A running server; lives until `close()` or the end of this process, and its folder with it.

    `stop()`, `kill()` and `pause()` take it away for a while, on the same port; `start()` and `resume()`
    bring it back. A subclass says how it is started, and when it answers.

    Args:
        user: whom it runs as, and whose the folder is, if not ours.
    """

    PROGRAM: ClassVar[str]
    STOP: ClassVar[int] = signal.SIGTERM  # an orderly shutdown that does not wait for clients
    END: ClassVar[int] = 0  # the signal at which it leaves nothing behind, where SIGKILL does; 0 where not

    def __init__(self, user: pwd.struct_passwd | None = None) -> None:
        self.folder = private_folder(user)
        self.log = self.folder / "log"
        self.password = secrets.token_hex(8)
        self.port = 0
        self._user = user
        self._process: Supervised | None = None

    def _command(self, port: int) -> list[str]:
        """What is run to have it at this port."""
        raise NotImplementedError

    def _answers(self) -> bool:
        """Whether it, and not somebody else's server, lets us in by now."""
        raise NotImplementedError

    def _install(self, command: list[str]) -> None:
        done = subprocess.run(
            [*run_as(self._user), *command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
            cwd=self.folder,
        )
        assert done.returncode == 0, f"{command[0]} failed:\n{done.stdout}\n{done.stderr}"

    @property
    def pid(self) -> int:
        """Of the server's process; of the first one, where there are several."""
        assert self._process is not None, "the server is stopped"
        return self._process.pid

    def start(self) -> None:
        """Returns when it answers; on the port it had before, if it had one."""
        before = self.port
        for attempt in range(5):
            if self._process is not None:
                self._process.close(keep_folder=True)
            self.port = before or free_port()
            log_start = self.log.stat().st_size if self.log.exists() else 0
            self._process = Supervised(
                [*run_as(self._user), *self._command(self.port)],
                log=self.log,
                remove=self.folder,
                cwd=self.folder,
                end=self.END,
            )
            wait_until(lambda: self._ended() or self._answers(), 60, f"{self.PROGRAM} answers; see {self.log}")
            if not self._ended():
                return
            text = self.log.read_text(errors="replace")[log_start:]
            if before or "Address already in use" not in text or attempt == 4:
                self.port = before
                raise RuntimeError(f"{self.PROGRAM} ended at once:\n{text}")

    def _ended(self) -> bool:
        assert self._process is not None
        return self._process.poll() is not None

    def stop(self) -> None:
        """An orderly shutdown: clients get an error or a closed socket."""
        # Its supervisor stays until start() or close(), and still removes the folder if this process dies.
        if self._process is not None:
            self.resume()
            self._process.signal(self.STOP)
            self._process.wait(60)

    def kill(self) -> None:
        """SIGKILL: what it has not written is lost, the kernel closes its sockets."""
        if self._process is not None and not self._ended():
            children = self._pause()
            self._signal(signal.SIGKILL, [self._process.pid, *children])
            self._process.wait(60)
            wait_gone(children)

    def restart(self) -> None:
        """`stop()`, then `start()`."""
        self.stop()
        self.start()

    def pause(self) -> None:
        """SIGSTOP: the kernel still accepts connections and bytes, but no answer comes until `resume()`."""
        assert self._process is not None and not self._ended()
        self._pause()

    def _pause(self) -> list[int]:
        # The first process first: after that it starts no other one.
        assert self._process is not None
        pause_process(self._process.pid)
        children = child_pids(self._process.pid)
        for pid in children:
            with contextlib.suppress(ProcessLookupError):  # gone meanwhile
                pause_process(pid)
        return children

    def resume(self) -> None:
        """Ends a `pause()`; does nothing otherwise."""
        assert self._process is not None
        if not self._ended():
            self._signal(signal.SIGCONT, [*child_pids(self._process.pid), self._process.pid])

    @staticmethod
    def _signal(signum: int, pids: list[int]) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):  # gone meanwhile
                os.kill(pid, signum)

    def ensure_running(self) -> None:
        """Undoes whatever a test did to it."""
        self.resume()
        if self._ended():
            self.start()

    def close(self) -> None:
        """Ends it and removes its folder. Idempotent."""
        if self._process is not None:
            self._process.close()
        shutil.rmtree(self.folder, ignore_errors=True)
