"""A real `dbsession dashboard` on a free loopback port or on its socket, and a real browser."""

from __future__ import annotations

import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from playwright.sync_api import Browser, sync_playwright

from .processes import Supervised, missing, script_env
from .waiting import wait_until


class Dashboard:
    """A context manager: inside it the page is served; at its end the process is gone.

    Args:
        folder: the workers' sockets.
        where: its own options; by default any port that is free.
    """

    def __init__(self, folder: Path, where: str = "--port=0") -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="dbs-"))
        self.log = self._folder / "log"
        self._command = [sys.executable, "-m", "dbsession", "dashboard", f"--folder={folder}", where]
        self._env = script_env({})

    def __enter__(self) -> Dashboard:
        self._process = Supervised(self._command, log=self.log, remove=self._folder, env=self._env)
        try:
            self.url = wait_until(self._said, 60, "the dashboard says where it is")
        except BaseException as error:
            error.add_note(self.logs())
            self._process.close()
            raise
        return self

    def _said(self) -> str | None:
        status = self._process.poll()
        if status is not None:
            raise RuntimeError(f"the dashboard ended with status {status}")
        found = re.search(r"is at (\S+) ", self.logs())
        return found[1] if found else None

    def end(self) -> int:
        """SIGTERM; its exit status."""
        self._process.signal(signal.SIGTERM)
        return self._process.wait(30)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            error.add_note(f"the dashboard's output:\n{self.logs()}")
        self._process.close()

    def logs(self) -> str:
        """All it has written so far."""
        return self.log.read_text(errors="replace")


@contextmanager
def chromium() -> Iterator[Browser]:
    """Debian's Chromium, without a window."""
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        missing("needs Chromium (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)
        try:
            yield browser
        finally:
            browser.close()
