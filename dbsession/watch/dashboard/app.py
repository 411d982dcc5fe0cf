"""The dashboard's pages, and the one address that they poll."""

from __future__ import annotations

import time
from typing import Any

from flask import Flask, Response, jsonify, render_template, request
from werkzeug.exceptions import HTTPException

from dbsession.watch.dashboard.history import History

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def create_app(history: History, folder: str, tunnel: tuple[str, str]) -> Flask:
    """The dashboard as a WSGI application, for whoever has asked for this machine by its local name or address.

    Args:
        history: what it shows; somebody else adds to it.
        folder: where the workers' sockets are, for the page to name it.
        tunnel: how it is reached from another machine: the command, and the address to open then.
    """
    app = Flask(__name__, static_url_path="")

    @app.before_request
    def check_host() -> Any:
        if not is_local_name(request.headers.get("Host", "")):
            return plain(403, f"The dashboard answers to localhost, 127.0.0.1 and [::1] only: use `{tunnel[0]}`.")
        return None

    @app.after_request
    def set_headers(response: Response) -> Response:
        response.headers.update(HEADERS)
        return response

    @app.errorhandler(HTTPException)
    def http_error(error: HTTPException) -> Any:
        return plain(error.code or 500, error.name)

    @app.get("/")
    def index() -> str:
        return render_template("index.html", folder=folder, tunnel=tunnel)

    @app.get("/state")
    def state() -> Response:
        return jsonify(history.answer(request.args.get("since", ""), time.time()))

    return app


def is_local_name(host_header: str) -> bool:
    """Whether a browser that sends this `Host` was asked for this machine. A page of somebody else's may give its own
    name the address 127.0.0.1 and read what is served there (DNS rebinding); the name gives it away."""
    name, colon, port = host_header.rpartition(":")
    if not colon or "]" in port:
        name, port = host_header, "0"
    return name.lower() in ("localhost", "127.0.0.1", "[::1]") and port.isascii() and port.isdecimal()


def plain(status: int, sentence: str) -> Response:
    return Response(sentence + "\n", status, mimetype="text/plain")
