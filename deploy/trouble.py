"""What usually goes wrong, by buttons: the panel beside the order desk of deploy/demo.

app.py registers it where ORDER_DESK_TROUBLE is set; whoever copies the order desk leaves this file out. Each button
is a POST that says in a sentence what was answered. Two workers are behind one port, so what the panel shows live is
taken from the inspection sockets of all of them (DBSESSION_INSPECT), else from the worker that answers.
"""

from __future__ import annotations

import fcntl
import functools
import http.client
import json
import os
import socket
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import answers
from deadlock import deadlock, kind_of
from flask import Blueprint, Response, abort, jsonify, make_response, request
from gevent.pool import Group
from orders import DATA
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

import dbsession
from dbsession.errors import ConfigError, describe
from dbsession.watch.inspection.client import Collected, collect
from dbsession.watch.inspection.usage import holders, usage

SLOW_S = 4.0  # of a slow request
STREAM_ROW_S = 0.1
STREAM_READ_S = 2.0  # until its client goes away
BURST = 200
QUERY_S = 0.4  # that each request of a burst holds its connection
ANSWER_S = 40.0  # that one of them may take: longer than it may wait for a connection
SHOWN_HOLDERS = 6

orders = dbsession.get_dbsession("default")
panel = Blueprint("trouble", __name__)

# 100 rows on any database, whatever is stored; a row at a time from a server-side cursor.
ROWS = text(
    "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 100) SELECT i FROM n"
).execution_options(yield_per=1)


@panel.before_request
def refuse_other_pages() -> Any:
    """What a page of somebody else's makes a browser send, whether by a form, by a script or by DNS rebinding."""
    own_name = urlsplit(f"//{request.host}").hostname in ("localhost", "127.0.0.1", "::1")
    own = request.host_url.rstrip("/")
    # Where both are sent, the first counts: our own form says "Origin: null", by the page's Referrer-Policy.
    site = request.headers.get("Sec-Fetch-Site", "none" if request.headers.get("Origin", own) == own else "another")
    if not own_name or site not in ("same-origin", "none"):
        return {"answer": "Refused: it was asked for by another page. Use the buttons of this one, on 127.0.0.1."}, 403
    return None


@panel.errorhandler(SQLAlchemyError)
def database_failed(error: SQLAlchemyError) -> Any:
    status, message, headers = answers.database_failure(error)
    answer = {"answer": f"Answered {status}, {describe(error)}: {message}.", "error": describe(error)}
    return answer, status, headers


def button(work: Callable[[], str]) -> Callable[[], str]:
    """POST /trouble/<its name>: run `work`, unless some worker runs it already, and answer with its sentence."""
    kind = work.__name__

    @functools.wraps(work)
    def pressed() -> Any:
        with one_at_a_time(kind):
            return {"answer": work()}

    panel.add_url_rule(f"/trouble/{kind}", kind, pressed, methods=["POST"])
    return work


@contextmanager
def one_at_a_time(kind: str) -> Iterator[None]:
    folder = Path(os.environ.get("DBSESSION_INSPECT", "").strip() or DATA)
    folder.mkdir(mode=0o700, exist_ok=True)
    with open(folder / f"trouble-{kind}.lock", "w") as lock:  # the kernel frees it, however this process ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            refusal = {"answer": "Refused: this runs already, here or in another window. Wait until it has answered."}
            abort(make_response(refusal, 409))
        yield


# -- the buttons -----------------------------------------------------------------------------------------------


@button
def hold() -> str:
    orders.scalar(answers.LATEST_ID)
    taken = time.monotonic()
    time.sleep(SLOW_S)  # in a transaction, whose connection nobody else can use meanwhile
    return f"Answered 200. It kept its connection for {time.monotonic() - taken:.1f} s and needed it for milliseconds."


@button
def release() -> str:
    began = time.monotonic()
    orders.scalar(answers.LATEST_ID)
    dbsession.release_dbsession()
    released = time.monotonic()
    time.sleep(SLOW_S)
    had_ms = 1000 * (released - began)
    return f"Answered 200 after {time.monotonic() - began:.1f} s. It had a connection for {had_ms:.0f} ms of that."


