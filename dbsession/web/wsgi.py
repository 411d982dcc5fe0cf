"""DBSessionMiddleware: one scope for each request, until the response's body is closed (PEP 3333)."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from dbsession.core.config import positive_seconds
from dbsession.errors import describe, plain
from dbsession.green.deadline import ConnectionCut, DeadlineExceeded, RequestTimer, require_gevent
from dbsession.green.hub import run_aside
from dbsession.green.scope import Scope, begin_request, running
from dbsession.web.reply import Reply

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

logger = logging.getLogger("dbsession.wsgi")


class DBSessionMiddleware:
    """Wraps a WSGI application. Lives as long as it; each request has a scope of its own, found in
    `environ["dbsession.scope"]`, which is current wherever the application's code for that request runs.

    The scope ends, and its sessions are closed,
      - when `app()` raises;
      - at the return, if the body is a list or tuple (it is complete; servers look at its length),
        the server's `wsgi.file_wrapper`, or nothing that can be iterated (gunicorn's ALREADY_HANDLED); these are
        passed on as they are;
      - else at the body's `close()`, from whichever greenlet or thread the server calls it, or when the body is
        garbage collected. If `environ["dbsession.body_complete"]` is true at the return, the sessions are closed
        there and only the empty scope stays, so that a slow reader holds no connection. If it is the body's very
        class, that says, too, that nothing of the application runs while the body is read.

    Put it outermost, so that nothing of the application runs outside it. Teardown never changes a response already
    made; only a kill or timeout that lands in it is raised. Switches greenlets in teardown.

    With a deadline, a request that is not over in time is ended, wherever it waits: DeadlineExceeded is thrown into
    the application's code, a ConnectionResetError into the server's when that is sending to a slow reader. The scope
    is torn down; then the client gets a 503, or if anything has left already, its connection is cut. So nothing is
    handed to the server before the first chunk that is not empty. A DeadlineExceeded of a `deadline()` inside the
    application becomes a 503 in the same way, unless the application handles it. The deadline ends with the scope: a
    list may be sent for as long as that takes.

    Args:
        app: the WSGI application.
        deadline: seconds that a request may take; None: as long as it likes. Needs gevent.

    Raises:
        ConfigError: [DBS-CONFIG] the deadline is no number above 0; at a request: gevent does not run here.
    """

    def __init__(self, app: WSGIApplication, deadline: float | None = None) -> None:
        self.app = app
        self._deadline = deadline
        if deadline is not None:
            self._deadline = positive_seconds(deadline, "The middleware's `deadline`")
            _with_deadline.add(self)

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        label = f"{environ.get('REQUEST_METHOD', '?')} {environ.get('SCRIPT_NAME', '')}{environ.get('PATH_INFO', '')}"
        # A client may send any character; a line end in a label would forge a log line.
        scope = begin_request(plain(label))
        environ["dbsession.scope"] = scope
        if self._deadline is not None:
            return self._call_in_time(environ, start_response, scope, self._deadline)
        try:
            with running(scope):
                body = self.app(environ, start_response)
        except BaseException:
            scope.end()
            raise
        if _complete(body, environ.get("wsgi.file_wrapper")):
            try:
                scope.end()
            except BaseException:  # a kill: the server never gets the body, so nobody else would close it
                _close(body)
                raise
            return body
        complete = environ.get("dbsession.body_complete")
        wrapped = ReadyBody(body, scope) if complete is type(body) else ScopedBody(body, scope)
        if not isinstance(wrapped, ReadyBody):
            scope.park()
        if complete:
            scope.clear()
        return wrapped

    def _call_in_time(
        self, environ: WSGIEnvironment, start_response: StartResponse, scope: Scope, seconds: float
    ) -> Iterable[bytes]:
        try:
            timer = scope.timer = RequestTimer(seconds)
            request = TimedRequest(scope, timer, Reply(environ, start_response))
            with running(scope), timer:
                body = self.app(environ, request.reply.start_response)
        except DeadlineExceeded as exceeded:
            return request.give_up(exceeded)
        except BaseException:
            scope.end()
            raise
        if _complete(body, environ.get("wsgi.file_wrapper")):
            try:
                scope.end()
                request.reply.send()
            except BaseException:
                _close(body)
                raise
            return body
        timer.hold()
        scope.park()
        wrapped = TimedBody(body, request)
        if environ.get("dbsession.body_complete"):
            timer.close()  # as for a list: it may be sent for as long as that takes
            scope.clear()
        return wrapped


_with_deadline: weakref.WeakSet[DBSessionMiddleware] = weakref.WeakSet()


def check_deadlines() -> None:
    """Raise ConfigError if an application was wrapped with a deadline that this process cannot keep. Not asked when
    it is wrapped: under `gunicorn --preload` that is before anything is patched."""
    if _with_deadline:
        require_gevent()


def _complete(body: object, file_wrapper: object) -> bool:
    """Whether nothing of the application runs any more once it has returned `body`."""
    if isinstance(body, (list, tuple)):
        return True
    if isinstance(file_wrapper, type) and isinstance(body, file_wrapper):
        return True
    return not hasattr(body, "__iter__") and not hasattr(body, "__getitem__")


class ScopedBody:
    """A response body read inside its request's scope. Lives until `close()`, or until it is garbage collected."""

    def __init__(self, body: Iterable[bytes], scope: Scope) -> None:
        self._body = body
        self._scope = scope
        self._iterator: Iterator[bytes] | None = None
        self._closed = False

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        # While it is read it is nobody's abandoned request; then it is parked where it was read last.
        self._scope.unpark()
        try:
            with running(self._scope):
                if self._iterator is None:
                    self._iterator = iter(self._body)
                return next(self._iterator)
        finally:
            if not self._scope.ended:
                self._scope.park()

    def close(self) -> None:
        """Close the application's body, then every session. May switch greenlets."""
        if self._closed:
            return
        self._closed = True
        _end(self._body, self._scope)

    def __del__(self) -> None:
        # The server dropped it. Closing may wait, and this may be the Hub or somebody else's request.
        if not getattr(self, "_closed", True):
            self._closed = True
            body, scope = self._body, self._scope
            if scope.timer is not None:
                scope.timer.close()
            run_aside(lambda: _end_dropped(body, scope), scope.home)


class ReadyBody(ScopedBody):
    """A body in which nothing of the application runs but its `close()`."""

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._body)


class TimedRequest:
    """What a request with a deadline consists of. Lives as long as it."""

    def __init__(self, scope: Scope, timer: RequestTimer, reply: Reply) -> None:
        self.scope = scope
        self.timer = timer
        self.reply = reply

    def give_up(self, exceeded: DeadlineExceeded) -> list[bytes]:
        """End the scope, and start the 503 whose body is returned; or raise ConnectionCut if the application's own
        answer has begun to leave. May switch greenlets."""
        self.scope.end()
        if not self.timer.covers(exceeded):
            raise exceeded
        self.report(exceeded.seconds)
        if self.reply.sent:
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


def _end(body: Any, scope: Scope) -> None:
    try:
        with running(scope):
            _close(body)
    finally:
        scope.end()


def _end_dropped(body: Any, scope: Scope) -> None:
    try:
        _end(body, scope)
    except Exception as error:  # nobody is there to be told; a Flask context cannot be left in another greenlet, say
        logger.warning("%s: its body was dropped by the server and failed to close: %s.", scope.label, describe(error))


def _close(body: Any) -> None:
    if hasattr(body, "close"):
        body.close()
