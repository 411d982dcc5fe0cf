"""`holding_app` in ASGI: its requests hold a connection until they are told. What looks on from outside is in it, too:
the inspection socket in the folder DBSESSION_INSPECT, and Prometheus's page at /metrics."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import prometheus_client
from sqlalchemy import text

import dbsession
import dbsession.watch.metrics
from dbsession import aio

OPTIONS = {"pool_size": 2, "pool_timeout": 0.2}
aio.configure({"default": {"url": os.environ["HOLDING_URL"], "options": OPTIONS}})
session = aio.get_dbsession()
metrics = prometheus_client.make_asgi_app()
_released = asyncio.Event()


async def app(scope: Any, receive: Any, send: Any) -> None:
    global _released
    if scope["type"] == "lifespan":
        await receive()
        dbsession.serve_snapshots(os.environ["DBSESSION_INSPECT"])
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})
        return
    body, path = b"", scope["path"]
    if path.startswith("/hold/"):
        try:
            await session.execute(text("SELECT 'a literal' AS held"))
        except dbsession.PoolTimeout as error:
            body = str(error).encode()
        else:
            await asyncio.wait_for(_released.wait(), 240)
    elif path == "/release":  # all of them
        _released.set()
        _released = asyncio.Event()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


_managed = aio.DBSessionMiddleware(app)


async def application(scope: Any, receive: Any, send: Any) -> None:
    await (metrics if scope.get("path") == "/metrics" else _managed)(scope, receive, send)