@button
def abandon() -> str:
    with socket.create_connection(own_address(), timeout=ANSWER_S) as client:
        client.sendall(b"POST /trouble/stream HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 0\r\n\r\n")
        status = client.recv(4096).split(b"\r\n")[0].decode(errors="replace")
        if " 200 " not in status:
            return f"The stream could not begin: it was answered {status or 'with nothing'}."
        time.sleep(STREAM_READ_S)
    left = time.monotonic()
    while streams() and time.monotonic() - left < 5:
        time.sleep(0.05)
    gone_s = time.monotonic() - left
    if streams():
        return f"The client went away after {STREAM_READ_S:.0f} s, and {gone_s:.0f} s later its stream still ran."
    return (
        f"The client went away after {STREAM_READ_S:.0f} s, in the middle of 100 rows. {gone_s:.1f} s later its stream "
        "was closed and its connection was back in the pool."
    )


def streams() -> bool:
    return any(holder["scope"] == "POST /trouble/stream" for holder in holders(look()))


@panel.post("/trouble/stream")
def stream() -> Response:
    result = orders.execute(ROWS)

    def body() -> Iterator[str]:
        for (number,) in result:
            yield f"{number}\r\n"
            time.sleep(STREAM_ROW_S)

    return Response(body(), mimetype="text/csv")


@button
def burst() -> str:
    """From here and not from the browser, which opens six connections to a server at a time."""
    address, asked = own_address(), Group()
    try:
        answered = asked.map(lambda _: ask_query(address), range(BURST))
    finally:
        asked.kill()
    good = [answer for status, answer in answered if status == 200]
    others = Counter(
        f"answered {status} ({answer.get('error', 'no reason given')})" if status else f"got no answer ({answer})"
        for status, answer in answered
        if status != 200
    )
    found = ", ".join([f"{len(good)} of {BURST} answered 200", *(f"{count} {what}" for what, count in others.items())])
    if not good:
        return f"{found}."
    waits = [answer["waited_s"] for answer in good]
    shares = sorted(Counter(answer["pid"] for answer in good).values(), reverse=True)
    return (
        f"{found}; longest wait for a connection {max(waits):.1f} s, median {statistics.median(waits):.1f} s. They "
        f"came to {len(shares)} worker{'s' * (len(shares) > 1)}: {' and '.join(map(str, shares))} requests."
    )


def ask_query(address: tuple[str, int]) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(*address, timeout=ANSWER_S)
    try:
        connection.request("POST", "/trouble/query", headers={"Connection": "close"})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    except (OSError, http.client.HTTPException, ValueError) as error:
        return 0, type(error).__name__
    finally:
        connection.close()


@panel.post("/trouble/query")
def query() -> Any:
    began = time.monotonic()
    orders.scalar(answers.LATEST_ID)
    waited_s = time.monotonic() - began
    time.sleep(QUERY_S)  # stands for a statement of that length
    return {"waited_s": waited_s, "pid": os.getpid()}


def own_address() -> tuple[str, int]:
    """Where this request came in, so that others do, too: each is taken by either worker."""
    address: tuple[str, int] = request.environ["gunicorn.socket"].getsockname()[:2]
    return address


button(deadlock)


# -- what is shown live ----------------------------------------------------------------------------------------


def look() -> Collected:
    """All workers, by their sockets; without those the worker that answers."""
    folder = os.environ.get("DBSESSION_INSPECT", "").strip()
    try:
        found = collect(folder, 0.5) if folder else None
    except ConfigError:
        found = None
    return found if found and found.workers else Collected(time.time(), [dbsession.snapshot().as_dict()])


@panel.get("/trouble/live")
def live() -> Any:
    now = look()
    databases = [
        {"name": each.database, "in_use": each.in_use, "limit": each.limit, "waiting": each.waiting, **each.counts}
        for each in usage(now)
    ]
    rows = holders(now)
    workers = [worker["pid"] for worker in now.workers]
    answer = jsonify(workers=workers, databases=databases, holders=rows[:SHOWN_HOLDERS], more=len(rows[SHOWN_HOLDERS:]))
    answer.headers["Cache-Control"] = "no-store"
    return answer


@panel.app_context_processor
def template_values() -> dict[str, Any]:
    engine = dbsession.get_engine("default")
    return {
        "trouble": {
            "slow_s": SLOW_S,
            "read_s": STREAM_READ_S,
            "burst": BURST,
            "query_s": QUERY_S,
            "workers": int(os.environ.get("WEB_CONCURRENCY") or 1),
            "size": engine.pool.size(),
            "kind": kind_of(engine),
            "everybody": bool(os.environ.get("DBSESSION_INSPECT", "").strip()),
            "dashboard": os.environ.get("ORDER_DESK_DASHBOARD"),
            "metrics": os.environ.get("DBSESSION_METRICS"),
        }
    }
