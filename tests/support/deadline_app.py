"""A WSGI application with a deadline of PROBE_DEADLINE_S seconds, for the tests that run a real gunicorn.

/late, /late-list and /late-stream never end by themselves, /flood sends as long as somebody reads; each holds a
connection meanwhile. /state tells what the worker that answers has in use; it has no deadline.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator
from typing import Any

from sqlalchemy import text

import dbsession

session = dbsession.get_dbsession()


def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    path = environ["PATH_INFO"]
    start_response("200 OK", [("Content-Type", "text/plain"), ("X-Own", "1")])
    if path == "/state":
        return [json.dumps({"checked_out": dbsession.get_engine().pool.checkedout()}).encode()]
    if path == "/query":
        return [str(session.scalar(text("SELECT 42"))).encode()]
    if path == "/streamed":
        return (b"%d" % session.scalar(text("SELECT 4")) for _ in range(2))
    if path == "/flood":
        return flood()
    if path == "/late-stream":
        return late(b"begun\n")
    if path == "/late":
        return late(b"")
    session.execute(text("SELECT 1"))
    if path == "/late-sql":
        session.execute(text("SELECT SLEEP(60)"))
    time.sleep(60)  # the deadline ends it
    raise AssertionError(path)


def late(first: bytes) -> Iterator[bytes]:
    session.execute(text("SELECT 1"))
    yield first
    time.sleep(60)  # the deadline ends it


def flood() -> Iterator[bytes]:
    session.execute(text("SELECT 1"))
    while True:
        yield b"x" * 1_000_000


_with_deadline = dbsession.DBSessionMiddleware(app, deadline=float(os.environ["PROBE_DEADLINE_S"]))


def wrapped(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    return (app if environ["PATH_INFO"] == "/state" else _with_deadline)(environ, start_response)
