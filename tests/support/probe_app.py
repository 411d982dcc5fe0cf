"""A WSGI application for the tests that run a real gunicorn: each path does one thing to a session.

The databases come from DBSESSION_URL and, where a test needs it, DBSESSION_OTHER_URL. `state` at /state tells, without
a session, what the worker that answers has in use, and /holders who uses it.
"""

from __future__ import annotations

import gc
import json
import os
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any
from urllib.parse import parse_qs

from sqlalchemy import text

import dbsession
from dbsession import get_dbsession

session = get_dbsession()  # before anything is configured or patched, as applications do
_met: list[Any] = []  # the sessions of /session
_frozen_at_fork = [0]  # objects that the master's collector was kept from, where it has imported this module
os.register_at_fork(after_in_child=lambda: _frozen_at_fork.append(gc.get_freeze_count()))

if os.environ.get("PROBE_QUERY_AT_IMPORT"):
    # Under --preload this leaves the master with a live connection that every worker inherits.
    session.execute(text("SELECT 1"))


def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    path = environ["PATH_INFO"]
    query = {key: values[0] for key, values in parse_qs(environ["QUERY_STRING"]).items()}
    if path == "/state":
        pool = dbsession.get_engine().pool
        answer = {"pid": os.getpid(), "checked_out": pool.checkedout(), "idle": pool.checkedin()}
        collector = {"threshold": gc.get_threshold()[0], "frozen": gc.get_freeze_count()}
        answer.update(collector, frozen_at_fork=_frozen_at_fork[-1])
        return reply(start_response, json.dumps(answer))
    if path == "/holders":
        found = (
            f"{os.getpid()}: {holder}\n    at {' < '.join(holder.stack)}" for holder in dbsession.snapshot().holders
        )
        return reply(start_response, "\n".join(found))
    if path == "/stream":
        start_response("200 OK", [("Content-Type", "text/plain")])
        return stream(int(query["rows"]), float(query.get("pause", 0)))
    if path == "/token":
        return reply(start_response, token(query["token"], float(query.get("pause", 0))))
    if path == "/dirty":
        from gunicorn.dirty.client import get_dirty_client

        answer = get_dirty_client().execute("support.probe_dirty:Probe", "token", query["token"])
        return reply(start_response, json.dumps(answer))
    if path == "/session":
        mine = session()
        _met.append(mine)
        end = time.monotonic() + 60
        while len(_met) < int(query["of"]):  # all of them have one at the same time
            assert time.monotonic() < end, len(_met)
            time.sleep(0.01)  # patched: the others run
        assert session() is mine
        return reply(start_response, f"{os.getpid()}:{id(mine)}")
    if path == "/raise":
        session.execute(text("SELECT 1"))
        raise RuntimeError("raised by the probe")
    if path == "/exit":
        session.execute(text("SELECT 1"))
        raise SystemExit(1)
    if path == "/file":
        session.execute(text("SELECT 1"))
        start_response("200 OK", [("Content-Type", "text/plain")])
        return environ["wsgi.file_wrapper"](open(__file__, "rb"))
    if path == "/write":
        session.execute(text("INSERT INTO t VALUES (:n)"), {"n": int(query["n"])})
        if query.get("commit"):
            session.commit()
        return reply(start_response, "written")
    if path == "/work":
        # Whoever reads uncommitted sees which worker and which connection are at it.
        row = {"n": int(query["n"]), "pid": os.getpid()}
        session.execute(text("INSERT INTO work VALUES (:n, :pid, CONNECTION_ID())"), row)
        time.sleep(float(query.get("pause", 0)))  # as long as the test says
        while "until" in query and not os.path.exists(query["until"]):
            time.sleep(0.01)  # patched: the others run
        session.execute(text("SELECT SLEEP(:s)"), {"s": float(query.get("statement", 0))})
        session.commit()
        return reply(start_response, str(os.getpid()))
    if path == "/compute":
        # For ever, in the request's own greenlet or thread, and in another one.
        other = threading.Thread(target=compute, args=(int(query["n"]) + 1,), daemon=True)
        other.start()
        compute(int(query["n"]))
    if path == "/count":
        return reply(start_response, str(session.scalar(text("SELECT COUNT(*) FROM t"))))
    raise AssertionError(path)


def compute(n: int) -> None:
    with dbsession.session_scope():
        session.execute(text("INSERT INTO work VALUES (:n, :pid, CONNECTION_ID())"), {"n": n, "pid": os.getpid()})
        session.execute(text("SELECT BENCHMARK(1000000000000, SHA2('x', 512))"))


def reply(start_response: Any, answer: str) -> list[bytes]:
    body = answer.encode()
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
    return [body]


def token(value: str, pause: float) -> str:
    first = session.scalar(text("SELECT :t"), {"t": value})
    time.sleep(pause)  # as long as the test says
    return f"{first}/{session.scalar(text('SELECT :t'), {'t': value})}"


def stream(rows: int, pause: float) -> Iterator[bytes]:
    for n in range(rows):
        time.sleep(pause)  # as long as the test says
        yield b"%d %s\n" % (session.scalar(text("SELECT :n"), {"n": n}), b"x" * 20_000)


wrapped = dbsession.DBSessionMiddleware(app)
unwrapped = app
