"""What one way through dbsession calls, in a process of its own:  python -m benchmarks.calls_child {gevent|asyncio} URL

Prints one JSON object: case -> {"calls", "modules", "moves"}, as bench_calls explains them. With --tree after URL it
prints each case's calls instead, one a line, indented under their callers.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import greenlet

Event = tuple[str, str, str]
"""("call" or "return", the module's path inside dbsession, the function's name)"""

ENVIRON = {"REQUEST_METHOD": "GET", "PATH_INFO": "/"}
WARM = 5


def traced(events: list[Event], only: object = None) -> Callable[[FrameType, str, object], None]:
    """A profile function that appends what happens to frames of dbsession's own; those of the greenlet `only`, if that
    is given."""
    import dbsession

    root = os.path.dirname(dbsession.__file__) + "/"

    def profile(frame: FrameType, event: str, _: object) -> None:
        path = frame.f_code.co_filename
        if event in ("call", "return") and path.startswith(root) and only in (None, greenlet.getcurrent()):
            events.append((event, path.removeprefix(root), frame.f_code.co_qualname))

    return profile


def during(work: Callable[[], object]) -> list[Event]:
    """In gevent: what `work` does, and not what periodic tasks do in other greenlets meanwhile."""
    events: list[Event] = []
    sys.setprofile(traced(events, greenlet.getcurrent()))
    try:
        work()
    finally:
        sys.setprofile(None)
    return events


def figures(events: list[Event]) -> dict[str, int]:
    called = [module for event, module, _ in events if event == "call"]
    stack: list[str] = []
    innermost: list[str] = []
    for event, module, _ in events:
        if event == "call":
            stack.append(module)
        else:
            stack.pop()
        innermost += stack[-1:]
    moves = sum(one != other for one, other in itertools.pairwise(innermost))
    return {"calls": len(called), "modules": len(set(called)), "moves": moves}


def tree(events: list[Event]) -> Iterator[str]:
    depth = 0
    for event, module, function in events:
        if event == "call":
            yield f"{'  ' * depth}{module} {function}"
        depth += 1 if event == "call" else -1


def in_gevent(url: str) -> dict[str, list[Event]]:
    from gevent import monkey

    monkey.patch_all()
    from sqlalchemy import text

    import dbsession

    dbsession.configure({"default": url})
    session = dbsession.get_dbsession()

    def committed(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        session.execute(text("SELECT 1"))
        session.commit()
        start_response("200 OK", [])
        return [b"x"]

    def streamed(environ: dict[str, Any], start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [])
        session.execute(text("SELECT 1"))
        yield b"x"

    wrapped = {app: dbsession.DBSessionMiddleware(app) for app in (committed, streamed)}

    def answered(app: Any) -> Any:
        body = wrapped[app](dict(ENVIRON), lambda status, headers: None)
        for _ in body:
            pass
        return body

    found = {}
    for _ in range(WARM):
        found["request"] = during(lambda: answered(committed))
        found["a streamed body's close"] = during(answered(streamed).close)
    engine = dbsession.get_engine()
    for _ in range(WARM):
        checked_out: list[Any] = []
        found["checkout"] = during(lambda: checked_out.append(engine.connect()))  # noqa: B023  # called at once
        found["return"] = during(checked_out[0].close)
    return found


def in_asyncio(url: str) -> dict[str, list[Event]]:
    from sqlalchemy import text

    from dbsession import aio

    aio.configure({"default": url.replace("pymysql", "asyncmy")})
    session = aio.get_dbsession()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await session.execute(text("SELECT 1"))
        await session.commit()

    wrapped: Any = aio.DBSessionMiddleware(app)

    async def answered() -> None:
        await wrapped({"type": "http", "method": "GET", "path": "/"}, None, None)

    async def requests() -> list[Event]:
        for _ in range(WARM):
            events: list[Event] = []
            sys.setprofile(traced(events))
            try:
                await answered()
            finally:
                sys.setprofile(None)
        await aio.dispose()
        return events

    return {"request": asyncio.run(requests())}


def main() -> None:
    half, url, *options = sys.argv[1:]
    found = {"gevent": in_gevent, "asyncio": in_asyncio}[half](url)
    if "--tree" in options:
        for case, events in found.items():
            print("", case, *tree(events), sep="\n")
    else:
        print(json.dumps({case: figures(events) for case, events in found.items()}))


if __name__ == "__main__":
    main()
