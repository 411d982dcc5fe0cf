"""DBSessionMiddleware for ASGI: one scope for each request or websocket, until the application's call returns."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from dbsession.aio import engine
from dbsession.aio.scope import Scope, SessionScope, Stack, begin, here
from dbsession.errors import plain

ASGIScope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
ASGIApp = Callable[[ASGIScope, Receive, Send], Awaitable[None]]

_KEY = "dbsession.scope"


class DBSessionMiddleware:
    """Wraps an ASGI 3 application. Lives as long as it; each request and each websocket has a scope of its own, found
    in `scope["dbsession.scope"]`, which is current in the task that runs the application's call.

    The scope ends, and its sessions are closed, when that call returns, raises or is cancelled, as gunicorn does to it
    when the client is gone (under uvicorn it runs on). So they stay while a body is streamed, after its last part while
    background tasks of the framework run, and as long as a websocket is open: there commit or `release_dbsession()`
    before you wait for the next message, or the connection stays taken meanwhile.

    What a framework runs in a child task (Starlette under ASGI before 2.4, its BaseHTTPMiddleware) has a scope of its
    own, closed when the task is done; a `def` endpoint runs in a thread, and gets ScopeRequired.

    Put it outermost, so that nothing of the application runs outside it. Teardown never changes a response already
    made: what fails is logged, only a cancellation that lands in it is raised.

    `lifespan` has a scope, too, whose sessions are closed when the startup is complete, and again at the end. After the
    application's own shutdown, and before the server hears of it, the idle connections of every engine of the loop are
    closed, of each SessionManager. An application without lifespan leaves that to the end of the loop, which
    uvicorn does not reach when a SIGTERM ends it: then the server is not told, and sees its connections cut.

    Awaits in teardown, for at most 5 seconds where a transaction is open.
    """

    def __init__(self, app: ASGIApp) -> None:
        if not callable(app):
            raise TypeError(f"DBSessionMiddleware wraps an ASGI application, and was given a {type(app).__qualname__}.")
        self.app = app

    async def __call__(self, scope: ASGIScope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            label = f"{scope['method']} {scope['path']}"
        elif scope["type"] == "websocket":
            label = f"WEBSOCKET {scope['path']}"
        elif scope["type"] == "lifespan":
            await self._lifespan(scope, receive, send)
            return
        else:
            await self.app(scope, receive, send)
            return
        if not label.isprintable():  # a client may send any character; a line end in a label would forge a log line
            label = plain(label)
        stack = here()  # the calling task's, or that of the one whose child it is
        before = scope.get(_KEY)
        current = begin(label, "request")

        def noting(message: MutableMapping[str, Any]) -> Awaitable[None]:
            if message.get("type") == "http.response.start":
                current.failed = message["status"] >= 400  # for which an application drops its work on purpose
            return send(message)

        try:
            await self.app(_noted(scope, current, before, stack), receive, noting)
        except BaseException:
            current.failed = True
            raise
        finally:
            try:
                _take_back(scope, current, before)
            finally:
                await current.leave()

    async def _lifespan(self, scope: ASGIScope, receive: Receive, send: Send) -> None:
        async def send_when_closed(message: MutableMapping[str, Any]) -> None:
            await current.clear()
            if message["type"] != "lifespan.startup.complete":
                await engine.dispose_here()
            await send(message)

        # Without it the first query at the startup would hold its connection until the server ends.
        try:
            async with SessionScope("the application's lifespan") as current:
                await self.app(scope, receive, send_when_closed)
        finally:
            await engine.dispose_here()  # it has been cancelled, or has no lifespan


def _noted(scope: ASGIScope, current: Scope, before: Any, stack: Stack | None) -> ASGIScope:
    """Return the ASGI scope for the application, with `current` in it in place of what was there `before`.

    It is the server's own, and not the copy that the specification asks for: frameworks write route, endpoint and
    path_params into it, and what stands above us reads them there. It is a copy where nobody can write to it, and where
    another call works with it at this moment: what that one noted is none of ours, nor of the task's whose child we
    are.
    """
    if before is None or (stack is not None and before in stack.scopes):
        try:
            scope[_KEY] = current
            return scope
        except Exception:  # a mapping that is read-only
            pass
    return {**scope, _KEY: current}


def _take_back(scope: ASGIScope, current: Scope, before: Any) -> None:
    if scope.get(_KEY) is not current:
        return  # it was given a copy, or has put something else there
    if before is None:
        del scope[_KEY]
    else:
        scope[_KEY] = before
