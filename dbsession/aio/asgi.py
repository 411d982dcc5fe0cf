"""DBSessionMiddleware for ASGI: one scope for each request or websocket, until the application's call returns."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from dbsession.aio.block import SessionScope
from dbsession.errors import plain

ASGIScope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
ASGIApp = Callable[[ASGIScope, Receive, Send], Awaitable[None]]


class DBSessionMiddleware:
    """Wraps an ASGI 3 application."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: ASGIScope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        label = plain(f"{scope.get('method', 'WEBSOCKET')} {scope.get('root_path', '')}{scope['path']}")
        async with SessionScope(label, "request") as unit:
            scope["dbsession.scope"] = unit
            await self.app(scope, receive, send)
