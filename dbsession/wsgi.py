"""DBSessionMiddleware: one scope for each request, until the response's body is closed (PEP 3333)."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from dbsession.errors import describe
from dbsession.hub import run_aside
from dbsession.scope import Scope, begin_request, running

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

logger = logging.getLogger(__name__)


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
        there and only the empty scope stays, so that a slow reader holds no connection.

    Put it outermost, so that nothing of the application runs outside it. Teardown never changes a response already
    made; only a kill or timeout that lands in it is raised. Switches greenlets in teardown.

    Args:
        app: the WSGI application.
    """

    def __init__(self, app: WSGIApplication) -> None:
        self.app = app

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        label = f"{environ.get('REQUEST_METHOD', '?')} {environ.get('SCRIPT_NAME', '')}{environ.get('PATH_INFO', '')}"
        # A client may send any character; a line end in a label would forge a log line.
        scope = begin_request(label if label.isprintable() else ascii(label))
        environ["dbsession.scope"] = scope
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
        scope.park()
        wrapped = ScopedBody(body, scope)
        if environ.get("dbsession.body_complete"):
            scope.clear()
        return wrapped


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

    def __iter__(self) -> ScopedBody:
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
            run_aside(lambda: _end_dropped(body, scope), scope.home)


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
