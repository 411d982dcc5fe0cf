"""ASGI applications for the tests that run real servers: each path does one thing to a session.

    starlette_app   Starlette
    fastapi_app     FastAPI, the same endpoints
    layered_app     Starlette with its BaseHTTPMiddleware above and below ours
    bare_app        no framework, and no lifespan

The database comes from DBSESSION_URL, by its asyncio twin. `state` at /state tells, without a session, what is in use.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any, ClassVar

from fastapi import Depends, FastAPI
from sqlalchemy import text
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.websockets import WebSocket

from dbsession import aio
from dbsession.aio.session import ManagedAsyncSession

CONCURRENT = 50

aio.configure({"default": {"url": os.environ["DBSESSION_URL"], "options": {"pool_size": CONCURRENT}}})
session = aio.get_dbsession()
logging.basicConfig(level=logging.INFO)
logger = logging.getLogger(__name__)


async def query(statement: str, **values: Any) -> Any:
    return await session.scalar(text(statement), values)


async def state(request: Request) -> Response:
    pool: Any = aio.get_engine().pool
    gc.collect()  # the traceback of a cancellation may be a cycle, with the frames that had the session in it
    found = {
        "checked_out": pool.checkedout(),
        "idle": pool.checkedin(),
        "sessions": sum(isinstance(each, ManagedAsyncSession) for each in gc.get_objects()),
        "loop": type(asyncio.get_running_loop()).__module__.partition(".")[0],
        "gevent": "gevent" in sys.modules,
    }
    return JSONResponse(found)


class Meeting:
    """Goes on when as many as are expected have come."""

    def __init__(self) -> None:
        self.come = 0
        self.all_there = asyncio.Event()


_meetings: dict[str, Meeting] = {}


async def meet(request: Request) -> Response:
    """Waits, with a connection in use, for the others of the same name; which session and connection it has."""
    connection = await session.connection()
    driver = (await connection.get_raw_connection()).driver_connection
    meeting = _meetings.setdefault(request.query_params["name"], Meeting())
    meeting.come += 1
    if meeting.come == CONCURRENT:
        meeting.all_there.set()
    async with asyncio.timeout(60):
        await meeting.all_there.wait()
    return PlainTextResponse(f"{id(session())}:{id(driver)}")


async def token(request: Request) -> Response:
    value = request.query_params["token"]
    first = await query("SELECT :t", t=value)
    await asyncio.sleep(0.02)
    return PlainTextResponse(f"{first}/{await query('SELECT :t', t=value)}")


async def stream(request: Request) -> Response:
    rows = int(request.query_params["rows"])
    await query("SELECT 1")  # the endpoint's own session, which is not that of a body streamed in a child task

    async def body() -> AsyncIterator[bytes]:
        for n in range(rows):
            yield b"%d %s\n" % (await query("SELECT :n", n=n), b"x" * 20_000)

    return StreamingResponse(body())


async def fail(request: Request) -> Response:
    await query("SELECT 1")
    raise RuntimeError("raised by the probe")


def in_a_thread(request: Request) -> Response:
    session()
    raise AssertionError("it got a session")


async def write(request: Request) -> Response:
    await session.execute(text("INSERT INTO t VALUES (:n)"), {"n": int(request.query_params["n"])})
    if "commit" in request.query_params:
        await session.commit()
    return PlainTextResponse("written")


async def count(request: Request) -> Response:
    return PlainTextResponse(str(await query("SELECT COUNT(*) FROM t WHERE n = :n", n=int(request.query_params["n"]))))


async def background(request: Request) -> Response:
    mine = session()
    await write(request)

    async def after_the_response() -> None:
        assert session() is mine
        await session.commit()

    return PlainTextResponse("later", background=BackgroundTask(after_the_response))


async def chat(websocket: WebSocket) -> None:
    await websocket.accept()
    mine = session()
    async for message in websocket.iter_text():
        assert session() is mine
        await websocket.send_text(await query("SELECT :m", m=message))


async def unavailable(request: Request, error: Exception) -> Response:
    return PlainTextResponse(str(error), 503)


@asynccontextmanager
async def lifespan(app: Any) -> AsyncIterator[None]:
    await query("SELECT 1")  # and nothing ends its transaction
    yield
    logger.info("the application's shutdown read %s", await query("SELECT 42"))


class Telemetry:
    """Stands outside everything, and notes what is in the ASGI scope at the end of a call, as OpenTelemetry does."""

    seen: ClassVar[dict[str, Any]] = {}

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope.get("path")
        try:
            await self.app(scope, receive, send)
        finally:
            if "/item/" in (path or ""):
                endpoint = getattr(scope.get("endpoint"), "__name__", None)
                self.seen[path] = [endpoint, scope.get("path_params"), "dbsession.scope" in scope]


async def item(request: Request) -> Response:
    return PlainTextResponse(str(await query("SELECT :n", n=request.path_params["n"])))


async def seen(request: Request) -> Response:
    return JSONResponse(Telemetry.seen)


ENDPOINTS = {
    "/item/{n}": item,
    "/seen": seen,
    "/state": state,
    "/meet": meet,
    "/token": token,
    "/stream": stream,
    "/fail": fail,
    "/def": in_a_thread,
    "/write": write,
    "/count": count,
    "/background": background,
}
routes = [*(Route(path, endpoint) for path, endpoint in ENDPOINTS.items()), WebSocketRoute("/chat", chat)]
handlers: Any = {aio.ScopeRequired: unavailable}

routes.append(Mount("/mounted", routes=[Route("/item/{n}", item)]))

starlette_app = Telemetry(
    aio.DBSessionMiddleware(Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers))
)

_fastapi = FastAPI(lifespan=lifespan, exception_handlers=handlers)
for _path, _endpoint in ENDPOINTS.items():
    _fastapi.add_api_route(_path, _endpoint, response_model=None)
_fastapi.add_api_websocket_route("/chat", chat)


async def unit_of_work() -> AsyncIterator[Any]:
    yield session
    await session.commit()


@_fastapi.get("/dependency")
async def dependency(n: int, unit: Annotated[Any, Depends(unit_of_work)]) -> int:
    await unit.execute(text("INSERT INTO t VALUES (:n)"), {"n": n})
    if n < 0:
        raise RuntimeError("raised by the probe")
    return n


_fastapi.mount("/mounted", Starlette(routes=[Route("/item/{n}", item)]))
fastapi_app = Telemetry(aio.DBSessionMiddleware(_fastapi))


class Layer(BaseHTTPMiddleware):
    async def dispatch(self, request: Request, call_next: Any) -> Response:
        response: Response = await call_next(request)
        response.headers["X-Layer"] = "passed"
        return response


layered_app = Telemetry(
    Starlette(
        routes=routes,
        lifespan=lifespan,
        exception_handlers=handlers,
        middleware=[Middleware(Layer), Middleware(aio.DBSessionMiddleware), Middleware(Layer)],
    )
)


async def _bare(scope: Any, receive: Any, send: Any) -> None:
    assert scope["type"] == "http"
    answer: Any = state if scope["path"] == "/state" else count
    await (await answer(Request(scope)))(scope, receive, send)


bare_app = aio.DBSessionMiddleware(_bare)
