"""A request that has a deadline: its timer, its reply, held back so that it can still become a 503, and its body."""

from __future__ import annotations

import errno
import json
import logging
import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from dbsession.green import ident
from dbsession.green.deadline import DeadlineExceeded, HubTimer, call_in, numbers, require_gevent
from dbsession.green.hub import here
from dbsession.green.scope import OpenedScope
from dbsession.web.body import ScopedBody

if TYPE_CHECKING:
    from _typeshed import OptExcInfo
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

logger = logging.getLogger("dbsession.wsgi")


class ConnectionCut(ConnectionResetError):
    """Tells a WSGI server, in the words it knows from a client that went away, to drop the connection."""

    def __init__(self, seconds: float) -> None:
        text = f"The request was not over within its deadline of {seconds:g} s [{DeadlineExceeded.code}]"
        super().__init__(errno.ECONNRESET, text)


class RequestTimer:
    """The deadline of one request. Lives until its scope ends, which closes it; it then throws nothing any more.

    Inside `with timer:` code of the application runs, and what is thrown there is DeadlineExceeded. Outside, once
    something was handed to the server, the same greenlet runs the server's code, which sends it: there a
    ConnectionCut is thrown. Where nobody can be thrown at, `late` says that the time is over.

    Written by whoever runs the request, and by the hub of the timer while that one waits or, where a body is read on
    in another thread, between two of its steps: each attribute by one assignment, and read anew in the throwing
    thread.
    """

    __slots__ = (
        "__weakref__",
        "_application",
        "_closed",
        "_target",
        "_target_hub",
        "_timer",
        "late",
        "number",
        "seconds",
    )

    def __init__(self, seconds: float) -> None:
        require_gevent()
        self.seconds = seconds
        self.number = next(numbers)
        self.late = False
        self._closed = False
        self._application = False
        # Weak: a timer keeps no greenlet alive that has died with its request open.
        self._target: weakref.ref[Any] | None = None
        self._target_hub: Any = None
        self._timer = HubTimer(seconds, self._fired)

    def __enter__(self) -> None:
        self._target_hub = here()
        self._target = weakref.ref(ident.current())
        self._application = True

    def __exit__(self, *_: object) -> None:
        self._application = False

    def hold(self) -> None:
        """Throw nothing until the next `with timer:`: neither the application runs, nor is anything being sent."""
        self._target = None

    def check(self) -> None:
        """Raise DeadlineExceeded if the time was over while the application could not be told."""
        if self.late:
            self.late = False
            raise DeadlineExceeded(self.seconds, self.number)

    def covers(self, exceeded: DeadlineExceeded) -> bool:
        """Return whether `exceeded` began with this request or inside it. An older one belongs to somebody outside,
        such as the request that called this one in-process."""
        return exceeded.number >= self.number

    def close(self) -> None:
        """Throw nothing any more, and stop the timer. Never waits; from any greenlet or thread. Idempotent."""
        self._closed = True
        self._target = None
        self._timer.close()

    def _fired(self) -> None:
        if not self._closed:
            self.late = True
            self._throw()

    def _throw(self) -> None:
        """Throw at who runs the request, or is sending its answer. In the Hub."""
        reference, hub = self._target, self._target_hub
        target = reference() if reference is not None else None
        if self._closed or not self.late or target is None or target.dead or hub is None:
            return
        if hub is not here():
            call_in(hub, self._throw)  # a greenlet takes throws from its own thread only
        elif self._application:
            self.late = False
            target.throw(DeadlineExceeded(self.seconds, self.number))
        else:
            target.throw(ConnectionCut(self.seconds))


