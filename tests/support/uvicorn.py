"""A real uvicorn on a free loopback port."""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

from .gunicorn import Gunicorn
from .processes import script_env


class Uvicorn(Gunicorn):
    """A context manager, as `Gunicorn`, with the same methods; one process, which serves by itself.

    Args:
        app: "module:name".
        *arguments: further command line settings, such as "--loop=uvloop".
        env: added to the environment.
    """

    def __init__(self, app: str, *arguments: str, env: dict[str, str] | None = None) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="dbs-"))
        self.log = self._folder / "log"
        self._command = [sys.executable, "-m", "uvicorn", "--host=127.0.0.1", "--port=0", "--no-use-colors"]
        self._command += [*arguments, app]
        self._cwd, self._env = self._folder, script_env(env)
        self._start_s, self._stop_s = 60.0, 40.0
        self.port = 0

    def _started(self) -> bool:
        status = self._process.poll()
        if status is not None:
            raise RuntimeError(f"uvicorn ended with status {status}")
        found = re.search(r"Uvicorn running on http://127\.0\.0\.1:(\d+) ", self.logs())
        if found:
            self.port = int(found[1])
        return found is not None
