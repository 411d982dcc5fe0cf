"""DBSessionMiddleware: one scope for each request, until the response's body is closed (PEP 3333)."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from dbsession.core.config import positive_seconds
from dbsession.core.functions import is_async
from dbsession.errors import plain
from dbsession.green import ident, scope
from dbsession.green.deadline import DeadlineExceeded, require_gevent
from dbsession.green.scope import OpenedScope
from dbsession.web.body import ReadyBody, ScopedBody, close_body
from dbsession.web.request_deadline import Reply, RequestTimer, TimedBody, TimedRequest, wants_websocket

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

logger = logging.getLogger("dbsession.scope")

Deadline = float | Callable[["WSGIEnvironment"], float | None] | None


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
        deadline: seconds that a request may take; None: as long as it likes. Or a function that gets the environ and
            returns one of the two: `lambda environ: None if environ["PATH_INFO"] == "/ws" else 30`. Needs gevent.

    Raises:
        ConfigError: [DBS-CONFIG] the deadline is no number above 0 and no function; at a request: it gave no such
            number, or gevent does not run here.
        TypeError: `app` is no WSGI application.
    """

    def __init__(self, app: WSGIApplication, deadline: Deadline = None) -> None:
        if not callable(app):
            raise TypeError(f"DBSessionMiddleware wraps a WSGI application, and was given a {type(app).__qualname__}.")
        if is_async(app):
            raise TypeError("DBSessionMiddleware was given an ASGI application: wrap it in dbsession.aio's.")
        self.app = app
        self._deadline = deadline
        if deadline is not None:
            if not callable(deadline):
                self._deadline = positive_seconds(deadline, "The middleware's `deadline`")
            _with_deadline.add(self)

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        label = f"{environ.get('REQUEST_METHOD', '?')} {environ.get('SCRIPT_NAME', '')}{environ.get('PATH_INFO', '')}"
        if not label.isprintable():  # a client may send any character; a line end in a label would forge a log line
            label = plain(label)
        if getattr(ident.current(), "_dbsession_parked", None):
            _end_abandoned(label)
        current = environ["dbsession.scope"] = scope.begin_request(label)
        if "HTTP_UPGRADE" in environ or "EIO=" in environ.get("QUERY_STRING", ""):
            current.is_socket = is_socket(environ)
        if self._deadline is not None:
            seconds = self._seconds(self._deadline, environ, current)
            if seconds is not None:
                return self._call_in_time(environ, start_response, current, seconds)
        try:
            body = self.app(environ, start_response)
            ready = _is_ready(body, environ.get("wsgi.file_wrapper"))
        except BaseException:
            current.failed = True
            current.leave()
            raise
        if ready:
            try:
                current.leave()
            except BaseException:  # a kill: the server never gets the body, so nobody else would close it
                close_body(body)
                raise
            return body
        complete = environ.get("dbsession.body_complete") or current.complete
        if complete is type(body):
            current.suspend()
            wrapped: ScopedBody = ReadyBody(body, current)
        else:
            current.suspend(park=True)
            wrapped = ScopedBody(body, current)
        if complete:
            current.complete = True
            current.clear()
        return wrapped

    @staticmethod
    def _seconds(deadline: Any, environ: WSGIEnvironment, current: OpenedScope) -> float | None:
        """Return this request's deadline."""
        if not callable(deadline):
            return float(deadline)
        try:
            seconds = deadline(environ)
            return None if seconds is None else positive_seconds(seconds, "What the middleware's `deadline` returns")
        except BaseException:
            current.leave()
            raise

    def _call_in_time(
        self, environ: WSGIEnvironment, start_response: StartResponse, current: OpenedScope, seconds: float
    ) -> Iterable[bytes]:
        try:
            try:
                timer = current.timer = RequestTimer(seconds)
                request = TimedRequest(current, timer, Reply(environ, start_response))
                with timer:
                    body = self.app(environ, request.reply.start_response)
            finally:
                current.suspend()
        except DeadlineExceeded as exceeded:
            return request.give_up(exceeded)
        except BaseException:
            current.failed = True
            current.end()
            raise
        current.failed = request.reply.failed
        if _is_ready(body, environ.get("wsgi.file_wrapper")):
            try:
                current.end()
                request.reply.send()
            except BaseException:
                close_body(body)
                raise
            return body
        timer.hold()
        current.park()
        wrapped = TimedBody(body, request)
        if environ.get("dbsession.body_complete") or current.complete:
            timer.close()  # as for a list: it may be sent for as long as that takes
            current.complete = True
            current.clear()
        return wrapped


_with_deadline: weakref.WeakSet[DBSessionMiddleware] = weakref.WeakSet()


def check_deadlines() -> None:
    """Raise ConfigError if an application was wrapped with a deadline that this process cannot keep. Not asked when
    it is wrapped: under `gunicorn --preload` that is before anything is patched."""
    if _with_deadline:
        require_gevent()


def is_socket(environ: WSGIEnvironment) -> bool:
    """Whether the request is one in which events come as long as a client is connected: a WebSocket, or Engine.IO's
    polling (Socket.IO), whose query names protocol and transport."""
    query = environ.get("QUERY_STRING", "")
    return wants_websocket(environ) or ("EIO=" in query and "transport=" in query)


def _is_ready(body: object, file_wrapper: object) -> bool:
    """Whether nothing of the application runs any more once it has returned `body`."""
    if isinstance(body, (list, tuple)):
        return True
    if isinstance(file_wrapper, type) and isinstance(body, file_wrapper):
        return True
    return not hasattr(body, "__iter__") and not hasattr(body, "__getitem__")


def _end_abandoned(label: str) -> None:
    """End the requests that were suspended on the calling ident: as the request `label` starts here and none is
    running, the server has abandoned them, though PEP 3333 obliges it to call close(). May switch greenlets."""
    if any(each.kind == "request" and not each.ended for each in scope.stack_here()):
        return  # one that calls another in-process
    for reference in list(ident.current()._dbsession_parked):
        abandoned: OpenedScope | None = reference()
        if abandoned is not None and not abandoned.ended:
            if abandoned.sessions:  # else nothing was lost: a test client, say, whose answers nobody closes
                logger.warning(
                    "%s never had close() called on its body by the server; its sessions are closed now, as %s starts.",
                    abandoned.label,
                    label,
                )
            abandoned.failed = True  # what it drops was not dropped by the application
            abandoned.end()
