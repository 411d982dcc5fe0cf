"""For Flask (extra `flask`): `init_app(app)`.

Sessions end in a wrapper round `app.wsgi_app` and not in Flask's own hooks: `after_request` is skipped when the view
raises a BaseException (a kill, a gevent.Timeout) or when another after_request function fails, and all of Flask's
hooks have run before the body is streamed.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from flask import Flask, g, request
from flask.globals import app_ctx
from flask.signals import appcontext_pushed
from flask.wrappers import Response
from werkzeug.exceptions import HTTPException
from werkzeug.wsgi import ClosingIterator

from dbsession.core import sources
from dbsession.core.config import DatabaseConfig, shown
from dbsession.errors import ConfigError, did_you_mean
from dbsession.green import api, scope
from dbsession.green.block import session_scope
from dbsession.web.wsgi import DBSessionMiddleware

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

logger = logging.getLogger("dbsession.manager")

KEYS = "DBSESSION_DATABASES", "DBSESSION_DEADLINE_S"
"""What is read of `app.config`."""


def init_app(app: Flask) -> None:
    """Give `app` its sessions. For an application factory, too; a second call for the same app does nothing.

    Configures the databases from `app.config["DBSESSION_DATABASES"]`, if that is set. The configuration is the
    process's, so the last app that sets it wins: an earlier app whose names lead elsewhere since then gets a
    ConfigError at its next request or app context.

    Wraps `app.wsgi_app`, so that each request has a scope until its body is closed, with the deadline
    `app.config["DBSESSION_DEADLINE_S"]` if that is set. Gives each app context outside a request (`flask shell`, CLI
    commands, tests) a scope of its own, which ends with the context. So has each app context in a request that serves
    a WebSocket or Socket.IO: an event handler of Flask-SocketIO's, say. Of a complete response
    (`response.is_sequence`, a page made from an HTTPException, an answer without a body) the sessions are closed
    before a slow client reads it.

    Raises:
        ConfigError: [DBS-CONFIG] the databases or the deadline cannot be used; a key of `app.config` looks like one of
            these and is not; a second call for the same app finds other databases or another deadline.
        TypeError: `app` is no Flask application.
    """
    given: object = app
    if not isinstance(given, Flask):
        what = "the class Flask" if isinstance(given, type) else f"a {type(given).__qualname__}"
        raise TypeError(f"init_app() was given {what}: give the Flask application, init_app(app).")
    _refuse_unknown_keys(app)
    databases, deadline = (app.config.get(key) for key in KEYS)
    asked = None if databases is None else sources.source_of(databases)
    earlier = app.extensions.get("dbsession_given")
    if earlier is not None:
        earlier.refuse_others(asked, deadline)
        return
    given = _Given(app.name, asked, deadline)
    wrapped = _Wrapper(app.wsgi_app, given)
    if asked is not None:
        given.configure(databases)
    app.extensions["dbsession"], app.extensions["dbsession_given"] = api.manager, given
    app.wsgi_app = wrapped  # type: ignore[method-assign]  # Flask's documented place
    # These two on the app and not by signals: `request_finished` is not sent when an after_request function fails.
    app.make_response = _pages_are_complete(app.make_response)  # type: ignore[method-assign, assignment]
    app.finalize_request = _completeness_noted(app.finalize_request)  # type: ignore[method-assign]
    appcontext_pushed.connect(_context_pushed, app)
    app.teardown_appcontext(_context_popped)


def _refuse_unknown_keys(app: Flask) -> None:
    """Raise ConfigError if a key of `app.config` looks like one of ours and is not."""
    for key in app.config:
        if key in KEYS or not isinstance(key, str) or "DB" not in key.upper():
            continue
        meant = did_you_mean(key, KEYS, likeness=0.85)
        if not meant and (not key.upper().startswith("DBSESSION_") or key in os.environ):
            continue  # somebody else's; or a variable that is read of the environment, which was copied
        if not meant and key.upper().endswith("_URL"):
            meant = f" A URL belongs into {KEYS[0]}, such as {{'default': url}}."
        raise ConfigError(
            f"app.config of the app {app.name!r} has the unknown key {shown(key)}.{meant} Its keys for dbsession are "
            f"{' and '.join(KEYS)}."
        )


class _Given:
    """What an app's first init_app() was given. Lives as long as the app.

    Args:
        source: of the app's databases; None: it has none of its own.
        deadline: in seconds, or a function.
    """

    last: _Given | None = None
    """What init_app() configured last, replaced in one step: whether it is in force, `sources.process_wide` knows."""

    def __init__(self, name: str, source: sources.Source | None, deadline: Any) -> None:
        self.name = name
        self.source = source
        self.deadline = deadline

    def configure(self, databases: Any) -> None:
        """Make these the process's databases; log whose they replace, if configure() was given others."""
        replaced, of_last = sources.process_wide, _Given.last.source if _Given.last else None
        api.configure(databases)
        self.source, _Given.last = sources.process_wide, self
        if of_last is not None and (of_last is replaced or not sources.differing(of_last, self.source)):
            return  # an app took the place of an app; or a factory is called again, after a test's configure(), say
        others = sources.differing(replaced, self.source)
        if others:
            logger.warning(
                "init_app() of the app %r has put the databases of its app.config in place of others that configure() "
                "was given before: %s. Give them in one place.",
                self.name,
                ", ".join(others),
            )

    def refuse_others(self, source: sources.Source | None, deadline: Any) -> None:
        """Raise ConfigError if a second init_app() of the app finds others than the first."""
        other = [KEYS[1]] if deadline != self.deadline else []
        if source is None or self.source is None:
            other += [KEYS[0]] if source is not self.source else []
        elif sources.differing(self.source, source) or sources.differing(source, self.source):
            other += [KEYS[0]]
        if other:
            raise ConfigError(
                f"init_app() was called again for the app {self.name!r}, whose app.config has another "
                f"{' and another '.join(other)} now: nothing was applied. Set it before the first call; to replace the "
                "process's databases, call dbsession.configure()."
            )

    def refuse_replaced(self) -> None:
        """Raise ConfigError if another app's init_app() has replaced these databases, and a name leads elsewhere."""
        now, last = sources.process_wide, _Given.last
        if self.source is None or now is self.source or last is None or now is not last.source:
            return
        lost = sources.differing(self.source, now, _where)
        if lost:
            raise ConfigError(
                f"The databases of the app {self.name!r} ({', '.join(lost)}) were replaced by others when init_app() "
                f"was called for another app, {last.name!r}: the configuration is the process's. Give all apps of "
                "this process the same databases, each under a name of its own; or call dbsession.configure() with "
                "this app's before it is used again."
            )


