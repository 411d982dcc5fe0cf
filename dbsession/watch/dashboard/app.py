"""The dashboard's pages, and the one address that they poll."""

from __future__ import annotations

import math
import time
from datetime import timedelta
from typing import Any

from flask import Flask, Response, abort, jsonify, redirect, render_template, request, session
from werkzeug.exceptions import HTTPException

from dbsession.watch.dashboard.access import FailedLogins, Token, is_local_name
from dbsession.watch.dashboard.history import History

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}

SESSION_S = 12 * 3600
"""How long a login lasts, at most: the cookie ends with the browser."""

ASSETS = {"app.js": "text/javascript", "chart.js": "text/javascript", "table.js": "text/javascript"}


def create_app(history: History, folder: str, token: Token | None = None, cookie: str = "dbsession_dashboard") -> Flask:
    """The dashboard as a WSGI application.

    Args:
        history: what it shows; somebody else adds to it.
        folder: where the workers' sockets are, for the page to name it.
        token: what a client has to know; None: it must have asked for this machine by name or loopback address.
        cookie: the name of the cookie that a login sets. (Browsers do not tell ports apart, so two need two names.)
    """
    app = Flask(__name__, static_folder=None, template_folder="static")
    app.config["MAX_CONTENT_LENGTH"] = 4096
    failed = FailedLogins()
    if token is not None:
        app.secret_key = token.key()
        app.config["SESSION_COOKIE_NAME"] = cookie
        app.config["SESSION_COOKIE_HTTPONLY"] = True
        app.config["SESSION_COOKIE_SAMESITE"] = "Strict"
        app.config["SESSION_REFRESH_EACH_REQUEST"] = False
        app.permanent_session_lifetime = timedelta(seconds=SESSION_S)

    def try_token(given: str) -> bool:
        """Whether it is the right one; 429 for an address that has tried too often."""
        assert token is not None
        address = request.remote_addr or ""
        wait_s = failed.wait_s(address)
        if wait_s > 0:
            answer = plain(429, "Too many wrong tokens from this address: try again later.")
            answer.headers["Retry-After"] = str(math.ceil(wait_s))
            abort(answer)
        if token.matches(given):
            return True
        failed.add(address)
        return False

    @app.before_request
    def check_access() -> Any:
        if token is None:
            if not is_local_name(request.headers.get("Host", "")):
                return plain(403, "Without a token the dashboard answers to localhost, 127.0.0.1 and [::1] only.")
            return None
        if request.endpoint in ("login", "log_in", "style"):
            return None
        sent = request.authorization
        if sent is not None and sent.type == "bearer":  # others are for a proxy in front of us
            if sent.token and try_token(sent.token):
                return None
        elif session.get("in"):
            return None
        if request.endpoint == "index":  # a browser shows the form; whoever else asks sees the status
            answer = Response(render_template("login.html", wrong=False), 401)
        else:
            answer = plain(401, "Log in, or send the token as `Authorization: Bearer`.")
        answer.headers["WWW-Authenticate"] = 'Bearer realm="dbsession dashboard"'
        return answer

    @app.after_request
    def set_headers(response: Response) -> Response:
        response.headers.update(HEADERS)
        return response

    @app.errorhandler(HTTPException)
    def http_error(error: HTTPException) -> Any:
        return plain(error.code or 500, error.name)

    @app.get("/")
    def index() -> str:
        return render_template("index.html", folder=folder, can_log_out=token is not None)

    @app.get("/style.css")
    def style() -> Response:
        return asset(app, "style.css", "text/css")

    @app.get("/<any({}):name>".format(", ".join(f"'{name}'" for name in ASSETS)))
    def script(name: str) -> Response:
        return asset(app, name, ASSETS[name])

    @app.get("/state")
    def state() -> Response:
        return jsonify(history.answer(request.args.get("since", ""), time.time()))

    @app.get("/login")
    def login() -> Any:
        if token is None or session.get("in"):
            return redirect("./", 303)
        return render_template("login.html", wrong=False)

    @app.post("/login")
    def log_in() -> Any:
        if token is None:
            return redirect("./", 303)
        if not try_token(request.form.get("token", "")):
            return render_template("login.html", wrong=True), 401
        session.clear()
        session["in"] = True
        return redirect("./", 303)

    @app.post("/logout")
    def log_out() -> Any:
        session.clear()
        return redirect("login", 303)

    return app


def plain(status: int, sentence: str) -> Response:
    return Response(sentence + "\n", status, mimetype="text/plain")


def asset(app: Flask, name: str, mimetype: str) -> Response:
    with app.open_resource(f"static/{name}") as file:
        return Response(file.read(), mimetype=mimetype)
