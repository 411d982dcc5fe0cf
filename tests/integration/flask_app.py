"""A Flask application made by a factory, for test_flask.py; also run by a real gunicorn there."""

from __future__ import annotations

import os
from typing import Any

from flask import Flask, Response, stream_with_context
from sqlalchemy import text

import dbsession
import dbsession.flask
from dbsession import get_dbsession

session = get_dbsession()


class Killed(BaseException):
    """What a kill or a timeout is: no Exception."""


def create_app(url: str | None = None, settings: dict[str, Any] | None = None, **options: object) -> Flask:
    app = Flask(__name__)
    app.config.update(settings or {})
    app.config["DBSESSION_DATABASES"] = {"default": {"url": url or os.environ["APP_URL"], "options": options}}
    dbsession.flask.init_app(app)

    @app.get("/one")
    def one() -> str:
        return str(session.scalar(text("SELECT 1")))

    @app.get("/big")
    def big() -> str:
        return str(session.scalar(text("SELECT 1"))) * 3_000_000  # more than the socket's buffers take

    @app.get("/stream")
    def stream() -> Response:
        @stream_with_context
        def lines():
            for n in range(3):
                yield f"{session.scalar(text('SELECT :n'), {'n': n})}\n"

        session.execute(text("SELECT 1"))
        return Response(lines())

    @app.get("/export/<cut>")
    def export(cut: str) -> Response:
        cuts = {
            "commit": session.commit,
            "release": dbsession.release_dbsession,
            "statement": lambda: session.execute(text("SELECT 1")),
            "nothing": lambda: None,
        }

        @stream_with_context
        def lines():
            rows = session.execute(text("SELECT seq FROM seq_1_to_3000"), execution_options={"yield_per": 100})
            for (n,) in rows:
                yield f"{n}\n"
                if n == 200:
                    cuts[cut]()

        return Response(lines(), mimetype="text/csv")

    @app.get("/killed")
    def killed() -> str:
        session.execute(text("SELECT 1"))
        raise Killed

    @app.get("/error")
    def error() -> str:
        session.execute(text("SELECT 1"))
        raise ValueError

    @app.get("/state")
    def state() -> dict[str, int]:
        return {"checked_out": dbsession.get_engine().pool.checkedout()}

    @app.cli.command("work")
    def work() -> None:
        """Uses the database as a command does."""
        with app.app_context():
            inner = session()  # kept: a new object may have the address of one that is gone
        print("worked", session.scalar(text("SELECT 1")), inner is not session())

    return app


def small() -> Flask:
    """For gunicorn: `flask_app:small()`."""
    return create_app(pool_size=2, pool_timeout=20)
