"""A real uvicorn on a free loopback port."""

from __future__ import annotations

import re
import signal
import sys
import tempfile
from pathlib import Path

from .processes import Supervised, script_env
from .waiting import wait_until


class Uvicorn:
    """A context manager: inside it the server answers; at its end it is gone, and warnings in it were errors.

    Args:
        app: "module:name", importable from `cwd`.
        *arguments: further command line settings, such as "--loop=uvloop".
        cwd: its working directory.
        env: added to the environment (see `processes.script_env`).
        stop_s: seconds it may take to end by SIGTERM.
    """

    def __init__(
        self, app: str, *arguments: str, cwd: Path, env: dict[str, str] | None = None, stop_s: float = 40.0
    ) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="dbs-"))
        self._log = self._folder / "log"
        # Port 0 is the kernel's choice, so none can be taken meanwhile; the log tells it.
        self._command = [sys.executable, "-W", "error", "-m", "uvicorn", "--port=0", "--no-access-log"]
        self._command += [f"--app-dir={cwd}", *arguments, app]
        self._cwd, self._env, self._stop_s = cwd, script_env(env), stop_s
        self.port = 0

    def __enter__(self) -> Uvicorn:
        self._process = Supervised(self._command, log=self._log, remove=self._folder, env=self._env, cwd=self._cwd)
        try:
            wait_until(self._started, 30, "uvicorn answers")
        except BaseException as error:
            self._give_up(error)
            raise
        return self

    def _started(self) -> bool:
        status = self._process.poll()
        assert status is None, f"uvicorn ended with status {status}"
        found = re.search(r"Uvicorn running on http://127\.0\.0\.1:(\d+)", self.logs())
        if found:
            self.port = int(found[1])
        return bool(found)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            self._process.signal(signal.SIGTERM)
            self._process.wait(self._stop_s)
        except AssertionError as late:
            error = error or late
            raise
        finally:
            self._give_up(error)

    def _give_up(self, error: BaseException | None) -> None:
        if error is not None:
            error.add_note(f"uvicorn's log:\n{self.logs()}")
        self._process.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def logs(self) -> str:
        """All it has written so far."""
        return self._log.read_text(errors="replace")
