"""The reply to one request that has a deadline: held back, so that it can still become a 503."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import OptExcInfo
    from _typeshed.wsgi import StartResponse, WSGIEnvironment


class Reply:
    """Stands between the application and the server's start_response, which it calls when something is to be sent.
    Called twice, once for the application and once for a 503, servers put both header sets on the wire. Lives as long
    as its request.

    `sent` says that the server's start_response has been called.
    """

    def __init__(self, environ: WSGIEnvironment, start_response: StartResponse) -> None:
        self._environ = environ
        self._servers = start_response
        self._head: tuple[Any, ...] | None = None
        self._write: Callable[[bytes], object] | None = None
        self.sent = False

    def start_response(
        self, status: str, headers: list[tuple[str, str]], exc_info: OptExcInfo | None = None, /
    ) -> Callable[[bytes], object]:
        """The application's, with the semantics of PEP 3333."""
        if exc_info is None:
            if self.sent or self._head is not None:
                raise AssertionError("start_response() was called a second time, without exc_info")
            self._head = status, list(headers)
        elif self.sent:
            return self._servers(status, headers, exc_info)  # raises exc_info again if the headers have left
        else:
            self._head = status, list(headers), exc_info
        return self.write

    def write(self, data: bytes) -> None:
        """The application's, too."""
        self.send()
        assert self._write is not None, "write() belongs to a response that was given up"
        self._write(data)

    def send(self) -> None:
        """Call the server's start_response now, unless that was done; a body follows. What the application has not
        started is left for the server to complain of."""
        if self._head is not None:
            head, self._head, self.sent = self._head, None, True
            self._write = self._servers(*head)

    def send_unavailable(self, seconds: float) -> list[bytes]:
        """Start a 503 in place of what was held back, and return its body."""
        text = f"The server could not finish this request within {seconds:g} s. Try again later."
        if _prefers_json(self._environ.get("HTTP_ACCEPT", "")):
            kind, body = "application/json", json.dumps({"error": "deadline exceeded", "message": text}).encode()
        else:
            kind, body = "text/plain; charset=utf-8", f"{text}\n".encode()
        self._head, self.sent = None, True
        headers = [
            ("Content-Type", kind),
            ("Content-Length", str(len(body))),
            # By then the requests that run now are over, finished or not.
            ("Retry-After", str(math.ceil(seconds))),
            ("Cache-Control", "no-store"),
        ]
        self._servers("503 Service Unavailable", headers)
        return [] if self._environ.get("REQUEST_METHOD") == "HEAD" else [body]


def _prefers_json(accept: str) -> bool:
    """Whether the Accept header names JSON, and before any kind of text: a browser's names text/html first."""
    for part in accept.lower().split(","):
        kind = part.partition(";")[0].strip()
        if kind == "application/json" or kind.endswith("+json"):
            return True
        if kind.startswith("text/"):
            return False
    return False