class Reply:
    """Stands between the application and the server's start_response, which it calls when something is to be sent.
    Called twice, once for the application and once for a 503, servers put both header sets on the wire. Lives as long
    as its request.

    `sent` says that the server's start_response has been called, `failed` that the application's answer is an error.
    """

    def __init__(self, environ: WSGIEnvironment, start_response: StartResponse) -> None:
        self._environ = environ
        self._servers = start_response
        self._head: tuple[Any, ...] | None = None
        self._write: Callable[[bytes], object] | None = None
        self.sent = self.failed = False
        self.may_be_websocket = wants_websocket(environ)

    def start_response(
        self, status: str, headers: list[tuple[str, str]], exc_info: OptExcInfo | None = None, /
    ) -> Callable[[bytes], object]:
        """Take the application's status and headers, as PEP 3333 has it, and keep them until something is sent."""
        # For an error an application drops its work on purpose.
        self.failed = exc_info is not None or status[:1] in ("4", "5")
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
        """Send what was held back, then `data`: the write() that PEP 3333 gives to the application."""
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


def wants_websocket(environ: WSGIEnvironment) -> bool:
    """Whether the client asked for a WebSocket. Where it has got one, the connection speaks HTTP no more, and no server
    or library tells us in the same way whether it has."""
    return "websocket" in environ.get("HTTP_UPGRADE", "").lower() or "wsgi.websocket" in environ


def _prefers_json(accept: str) -> bool:
    """Whether the Accept header names JSON, and before any kind of text: a browser's names text/html first."""
    for part in accept.lower().split(","):
        kind = part.partition(";")[0].strip()
        if kind == "application/json" or kind.endswith("+json"):
            return True
        if kind.startswith("text/"):
            return False
    return False


class TimedRequest:
    """A request with a deadline: its scope, timer and reply. Lives as long as the request."""

    def __init__(self, scope: OpenedScope, timer: RequestTimer, reply: Reply) -> None:
        self.scope = scope
        self.timer = timer
        self.reply = reply

    def give_up(self, exceeded: DeadlineExceeded) -> list[bytes]:
        """End the scope, and start the 503 whose body is returned; or raise ConnectionCut if the application's own
        answer has begun to leave. May switch greenlets."""
        self.scope.failed = True
        self.scope.end()
        if not self.timer.covers(exceeded):
            raise exceeded
        self.report(exceeded.seconds)
        if self.reply.sent or self.reply.may_be_websocket:
            # No DeadlineExceeded: for a BaseException gunicorn writes a 500 into the middle of the stream.
            raise ConnectionCut(exceeded.seconds)
        return self.reply.send_unavailable(exceeded.seconds)

    def report(self, seconds: float) -> None:
        logger.warning("%s was not over within its deadline of %s s; it was ended.", self.scope.label, f"{seconds:g}")


class TimedBody(ScopedBody):
    """A ScopedBody of a request with a deadline."""

    def __init__(self, body: Iterable[bytes], request: TimedRequest) -> None:
        super().__init__(body, request.scope)
        self._request = request
        self._instead: Iterator[bytes] | None = None

    def __next__(self) -> bytes:
        if self._instead is not None:
            return next(self._instead)
        timer, reply = self._request.timer, self._request.reply
        try:
            with timer:
                timer.check()
                chunk = self._next_to_send(reply)
                reply.send()
        except DeadlineExceeded as exceeded:
            self._instead = iter(())
            self._instead = iter(self._request.give_up(exceeded))
            return next(self._instead)
        if chunk is None:
            raise StopIteration
        return chunk

    def _next_to_send(self, reply: Reply) -> bytes | None:
        """The application's next chunk, or None after the last. Empty ones are left out while the reply is held back:
        gunicorn sends the headers with them, too."""
        while True:
            try:
                chunk = super().__next__()
            except StopIteration:
                return None
            if chunk or reply.sent:
                return chunk

    def close(self) -> None:
        if self._closed:
            return
        request = self._request
        try:
            with request.timer:
                super().close()
        except DeadlineExceeded as exceeded:
            if not request.timer.covers(exceeded):
                raise
            request.report(exceeded.seconds)
            raise ConnectionCut(exceeded.seconds) from None
        finally:
            if request.timer.late:  # the server was told, and has come here for that
                request.report(request.timer.seconds)
