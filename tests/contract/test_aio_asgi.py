"""aio.DBSessionMiddleware and the letter of ASGI 3, by hand: no server, no framework."""

from __future__ import annotations

import asyncio
import gc
import logging
import weakref
from types import MappingProxyType

import anyio
import pytest
from sqlalchemy import event, text

from dbsession.aio import DBSessionMiddleware, ScopeEnded, ScopeRequired, SessionManager
from dbsession.aio import scope as scopes

START = {"type": "http.response.start", "status": 200, "headers": []}
END = {"type": "http.response.body", "body": b"", "more_body": False}


@pytest.fixture
def manager(tmp_path):
    options = {"pool_size": 2, "pool_timeout": 20}
    manager = SessionManager(
        {name: {"url": f"sqlite:///{tmp_path}/{name}.db", "options": options} for name in ("default", "other")}
    )

    async def create():
        async with manager.running():
            await manager.get().execute(text("CREATE TABLE t (n INTEGER)"))
            await manager.get().commit()

    asyncio.run(create())
    return manager


@pytest.fixture
def session(manager):
    return manager.get()


def http(path="/orders/7", **more):
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "GET",
        "path": path,
        "query_string": b"secret=1",
        "headers": [],
        **more,
    }


def websocket(path="/chat"):
    return {"type": "websocket", "asgi": {"version": "3.0"}, "path": path, "query_string": b"secret=1", "headers": []}


LIFESPAN = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}


class Server:
    """What stands above the application: gives it `messages`, then a disconnect for ever, and keeps what it sends."""

    def __init__(self, *messages, on_send=None):
        self._messages = list(messages)
        self._on_send = on_send or (lambda message: None)
        self.sent = []

    async def receive(self):
        await asyncio.sleep(0)
        return self._messages.pop(0) if self._messages else {"type": "http.disconnect"}

    async def send(self, message):
        await asyncio.sleep(0)
        self._on_send(message)
        self.sent.append(message)

    @property
    def types(self):
        return [message["type"].removeprefix("lifespan.") for message in self.sent]

    async def call(self, app, scope=None):
        await app(http() if scope is None else scope, self.receive, self.send)


