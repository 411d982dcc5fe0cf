"""A Flask application with WebSockets, for a real gunicorn: Flask-SocketIO (SOCKETS=socketio) or flask-sock. The order
in which Flask-SocketIO and dbsession wrap it is ORDER's."""

from __future__ import annotations

import os
from typing import Any

from flask import Flask, request
from sqlalchemy import text

import dbsession
import dbsession.flask

session = dbsession.get_dbsession()
app = Flask(__name__)
app.config["DBSESSION_DEADLINE_S"] = lambda environ: None if environ["PATH_INFO"] in ("/socket.io/", "/sock") else 1.0
app.config["DBSESSION_DATABASES"] = {
    "default": {"url": os.environ["APP_URL"], "options": {"pool_size": 2, "pool_timeout": 10}}
}


def count() -> int:
    return int(session.scalar(text("SELECT COUNT(*) FROM t")))


def write(how: str) -> int:
    session.execute(text("INSERT INTO t VALUES (1)"))
    if how == "fail":
        raise ValueError("on purpose")
    if how == "commit":
        session.commit()
    return count()


def with_socketio() -> None:
    from flask_socketio import SocketIO

    def socketio() -> None:
        # Handlers in the greenlet that serves the socket, and so inside its request.
        sockets = SocketIO(app, async_mode="gevent", async_handlers=False)
        sockets.on_event("connect", lambda *_: count() and None)
        sockets.on_event("count", count)
        sockets.on_event("write", write)

    wrapping = [socketio, lambda: dbsession.flask.init_app(app)]
    for wrap in wrapping if os.environ["ORDER"] == "socketio first" else reversed(wrapping):
        wrap()


def with_sock() -> None:
    from flask_sock import Sock

    dbsession.flask.init_app(app)
    sock = Sock(app)

    def serve(ws: Any) -> None:
        while (message := ws.receive()) is not None:
            try:
                with app.app_context():
                    ws.send(str(count() if message == "count" else write(message)))
            except ValueError:
                ws.send("failed")

    for path in ("/sock", "/bounded"):
        sock.route(path, endpoint=path)(serve)


with_socketio() if os.environ["SOCKETS"] == "socketio" else with_sock()


@app.get("/state")
def state() -> dict[str, int]:
    return {"checked_out": dbsession.get_engine().pool.checkedout()}


@app.get("/one")
def one() -> str:
    return f"{session.scalar(text('SELECT 1'))} {request.environ['dbsession.scope'].label}"
