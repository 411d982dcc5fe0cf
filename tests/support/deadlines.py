"""For the tests of deadlines in this process: what waits, what must not fire, and a server of the test's own.

pytest's process is not patched, but its main thread has a hub once it has waited with gevent: enough for both. That a
timer is stopped is shown without sleeping: one that began later, and is over later, is the one that fires.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from wsgiref.util import setup_testing_defaults

import gevent
import pytest
from gevent.event import Event
from sqlalchemy import text

from dbsession import DBSessionMiddleware, DeadlineExceeded, SessionManager, deadline

SOON, LATER, LONG = 0.05, 0.2, 60
NO_SECONDS = [0, -1, -0.5, float("nan"), float("inf"), "5", True, b"1", [1]]


def manager_of(folder: Path) -> SessionManager:
    options = {"pool_size": 2, "pool_timeout": 30}
    return SessionManager({"default": {"url": f"sqlite:///{folder}/a.db", "options": options}})


def wait() -> None:
    """What an application does that never ends by itself."""
    Event().wait(LONG)  # a hub without any timer would not wait at all
    raise AssertionError("unreachable")


def nothing_else_fires() -> None:
    """Fails with the earlier deadline's error if that one is still running."""
    with pytest.raises(DeadlineExceeded) as caught, deadline(LATER):
        wait()
    assert caught.value.seconds == LATER


def run_thread(function: Callable[[], Any]) -> Any:
    """Its result. The caller's hub runs meanwhile."""
    return gevent.get_hub().threadpool.apply(function)


def run_plain_thread(function: Callable[[], object]) -> BaseException | None:
    """Its error, or None; in a thread without a hub, while this one stands still."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(30)
    return errors[0] if errors else None


def environ_of(method: str = "GET", path: str = "/orders/7", **more: Any) -> dict[str, Any]:
    environ: dict[str, Any] = {
        "REQUEST_METHOD": method,
        "PATH_INFO": path,
        "SCRIPT_NAME": "",
        "QUERY_STRING": "secret=1",
    }
    setup_testing_defaults(environ)
    return environ | more


class Server:
    """Calls a wrapped application once, and remembers what it was told."""

    def __init__(
        self,
        app: Any,
        seconds: float | None = SOON,
        environ: dict[str, Any] | None = None,
        around: Callable[[Any], Any] = lambda app: app,
    ) -> None:
        self.starts: list[tuple[str, dict[str, str], bool]] = []
        self.written: list[bytes] = []
        self.environ = environ or environ_of()
        self.body = around(DBSessionMiddleware(app, deadline=seconds))(self.environ, self.start_response)

    def start_response(self, status: str, headers: Any, exc_info: Any = None) -> Callable[[bytes], None]:
        if exc_info is not None and self.written:
            raise exc_info[1]
        self.starts.append((status, dict(headers), exc_info is not None))
        return self.written.append

    @property
    def status(self) -> str:
        assert len(self.starts) == 1, self.starts
        return self.starts[0][0]

    def read(self) -> bytes:
        try:
            return b"".join(self.body)
        finally:
            if hasattr(self.body, "close"):
                self.body.close()


def query(manager: SessionManager) -> bytes:
    return str(manager.get().scalar(text("SELECT 1"))).encode()


def in_use(manager: SessionManager) -> int:
    """How many connections the pool has given out."""
    return int(manager.engine().pool.checkedout())


def plain(body: Callable[[], Any]) -> Any:
    """An application that answers with `body()`."""

    def app(environ: dict[str, Any], start_response: Any) -> Any:
        start_response("200 OK", [("Content-Type", "text/plain")])
        return body()

    return app