def lifespan_server(**more):
    return Server({"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}, **more)


def pool(manager, name="default"):
    return manager.engine(name).pool


def run(manager, main):
    """`main()` in a loop of its own; whatever happened in it, nothing is in use at its end."""

    async def bounded():
        async with asyncio.timeout(60), manager.running():
            try:
                return await main()
            finally:
                for name in ("default", "other"):
                    assert pool(manager, name).checkedout() == 0
                assert not any(scope.kind == "request" for scope in scopes.stack_here().scopes)

    return asyncio.run(bounded())


async def query(session, statement="SELECT 1"):
    return await session.scalar(text(statement))


# -- http ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scope", "label"),
    [
        (http(), "GET /orders/7"),
        (http(method="POST", path="/a\r\nWARNING \x1b[2J"), "POST /a\\r\\nWARNING \\x1b[2J"),
        (http(path="/shop/7", root_path="/shop"), "GET /shop/7"),  # ASGI's path includes the root_path
        (websocket(), "WEBSOCKET /chat"),
    ],
)
def test_call_has_a_scope_of_its_own_when_it_is_http_or_websocket(manager, session, scope, label):
    seen = []

    async def app(scope, receive, send):
        unit = scope["dbsession.scope"]
        assert unit is scopes.current()
        assert (unit.kind, unit.label, unit.ended) == ("request", label, False)
        await query(session)
        seen.append((unit, session()))

    async def main():
        for _ in range(2):
            await Server().call(DBSessionMiddleware(app), scope)
        assert scopes.current() is None

    run(manager, main)
    (first, one), (second, other) = seen
    assert first is not second and one is not other
    assert first.ended and not first.sessions


# -- the ASGI scope ------------------------------------------------------------------------------------------


KEY = "dbsession.scope"


@pytest.mark.parametrize("scope", [http(state={}), websocket() | {"state": {}}], ids=["http", "websocket"])
@pytest.mark.parametrize("end", ["returns", "raises", "is cancelled"])
def test_f41_what_stands_outside_sees_what_the_application_writes_into_the_scope(manager, scope, end):
    """Route, endpoint and path_params, for traces and metrics; of ours nothing is left."""
    found = {}

    async def app(scope, receive, send):
        scope |= {"route": "/orders/{id}", "endpoint": app, "path_params": {"id": 7}}
        scope["state"]["shared"] = True
        if end == "raises":
            raise LookupError
        if end == "is cancelled":
            asyncio.current_task().cancel()
            await asyncio.sleep(60)

    async def telemetry(scope, receive, send):
        try:
            await DBSessionMiddleware(app)(scope, receive, send)
        finally:
            found.update(scope)

    async def main():
        given = {**scope, "state": {}}
        await asyncio.gather(asyncio.create_task(Server().call(telemetry, given)), return_exceptions=True)
        written = {"route": "/orders/{id}", "endpoint": app, "path_params": {"id": 7}, "state": {"shared": True}}
        assert found == given == scope | written

    run(manager, main)


def test_f41_nested_middleware_writes_into_the_same_scope_and_puts_the_outer_ones_back(manager):
    """Also below a middleware that runs what is inside it in a child task, as Starlette's BaseHTTPMiddleware does."""
    units = []

    async def app(scope, receive, send):
        scope["route"] = "/orders/{id}"
        units.append(scope[KEY])

    def in_a_child(app):
        async def middle(scope, receive, send):
            await asyncio.create_task(app(scope, receive, send))

        return middle

    for between in (lambda app: app, in_a_child):
        inner = DBSessionMiddleware(app)

        async def outer(scope, receive, send, inner=inner, between=between):
            unit = scope[KEY]
            await between(inner)(scope, receive, send)
            assert scope[KEY] is unit and scope["route"] == "/orders/{id}"
            units.append(unit)

        async def main(outer=outer):
            given = http()
            await Server().call(DBSessionMiddleware(outer), given)
            assert given == http(route="/orders/{id}")

        run(manager, main)
    assert len(set(units)) == 4


def test_f41_scope_in_which_nobody_can_write_is_copied(manager):
    seen = []

    async def app(scope, receive, send):
        seen.append(scope[KEY].label)

    run(manager, lambda: Server().call(DBSessionMiddleware(app), MappingProxyType(http())))
    assert seen == ["GET /orders/7"]


@pytest.mark.parametrize("application", ["replaces it", "deletes it"])
def test_f41_what_the_application_puts_in_place_of_ours_stays(manager, application):
    async def app(scope, receive, send):
        del scope[KEY]
        if application == "replaces it":
            scope[KEY] = "its own"

    async def main():
        given = http()
        await Server().call(DBSessionMiddleware(app), given)
        assert given == (http(**{KEY: "its own"}) if application == "replaces it" else http())

    run(manager, main)


def test_f41_two_calls_at_once_with_one_scope_have_one_each(manager):
    """As no server gives them: nothing of either is left in it."""
    both = asyncio.Event()

    async def app(scope, receive, send):
        unit = scope[KEY]
        await send({"unit": unit})
        if len(sent.sent) == 2:
            both.set()
        await both.wait()
        assert scope[KEY] is unit is scopes.current()

    sent = Server()

    async def main():
        given = http()
        await asyncio.gather(*[sent.call(DBSessionMiddleware(app), given) for _ in range(2)])
        assert given == http() and sent.sent[0]["unit"] is not sent.sent[1]["unit"]

    run(manager, main)


@pytest.mark.parametrize("when", ["before the response", "in mid-stream", "after the response", "never"])
def test_sessions_are_closed_when_the_application_raises(manager, session, when):
    boom = RuntimeError("raised by the application")
    other = manager.get("other")

    async def app(scope, receive, send):
        await query(session)
        await query(other)
        if when == "before the response":
            raise boom
        await send(START)
        if when == "in mid-stream":
            raise boom
        await send(END)
        if when == "after the response":
            raise boom

    async def main():
        server = Server()
        raised = None
        try:
            await server.call(DBSessionMiddleware(app))
        except RuntimeError as error:
            raised = error
        assert raised is (None if when == "never" else boom)
        assert server.sent == {"before the response": [], "in mid-stream": [START]}.get(when, [START, END])
        assert pool(manager).checkedout() == pool(manager, "other").checkedout() == 0
        assert pool(manager).checkedin() == 1  # given back, not thrown away

    run(manager, main)


def test_session_stays_until_the_call_returns_when_a_body_is_streamed(manager, session):
    async def app(scope, receive, send):
        await session.execute(text("INSERT INTO t VALUES (7)"))
        mine = session()
        await send(START)
        for _ in range(3):
            assert session() is mine and await query(session, "SELECT n FROM t") == 7
            await send({"type": "http.response.body", "body": b"7", "more_body": True})
        await send(END)
        # As a background task of Starlette.
        assert session() is mine and await query(session, "SELECT n FROM t") == 7

    async def main():
        server = Server(on_send=lambda message: in_use.append(pool(manager).checkedout()))
        in_use = []
        await server.call(DBSessionMiddleware(app))
        assert in_use == [1] * 5 and pool(manager).checkedout() == 0
        async with manager.scope():
            assert await query(session, "SELECT COUNT(*) FROM t") == 0  # nothing is committed for you

    run(manager, main)


def test_session_raises_when_it_is_used_after_the_request(manager, session):
    kept = []

    async def app(scope, receive, send):
        kept.extend((session(), scope["dbsession.scope"]))
        await query(session)

    async def main():
        await Server().call(DBSessionMiddleware(app))
        with pytest.raises(Exception, match="closed"):
            await query(kept[0])
        # The ended scope is nobody's current one any more: what goes on in this task opens one of its own.
        assert session() is not kept[0]
        scopes.stack_here().push(kept[1])
        with pytest.raises(ScopeEnded):
            session()
        scopes.stack_here().unlink(kept[1])

    run(manager, main)


def test_sessions_are_freed_without_gc_when_requests_are_over(manager, session):
    alive = weakref.WeakSet()

    async def app(scope, receive, send):
        alive.add(session())
        alive.add(scope["dbsession.scope"])
        await query(session)

    async def main():
        gc.collect()
        gc.disable()
        try:
            for _ in range(20):
                await Server().call(DBSessionMiddleware(app))
            assert len(alive) == 0
        finally:
            gc.enable()

    run(manager, main)


# -- cancellation --------------------------------------------------------------------------------------------


def waiting_app(session, waits):
    async def app(scope, receive, send):
        await session.execute(text("INSERT INTO t VALUES (1)"))
        await send(START)
        waits.set()
        await asyncio.Event().wait()

    return app


def test_sessions_are_closed_when_the_call_is_cancelled(manager, session):
    """As gunicorn and uvicorn do to it when the client is gone, or the server ends."""

    async def main():
        waits = asyncio.Event()
        task = asyncio.create_task(Server().call(DBSessionMiddleware(waiting_app(session, waits))))
        await waits.wait()
        assert pool(manager).checkedout() == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert pool(manager).checkedout() == 0
        assert pool(manager).checkedin() == 1  # rolled back
        async with manager.scope():
            assert await query(session, "SELECT COUNT(*) FROM t") == 0

    run(manager, main)


def test_sessions_are_closed_and_cancellation_passes_when_it_lands_in_teardown(manager, session):
    other = manager.get("other")

    async def app(scope, receive, send):
        await query(session)
        await query(other)
        await send(START)
        await send(END)
        asyncio.current_task().cancel()  # arrives at the next await, which is the first one of the teardown

    async def main():
        server = Server()
        task = asyncio.create_task(server.call(DBSessionMiddleware(app)))
        with pytest.raises(asyncio.CancelledError):
            await task
        assert server.sent == [START, END]
        assert pool(manager).checkedout() == pool(manager, "other").checkedout() == 0

    run(manager, main)


@pytest.mark.parametrize("when", ["while it waits", "while it queries", "before the end"])
def test_sessions_are_closed_when_an_anyio_scope_cancels_every_await(manager, session, when):
    """Starlette's BaseHTTPMiddleware and StreamingResponse end their tasks so: CancelledError again at each await."""
    other = manager.get("other")

    async def main():
        with anyio.CancelScope() as cancelling:

            async def app(scope, receive, send):
                await query(session)
                await query(other)
                if when == "while it queries":
                    asyncio.get_running_loop().call_soon(cancelling.cancel)
                    while True:
                        await query(session)
                cancelling.cancel()
                if when == "while it waits":
                    await asyncio.Event().wait()

            await Server().call(DBSessionMiddleware(app))
        assert cancelling.cancelled_caught
        assert pool(manager).checkedout() == pool(manager, "other").checkedout() == 0

    run(manager, main)


# -- teardown that fails -------------------------------------------------------------------------------------


def test_response_stays_as_it_is_when_a_session_fails_to_close(manager, session, caplog):
    other = manager.get("other")

    async def app(scope, receive, send):
        await query(session)
        await query(other)
        failing = session().sync_session

        @event.listens_for(failing, "after_transaction_end")
        def fail(*_):
            raise OSError("secret")

        await send(START)
        await send(END)

    async def main():
        server = Server()
        await server.call(DBSessionMiddleware(app))
        assert server.sent == [START, END]
        assert pool(manager).checkedout() == pool(manager, "other").checkedout() == 0

    run(manager, main)
    messages = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(messages) == 1 and "'default'" in messages[0] and "GET /orders/7" in messages[0], messages
    assert "secret" not in caplog.text


def test_response_stays_as_it_is_when_a_session_without_connection_fails_to_close(manager, session, caplog):
    other = manager.get("other")

    async def app(scope, receive, send):
        await query(other)
        unused = session().sync_session
        unused.begin()

        @event.listens_for(unused, "after_transaction_end")
        def fail(*_):
            raise OSError("secret")

        await send(START)
        await send(END)

    async def main():
        server = Server()
        await server.call(DBSessionMiddleware(app))
        assert server.sent == [START, END]
        assert pool(manager, "other").checkedout() == 0

    run(manager, main)
    messages = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(messages) == 1 and "'default'" in messages[0], messages


# -- nested calls, children, threads -------------------------------------------------------------------------


def test_f05_nested_call_leaves_the_outer_one_alone(manager, session):
    async def inner(scope, receive, send):
        unit = scope["dbsession.scope"]
        assert await query(session, "SELECT COUNT(*) FROM t") == 0  # another connection
        await send({"unit": unit, "session": session()})

    async def outer(scope, receive, send):
        unit, mine = scope["dbsession.scope"], session()
        await session.execute(text("INSERT INTO t VALUES (1)"))
        server = Server()
        await server.call(DBSessionMiddleware(inner), scope)  # with the very scope it got
        assert server.sent[0]["unit"] is not unit and server.sent[0]["session"] is not mine
        assert scope["dbsession.scope"] is unit is scopes.current()
        assert session() is mine
        await session.commit()

    async def main():
        await Server().call(DBSessionMiddleware(outer))
        async with manager.scope():
            assert await query(session, "SELECT COUNT(*) FROM t") == 1

    run(manager, main)


def test_nested_calls_have_a_scope_each_when_they_run_at_once(manager, session):
    async def inner(scope, receive, send):
        await asyncio.sleep(0)
        await send({"unit": scope["dbsession.scope"], "current": scopes.current()})

    async def outer(scope, receive, send):
        servers = [Server(), Server()]
        await asyncio.gather(*(server.call(DBSessionMiddleware(inner), scope) for server in servers))
        units = {server.sent[0]["unit"] for server in servers}
        assert len(units | {scope["dbsession.scope"]}) == 3
        assert all(server.sent[0]["unit"] is server.sent[0]["current"] for server in servers)

    run(manager, lambda: Server().call(DBSessionMiddleware(outer)))


def test_child_task_has_a_scope_of_its_own_which_ends_with_it(manager, session):
    async def main():
        closed = asyncio.Event()

        async def child():
            await query(session)
            event.listen(pool(manager), "checkin", lambda *_: closed.set())
            return session()

        async def app(scope, receive, send):
            await query(session)
            assert await asyncio.create_task(child()) is not session()
            await closed.wait()  # while the request goes on
            assert pool(manager).checkedout() == 1

        await Server().call(DBSessionMiddleware(app))

    run(manager, main)


def test_thread_gets_the_clear_error_when_it_uses_the_session(manager, session):
    """What happens to a `def` endpoint."""

    async def app(scope, receive, send):
        await query(session)
        with pytest.raises(ScopeRequired, match="a framework runs `def` endpoints in threads"):
            await asyncio.to_thread(session)

    run(manager, lambda: Server().call(DBSessionMiddleware(app)))


# -- websocket -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["returns", "raises", "is cancelled"])
def test_websocket_has_one_session_until_its_call_ends(manager, session, end):
    async def app(scope, receive, send):
        await receive()
        await send({"type": "websocket.accept"})
        mine = session()
        while (message := await receive())["type"] == "websocket.receive":
            assert session() is mine
            await send({"type": "websocket.send", "text": await query(session, f"SELECT '{message['text']}'")})
        if end == "raises":
            raise OSError("gone")
        if end == "is cancelled":
            asyncio.current_task().cancel()
            await asyncio.Event().wait()

    async def main():
        texts = [{"type": "websocket.receive", "text": each} for each in "abc"]
        server = Server({"type": "websocket.connect"}, *texts, {"type": "websocket.disconnect"})
        task = asyncio.create_task(server.call(DBSessionMiddleware(app), websocket()))
        await asyncio.wait([task])
        assert [message.get("text") for message in server.sent] == [None, "a", "b", "c"]
        assert task.cancelled() if end == "is cancelled" else (task.exception() is not None) == (end == "raises")
        assert pool(manager).checkedout() == 0

    run(manager, main)


# -- lifespan, and the rest ----------------------------------------------------------------------------------


def lifespan_app(session, *, startup="complete", shutdown="complete"):
    async def app(scope, receive, send):
        await receive()
        await query(session)
        await send({"type": f"lifespan.startup.{startup}"})
        if startup == "failed":
            raise RuntimeError("startup")
        await query(session)
        assert (await receive())["type"] == "lifespan.shutdown"
        await query(session)
        await send({"type": f"lifespan.shutdown.{shutdown}"})

    return app


def test_lifespan_gives_connections_back_before_the_server_hears_of_its_steps(manager, session, tmp_path):
    second = SessionManager({"default": f"sqlite:///{tmp_path}/second.db"})

    async def main():
        seen = {}

        def note(message):
            pools = pool(manager), pool(second)
            seen[message["type"]] = [(each.checkedout(), each.checkedin()) for each in pools]

        async def app(scope, receive, send):
            await query(second.get())
            await second.clear()
            await lifespan_app(session)(scope, receive, send)

        server = lifespan_server(on_send=note)
        await server.call(DBSessionMiddleware(app), LIFESPAN)
        assert server.types == ["startup.complete", "shutdown.complete"]
        assert seen["lifespan.startup.complete"] == [(0, 1), (0, 1)]
        assert seen["lifespan.shutdown.complete"] == [(0, 0), (0, 0)]
        engine = manager.engine()
        async with manager.scope():
            assert await query(session) == 1  # the engines stay usable
        assert manager.engine() is engine

    run(manager, main)


@pytest.mark.parametrize(
    ("app", "types"),
    [
        ({"startup": "failed"}, ["startup.failed"]),
        ({"shutdown": "failed"}, ["startup.complete", "shutdown.failed"]),
    ],
)
def test_lifespan_disposes_when_a_step_fails(manager, session, app, types):
    async def main():
        server = lifespan_server(
            on_send=lambda message: idle.update({message["type"]: pool(manager).checkedin()}),
        )
        idle = {}
        call = server.call(DBSessionMiddleware(lifespan_app(session, **app)), LIFESPAN)
        if "startup" in app:
            with pytest.raises(RuntimeError, match="startup"):
                await call
        else:
            await call
        assert server.types == types
        assert idle[server.sent[-1]["type"]] == 0

    run(manager, main)


def test_lifespan_waits_for_sessions_that_are_being_closed(manager, session):
    """Those of tasks that ended just now."""

    async def main():
        async def use():
            await query(session)

        async def app(scope, receive, send):
            await asyncio.gather(use(), use())
            await send({"type": "lifespan.shutdown.complete"})

        server = lifespan_server(on_send=lambda _: found.append(pool(manager).checkedin() + pool(manager).checkedout()))
        found = []
        await server.call(DBSessionMiddleware(app), LIFESPAN)
        assert found == [0]

    run(manager, main)


@pytest.mark.parametrize("end", ["raises", "returns"])
def test_lifespan_is_not_answered_for_an_application_that_has_none(manager, session, end):
    """The server decides what that means: uvicorn and gunicorn serve it without."""
    unsupported = AssertionError("http only")

    async def app(scope, receive, send):
        assert scope is LIFESPAN
        if end == "raises":
            raise unsupported

    async def main():
        server = lifespan_server()
        raised = None
        try:
            await server.call(DBSessionMiddleware(app), LIFESPAN)
        except AssertionError as error:
            raised = error
        assert raised is (unsupported if end == "raises" else None)
        assert server.sent == []

    run(manager, main)


def test_lifespan_disposes_when_the_server_cancels_it(manager, session):
    async def main():
        started = asyncio.Event()

        async def app(scope, receive, send):
            await query(session)
            await send({"type": "lifespan.startup.complete"})
            await query(session)
            started.set()
            await asyncio.Event().wait()

        task = asyncio.create_task(lifespan_server().call(DBSessionMiddleware(app), LIFESPAN))
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert pool(manager).checkedin() == pool(manager).checkedout() == 0

    run(manager, main)


def test_lifespan_completes_when_an_engine_fails_to_close(manager, session, caplog, monkeypatch):
    async def main():
        server = lifespan_server()

        async def fail():
            raise OSError("secret")

        async with manager.scope():
            await query(manager.get("other"))
        database = manager.database("default")
        monkeypatch.setattr(database, "dispose", fail)
        await server.call(DBSessionMiddleware(lifespan_app(session)), LIFESPAN)
        assert server.types == ["startup.complete", "shutdown.complete"]
        assert pool(manager, "other").checkedin() == 0
        monkeypatch.undo()

    run(manager, main)
    messages = {record.getMessage() for record in caplog.records}
    assert messages == {"Database 'default': its engine failed to close: OSError."}


def test_unknown_type_is_passed_on_untouched():
    given = ({"type": "telemetry"}, object(), object())

    async def app(*arguments):
        assert all(one is other for one, other in zip(arguments, given, strict=True))
        assert scopes.current() is None

    asyncio.run(DBSessionMiddleware(app)(*given))