def _where(config: DatabaseConfig) -> object:
    """Return what says where a database is."""
    return config.url, config.options.get("creator")


class _Wrapper(DBSessionMiddleware):
    """Wraps an app's `wsgi_app`; lives as long as it. Refuses a request whose sessions would lead elsewhere before
    anything of it runs: Flask's own request context would be left half pushed."""

    def __init__(self, app: Any, given: _Given) -> None:
        super().__init__(app, given.deadline)
        self._given = given

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if sources.process_wide is not self._given.source:
            self._given.refuse_replaced()
        return super().__call__(environ, start_response)


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


def _context_pushed(app: Flask, **_: Any) -> None:
    try:
        app.extensions["dbsession_given"].refuse_replaced()
    except ConfigError:
        app_ctx.pop()  # or it would stay: Flask has pushed it already
        raise
    current = scope.current()
    # A context may be pushed again (`with context:` inside itself); it is popped for good only once.
    if (current is None or current.kind != "request" or current.is_socket) and "_dbsession_scope" not in g:
        inside = current if current is not None and current.kind == "request" else None
        opened = session_scope("a Flask app context" if inside is None else f"an event of {inside.label}")
        opened.__enter__()
        g._dbsession_scope = opened


def _context_popped(error: BaseException | None) -> None:
    opened = g.pop("_dbsession_scope", None)
    if opened is not None:
        opened.__exit__(error and type(error), error, None)
