"""A real gunicorn on a free loopback port."""

from __future__ import annotations

import http.client
import re
import secrets
import signal
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import pytest

from .processes import Supervised, child_pids, script_env, wait_gone
from .waiting import wait_until

DEMO_CONFIG = Path(__file__).resolve().parents[2] / "deploy" / "gunicorn.conf.py"

# Arguments of gunicorn, for tests where --preload is another way and not another subject.
PRELOAD = [pytest.param([], id="no preload"), pytest.param(["--preload"], id="preload", marks=pytest.mark.slow)]


class Response(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()


def takes_signals(pid: int) -> bool:
    """Whether this worker of gunicorn has replaced its master's signal handlers by its own.

    A SIGTERM before that is lost, and the master waits out its graceful_timeout. Only the master catches
    SIGHUP.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    caught = re.search(r"^SigCgt:\s*([0-9a-f]+)", status, re.M)
    return caught is not None and not int(caught[1], 16) >> (signal.SIGHUP - 1) & 1


class Gunicorn:
    """A context manager: inside it the server answers; at its end the master and its workers are gone.

    Args:
        app: "module:name", as on gunicorn's command line; importable from `cwd`.
        *arguments: further command line settings, such as "--preload", "--workers=2".
        config: a gunicorn configuration file.
        cwd: its working directory, the temporary one by default.
        env: added to the environment (see `processes.script_env`).
        workers: how many, all of which have to be up at the start; None: as `config` says, one has to be.
        ready: a path that has to answer, whatever the status, before the server counts as started; without
            one the application may still be loading, or failing to load, when the `with` begins.
        start_s, stop_s: seconds it may take to start and to end.
    """

    def __init__(
        self,
        app: str,
        *arguments: str,
        config: Path | None = None,
        cwd: Path | None = None,
        env: dict[str, str] | None = None,
        workers: int | None = 1,
        ready: str | None = None,
        start_s: float = 60.0,
        stop_s: float = 40.0,  # more than gunicorn's own graceful_timeout
    ) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="dbs-"))
        self.log = self._folder / "log"
        # The port of the bind is the kernel's choice, so none can be taken meanwhile; the log tells it.
        self._command = [sys.executable, "-m", "gunicorn", "--bind=127.0.0.1:0", "--log-level=info"]
        # Its control socket would be in the user's home, the same one for every test.
        self._command += ["--no-control-socket"]
        # By its name gunicorn finds, and ends, the dirty arbiter that an earlier one of this machine has left behind.
        self._command.append(f"--name={secrets.token_hex(8)}")
        if config:
            self._command.append(f"--config={config}")
        if workers:
            self._command.append(f"--workers={workers}")
        self._command += [*arguments, app]
        self._cwd, self._env = cwd or self._folder, script_env(env)
        self._env.pop("GUNICORN_CMD_ARGS", None)
        self._workers, self._ready = workers or 1, ready
        self._start_s, self._stop_s = start_s, stop_s
        self.port = 0

    def __enter__(self) -> Gunicorn:
        self._process = Supervised(self._command, log=self.log, remove=self._folder, env=self._env, cwd=self._cwd)
        self.pid = self._process.pid
        try:
            wait_until(self._started, self._start_s, "gunicorn answers")
        except BaseException as error:
            error.add_note(f"gunicorn's log:\n{self.logs()}")
            self._process.close()
            raise
        return self

    def _started(self) -> bool:
        status = self._process.poll()
        if status is not None:
            raise RuntimeError(f"gunicorn ended with status {status}")
        found = re.search(r"Listening at: http://127\.0\.0\.1:(\d+) ", self.logs())
        workers = self.worker_pids()
        if not found or sum(map(takes_signals, workers)) < self._workers:  # a dirty arbiter keeps the SIGHUP
            return False
        self.port = int(found[1])
        if self._ready is None:
            return True
        try:
            self.get(self._ready, timeout_s=20)
        except (OSError, http.client.HTTPException):
            return False
        return True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        workers = self.worker_pids()
        try:
            if self._process.poll() is None:
                self.term()
                self._process.wait(self._stop_s)
            wait_gone(workers, self._stop_s)
        except AssertionError as late:
            if error is None:
                late.add_note(f"gunicorn's log:\n{self.logs()}")
                raise
        finally:
            if error is not None:
                error.add_note(f"gunicorn's log:\n{self.logs()}")
            self._process.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(
        self,
        path: str,
        *,
        method: str = "GET",
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
        timeout_s: float = 30.0,
    ) -> Response:
        """One request on a connection of its own, closed at the end; use `connect()` for keep-alive."""
        connection = self.connect(timeout_s)
        try:
            connection.request(method, path, body, {"Connection": "close", **(headers or {})})
            response = connection.getresponse()
            return Response(response.status, response.headers, response.read())
        finally:
            connection.close()

    def connect(self, timeout_s: float = 30.0) -> http.client.HTTPConnection:
        """An HTTP/1.1 connection, kept alive between requests; the caller closes it."""
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)

    def logs(self) -> str:
        """All it has written so far, its access log too if that goes to "-"."""
        return self.log.read_text(errors="replace")

    def worker_pids(self) -> list[int]:
        """Of the workers that run now, by number: mostly the order of their age, but numbers begin anew some time."""
        return sorted(child_pids(self.pid))

    def term(self) -> None:
        """SIGTERM to the master: a graceful end, which the end of the `with` waits for."""
        self._process.signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to the master; the workers see that it is gone and end."""
        self._process.signal(signal.SIGKILL)
        self._process.wait(30)

    def wait(self, timeout_s: float = 30.0) -> int:
        """The master's exit status, once it has ended."""
        return self._process.wait(timeout_s)


def serve_probe(url: str, *arguments: str, config: Path = DEMO_CONFIG, workers: int = 2, **env: str) -> Gunicorn:
    """`support.probe_app` on the database at `url`, with gevent workers."""
    return Gunicorn(
        "support.probe_app:wrapped",
        "--worker-class=gevent",
        "--graceful-timeout=5",
        *arguments,
        config=config,
        workers=workers,
        env={"DBSESSION_URL": url, **env},
        ready="/state",
    )
