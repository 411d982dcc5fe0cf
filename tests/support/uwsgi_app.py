"""A WSGI application that has used its database when uWSGI forks. Each answer names the worker, its connection, and
what was asked for."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from sqlalchemy import text

import dbsession

session = dbsession.get_dbsession()
own = text("SELECT CONNECTION_ID()" if dbsession.get_engine().dialect.name == "mysql" else "SELECT 0")

session.execute(text("INSERT INTO t VALUES (0, 0)"))
session.commit()
session.execute(text("SELECT 1"))  # whose transaction stays open
with dbsession.session_scope():
    session.execute(text("SELECT 1"))  # and an idle connection beside it


def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    token = environ["QUERY_STRING"]
    first = session.scalar(text("SELECT :t"), {"t": token})
    connection = session.scalar(own)
    session.execute(text("INSERT INTO t VALUES (:n, :pid)"), {"n": int(token), "pid": os.getpid()})
    session.commit()
    second = session.scalar(text("SELECT :t"), {"t": token})
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [f"{os.getpid()} {connection} {first} {second}".encode()]


application = dbsession.DBSessionMiddleware(app)
