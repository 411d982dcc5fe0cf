"""The order desk of app.py in asyncio: a Starlette application on the same two databases, by `dbsession.aio`.

    uvicorn --app-dir deploy asgi:app

Sessions are taken where they are needed and never closed here: the middleware closes them when the request is over.
orders.py holds the tables and the rules, answers.py what both applications ask and answer.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import os
import secrets
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import answers
import jinja2
from orders import (
    METADATA,
    BadInput,
    Order,
    check_order,
    check_text_order,
    databases,
    made_by_another,
    now,
    read_csv,
)
from sqlalchemy import insert, text
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from dbsession import aio
from dbsession.errors import describe

logger = logging.getLogger("orderdesk")
templates = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).resolve().parent / "templates"), autoescape=True
)

aio.configure(databases())
# Module-level: each use goes to the session of the request that uses it.
orders = aio.get_dbsession("default")
audit = aio.get_dbsession("audit")


@aio.loop_local.singleton
async def tables() -> None:
    """Creates what is missing, once for each event loop; after a failure the next request tries again."""
    for name, metadata in METADATA.items():
        try:
            async with aio.get_engine(name).begin() as connection:
                await connection.run_sync(metadata.create_all)
        except DBAPIError as error:
            if not made_by_another(error):
                raise


# -- orders ----------------------------------------------------------------------------------------------------


async def post_order(request: Request) -> Response:
    if media_type(request) == "application/json":
        order = await store(check_order(answers.json_object(await whole_body(request))))
        return answer(order.as_json(), 201, {"Location": path_for(request, "get_order", order_id=order.id)})
    if media_type(request) != "application/x-www-form-urlencoded":
        return answer(answers.failure(answers.NEITHER_JSON_NOR_FORM), 415)
    values = await form_values(request)
    try:
        await store(check_text_order(values))
    except BadInput as error:
        return await page(request, values, error.errors, 400)
    return RedirectResponse(path_for(request, "index"), 303)


async def store(values: dict[str, Any]) -> Order:
    order = Order(**values, created_at=now())
    orders.add(order)
    await orders.flush()  # the database gives it its id
    await commit_with_entry("order", order.id, f"{order.quantity} x {order.item}")
    return order


async def commit_with_entry(action: str, order_id: int | None, detail: str) -> None:
    """Commit what was written to `orders`, with an entry in the other database that says so; app.py says why so."""
    audit.add(answers.entry(action, order_id, detail))
    await audit.flush()
    await orders.commit()
    try:
        await audit.commit()
    except SQLAlchemyError as error:
        logger.error("The audit entry %r of order %s was not stored: %s", action, order_id, describe(error))


async def get_order(request: Request) -> Response:
    order_id = answers.checked_id(request.path_params["order_id"])
    order = await orders.get(Order, order_id)
    return answer(order.as_json()) if order else answer(answers.failure(f"there is no order {order_id}"), 404)


async def list_orders(request: Request) -> Response:
    return answer([order.as_json() for order in await orders.scalars(answers.listed(request.query_params))])


async def import_orders(request: Request) -> Response:
    """All or nothing, and no connection is held while the client sends, however long that takes."""
    if media_type(request) != "text/csv":
        return answer(answers.failure(answers.NOT_CSV), 415)
    with tempfile.TemporaryFile() as received:
        async for piece in pieces_of_body(request):
            received.write(piece)
        received.seek(0)
        rows = read_csv(iter(lambda: received.read(answers.PIECE_BYTES), b""))
        count = 0
        created_at = now()
        # In a thread: a file of nothing but empty lines has no batch for a long time. A bad line raises BadInput, and
        # the request's end rolls back what was inserted before it.
        while batch := await asyncio.to_thread(lambda: list(islice(rows, answers.BATCH_ROWS))):
            await orders.execute(insert(Order), [row | {"created_at": created_at} for row in batch])
            count += len(batch)
    if count:
        await commit_with_entry("import", None, f"{count} orders")
    return answer({"imported": count}, 201)


async def export_orders(_: Request) -> Response:
    """Read out of a server-side cursor while the client reads; the connection goes back when the request is over."""
    # Run here and not in the generator: a database that is down still becomes a 503, before anything was sent. And
    # a framework may read the generator in another task, which has no part in this request's sessions.
    result = await orders.stream(answers.EXPORT)

    async def body() -> AsyncIterator[str]:
        yield answers.CSV_FIRST_LINE
        async for rows in result.partitions():
            yield answers.csv_lines(rows)
            await asyncio.sleep(0)  # let other requests run, however fast this client reads

    return StreamingResponse(body(), media_type="text/csv", headers=answers.CSV_HEADERS)


# -- other pages -----------------------------------------------------------------------------------------------


async def slow(request: Request) -> Response:
    seconds = answers.checked_seconds(request.query_params)
    latest = await orders.scalar(answers.LATEST_ID)
    # What is slow below needs no database: give the connection back, or 20 such requests stop everybody else.
    await aio.release_dbsession()
    await asyncio.sleep(seconds)
    return answer({"slept": seconds, "latest_order": latest})


async def healthz(_: Request) -> Response:
    found = {}
    for name in answers.NAMES:
        pool: Any = aio.get_engine(name).pool
        in_use = pool.checkedout()
        # All connections in use is busy and not down: then it waits its turn, as the requests do.
        limit_s = answers.HEALTH_TIMEOUT_S if in_use < pool.size() else None
        started = time.monotonic()
        ok = False
        with suppress(SQLAlchemyError, TimeoutError):
            async with asyncio.timeout(limit_s):
                await aio.get_dbsession(name).execute(text("SELECT 1"))
            ok = True
        await aio.clear_dbsession()
        latency_ms = round((time.monotonic() - started) * 1000, 2)
        found[name] = {"ok": ok, "latency_ms": latency_ms, "in_use": in_use}
    ok = all(database["ok"] for database in found.values())
    return answer({"ok": ok, "worker": os.getpid(), "databases": found}, 200 if ok else 503)


async def index(request: Request) -> Response:
    return await page(request, {}, {})


async def page(
    request: Request, values: Any, errors: Any, status: int = 200, failure: str | None = None
) -> HTMLResponse:
    latest = (await orders.scalars(answers.LATEST)).all() if failure is None else []
    nonce = secrets.token_urlsafe(16)
    html = templates.get_template("orders.html").render(
        answers.page_values(latest, values, errors, nonce, failure), url_for=functools.partial(path_for, request)
    )
    return HTMLResponse(html, status, answers.page_headers(nonce))


# -- bodies and errors -----------------------------------------------------------------------------------------


def answer(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    # In ASCII, unlike Starlette's JSONResponse: what a client sent, such as half a surrogate pair, may be in a message.
    return Response(f"{json.dumps(value)}\n", status, headers, "application/json")


def path_for(request: Request, name: str, **parameters: Any) -> str:
    return f"{request.scope.get('root_path', '')}{request.app.url_path_for(name, **parameters)}"


def media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def pieces_of_body(request: Request) -> AsyncIterator[bytes]:
    """The body, piece by piece, of any length; BadInput if it does not arrive as a whole."""
    received = 0
    try:
        async for piece in request.stream():
            received += len(piece)
            yield piece
    except ClientDisconnect:
        raise answers.not_whole() from None
    if received < int(request.headers.get("content-length", 0)):
        raise answers.not_whole()


async def whole_body(request: Request) -> bytes:
    """The body, of limited length; BadInput if it does not arrive as a whole."""
    body = b""
    async for piece in pieces_of_body(request):
        body += piece
        if len(body) > answers.MOST_BODY_BYTES:
            raise HTTPException(413)
    return body


async def form_values(request: Request) -> dict[str, str]:
    """Return the form's values, read once: an error's handler gets a request of its own, with no body left."""
    if not hasattr(request.state, "form"):
        form = (await whole_body(request)).decode(errors="replace")
        fields = parse_qsl(form, keep_blank_values=True, errors="replace")
        request.state.form = dict(reversed(fields))  # of two the first, as in Flask
    values: dict[str, str] = request.state.form
    return values


async def bad_input(_: Request, error: Any) -> Response:
    return answer(error.as_json(), 400)


async def http_error(_: Request, error: Any) -> Response:
    """404, 405, 413 ... as JSON."""
    return answer(answers.failure(error.detail), error.status_code, error.headers)


async def server_error(_: Request, __: Exception) -> Response:
    return answer(answers.failure("internal error"), 500)  # the server logs it


async def database_failed(request: Request, error: Any) -> Response:
    # By type and number: the text has the values in it, and a customer's name does not belong in a log.
    logger.error("%s %s failed: %s", request.method, request.url.path, describe(error))
    status, message, headers = answers.database_failure(error)
    if answers.wants_page(request.headers.get("accept", "")):
        posted = media_type(request) == "application/x-www-form-urlencoded"
        response = await page(request, await form_values(request) if posted else {}, {}, status, message)
        response.headers.update(headers)
        return response
    return answer(answers.failure(message), status, headers)


# -- the application -------------------------------------------------------------------------------------------


def with_tables(view: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    @functools.wraps(view)
    async def endpoint(request: Request) -> Response:
        await tables()
        return await view(request)

    return endpoint


@asynccontextmanager
async def lifespan(_: Starlette) -> AsyncIterator[None]:
    try:
        await tables()
    except SQLAlchemyError as error:  # not fatal: a worker may start while a database restarts
        logger.warning("The tables could not be checked (%s): the first request tries again.", describe(error))
    yield


def create_app() -> Starlette:
    return Starlette(
        routes=[
            Route("/healthz", healthz),
            *(
                Route(path, with_tables(view), methods=[method])
                for path, view, method in (
                    ("/", index, "GET"),
                    ("/orders", post_order, "POST"),
                    ("/orders", list_orders, "GET"),
                    ("/orders/import", import_orders, "POST"),
                    ("/orders/{order_id}", get_order, "GET"),
                    ("/orders.csv", export_orders, "GET"),
                    ("/slow", slow, "GET"),
                )
            ),
        ],
        exception_handlers={
            BadInput: bad_input,
            HTTPException: http_error,
            SQLAlchemyError: database_failed,
            Exception: server_error,
        },
        lifespan=lifespan,
    )


app = aio.DBSessionMiddleware(create_app())
