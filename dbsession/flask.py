"""For Flask (extra `flask`): `init_app(app)`.

Sessions end in a wrapper round `app.wsgi_app` and not in Flask's own hooks: `after_request` is skipped when the view
raises a BaseException (a kill, a gevent.Timeout) or when another after_request function fails, and all of Flask's
hooks have run before the body is streamed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from flask import Flask, g, request
from flask.signals import appcontext_pushed
from flask.wrappers import Response
from werkzeug.exceptions import HTTPException
from werkzeug.wsgi import ClosingIterator

from dbsession.green import api, scope
from dbsession.web.wsgi import DBSessionMiddleware


def init_app(app: Flask) -> None:
    """Give `app` its sessions. For an application factory, too; a second call for the same app does nothing.

    Configures the databases from `app.config["DBSESSION_DATABASES"]`, if that is set (the configuration is the
    process's: the last app that sets it wins); wraps `app.wsgi_app`, so that each request has a scope until its body
    is closed, with the deadline `app.config["DBSESSION_DEADLINE_S"]` if that is set; and gives each app context outside
    a request (`flask shell`, CLI commands, tests) a scope of its own, which ends with the context. So has each app
    context in a request that serves a WebSocket or Socket.IO: an event handler of Flask-SocketIO's, say. Of a complete
    response (`response.is_sequence`, a page made from an HTTPException, an answer without a body) the sessions are
    closed before a slow client reads it.

    Raises:
        ConfigError: [DBS-CONFIG].
        TypeError: `app` is no Flask application.
    """
    given: object = app
    if not isinstance(given, Flask):
        what = "the class Flask" if isinstance(given, type) else f"a {type(given).__qualname__}"
        raise TypeError(f"init_app() was given {what}: give the Flask application, init_app(app).")
    if "dbsession" in app.extensions:
        return
    databases = app.config.get("DBSESSION_DATABASES")
    if databases is not None:
        api.configure(databases)
    app.extensions["dbsession"] = api.manager
    app.wsgi_app = DBSessionMiddleware(app.wsgi_app, app.config.get("DBSESSION_DEADLINE_S"))  # type: ignore[method-assign]  # Flask's documented place
    # These two on the app and not by signals: `request_finished` is not sent when an after_request function fails.
    app.make_response = _pages_are_complete(app.make_response)  # type: ignore[method-assign, assignment]
    app.finalize_request = _completeness_noted(app.finalize_request)  # type: ignore[method-assign]
    appcontext_pushed.connect(_context_pushed, app)
    app.teardown_appcontext(_context_popped)


def _pages_are_complete(make_response: Callable[[Any], Response]) -> Callable[[Any], Response]:
    """Return what is called in place of `app.make_response`: a page made from an HTTPException has a list for its body.
    Werkzeug runs the exception as a WSGI application, and what comes out of that looks like a stream."""

    @functools.wraps(make_response)
    def made(rv: Any) -> Response:
        response = make_response(rv)
        page = rv[0] if isinstance(rv, tuple) and rv else rv
        # `abort(response)`: it may be a stream.
        if isinstance(page, HTTPException) and (page.response is None or getattr(page.response, "is_sequence", False)):
            response.make_sequence()
        return response

    return made


def _completeness_noted(finalize_request: Callable[..., Response]) -> Callable[..., Response]:
    """Return what is called in place of `app.finalize_request`, whose result is what the app returns: after the last
    after_request function, any of which may put another response in its place."""

    @functools.wraps(finalize_request)
    def finalized(*arguments: Any, **more: Any) -> Response:
        response = finalize_request(*arguments, **more)
        environ, status = request.environ, response.status_code
        without_body = environ["REQUEST_METHOD"] == "HEAD" or 100 <= status < 200 or status in (204, 304)
        # The class is that of the body which Werkzeug makes; a wrapper that somebody puts round it may run code of its
        # own.
        complete = ClosingIterator if response.is_sequence or without_body else None
        scope_of_it: Any = environ.get("dbsession.scope")
        if scope_of_it is not None:  # and not by the environ: Flask-SocketIO, for one, gives Flask a copy
            scope_of_it.complete = complete
            scope_of_it.failed = status >= 400  # for which a view drops its work on purpose
        return response

    return finalized


def _context_pushed(_: Flask, **__: Any) -> None:
    current = scope.current()
    # A context may be pushed again (`with context:` inside itself); it is popped for good only once.
    if (current is None or current.kind != "request" or current.is_socket) and "_dbsession_scope" not in g:
        inside = current if current is not None and current.kind == "request" else None
        opened = scope.session_scope("a Flask app context" if inside is None else f"an event of {inside.label}")
        opened.__enter__()
        g._dbsession_scope = opened


def _context_popped(error: BaseException | None) -> None:
    opened = g.pop("_dbsession_scope", None)
    if opened is not None:
        opened.__exit__(error and type(error), error, None)
