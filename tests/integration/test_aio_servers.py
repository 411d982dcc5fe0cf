"""aio.DBSessionMiddleware under real uvicorn and gunicorn (its asgi worker), asyncio and uvloop, with Starlette and
FastAPI, on SQLite and MariaDB."""

from __future__ import annotations

import json
import re
import secrets
import socket
import struct
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import create_engine, text
from websockets.sync.client import connect

from support.gunicorn import Gunicorn
from support.uvicorn import Uvicorn
from support.waiting import wait_until

# Server, its loop, the application of support.asgi_app, the database.
ALL = [
    (server, loop, "starlette_app", database)
    for server in ("uvicorn", "gunicorn")
    for loop in ("asyncio", "uvloop")
    for database in ("sqlite", "mariadb")
] + [
    ("uvicorn", "asyncio", "fastapi_app", "sqlite"),
    ("uvicorn", "uvloop", "fastapi_app", "mariadb"),
    ("gunicorn", "asyncio", "fastapi_app", "mariadb"),
    ("uvicorn", "asyncio", "layered_app", "mariadb"),
    ("gunicorn", "asyncio", "layered_app", "mariadb"),
    ("uvicorn", "asyncio", "layered_app", "sqlite"),
]
BARE = [(server, "asyncio", "bare_app", database) for server, _, app, database in ALL[::2] if app == "starlette_app"]

# What no log may have in it; and of errors only those that the tests themselves make an endpoint raise.
BAD = re.compile(r".*(?:Warning|different loop|never retrieved|never awaited|DBS-).*")
RAISED = re.compile(r"^[ |+]*([\w.]+(?:Error|Exception|Exit)(?:: .*)?)$", re.M)


class Serving:
    """One server at work on a database of its own."""

    def __init__(self, request, tmp_path_factory, server, loop, app, database):
        self.server, self.loop, self.app, self.database = server, loop, app, database
        self.name = f"aio_{secrets.token_hex(4)}"
        self.mariadb = None
        if database == "mariadb":
            self.mariadb = request.getfixturevalue("mariadb")
            self.url = self.mariadb.create_database(self.name)
        else:
            self.url = f"sqlite:///{tmp_path_factory.mktemp('aio')}/a.db"
        engine = create_engine(self.url)
        with engine.begin() as connection:
            connection.execute(text("CREATE TABLE t (n INTEGER)"))
        engine.dispose()

    def run(self, graceful_s=20):
        """Who needs more is killed, and has neither told the database nor closed its files."""
        target = f"support.asgi_app:{self.app}"
        # Python's development mode: warnings are shown, and asyncio looks for mistakes.
        env = {"DBSESSION_URL": self.url, "PYTHONDEVMODE": "1"}
        if self.server == "uvicorn":
            return Uvicorn(target, f"--loop={self.loop}", f"--timeout-graceful-shutdown={graceful_s}", env=env)
        arguments = ["--worker-class=asgi", f"--asgi-loop={self.loop}", f"--graceful-timeout={graceful_s}"]
        arguments += ["--asgi-disconnect-grace-period=1"]
        return Gunicorn(target, *arguments, env=env, ready="/state")

    def gone(self):
        """The database has no connection of it any more."""
        if self.mariadb:
            wait_until(lambda: all(process["db"] != self.name for process in self.mariadb.processlist()), 30)
            self.mariadb.drop_database(self.name)

    def end(self, server, *, cut=False):
        """SIGTERM. Nothing is left, each connection said so to the database unless they are `cut`; the log is clean."""
        before = self.mariadb and self.mariadb.status("Aborted_clients")
        server.term()
        server.wait(40)
        self.gone()
        assert cut or not self.mariadb or self.mariadb.status("Aborted_clients") == before
        log = server.logs()
        assert not BAD.findall(log), log
        assert set(RAISED.findall(log)) <= {"RuntimeError: raised by the probe"}, log
        if self.app != "bare_app":
            assert "the application's shutdown read 42" in log


# The others take minutes.
QUICK = [
    ("uvicorn", "uvloop", "fastapi_app", "mariadb"),
    ("gunicorn", "asyncio", "starlette_app", "mariadb"),
    ("uvicorn", "asyncio", "layered_app", "sqlite"),
]
assert set(QUICK) <= set(ALL)


@pytest.fixture(
    scope="module",
    params=[pytest.param(each, marks=[] if each in QUICK else pytest.mark.slow, id="-".join(each)) for each in ALL],
)
def serving(request, tmp_path_factory):
    found = Serving(request, tmp_path_factory, *request.param)
    with found.run() as server:
        server.serving = found
        yield server
        found.end(server)


@pytest.fixture
def server(serving):
    yield serving
    nothing_in_use(serving)


def state(server):
    return json.loads(server.get("/state").body)


def nothing_in_use(server):
    wait_until(lambda: state(server)["checked_out"] == state(server)["sessions"] == 0, 30, "nothing is in use")


def all_at_once(server, paths):
    with ThreadPoolExecutor(len(paths)) as pool:
        return [answer.text for answer in pool.map(lambda path: server.get(path, timeout_s=60), paths)]


def test_server_runs_as_it_was_told(server):
    found = state(server)
    assert found["loop"] == server.serving.loop
    assert not found["gevent"]


def test_concurrent_requests_have_a_session_and_a_connection_each(server):
    answers = all_at_once(server, [f"/meet?name={secrets.token_hex(4)}"] * 50)
    sessions, connections = zip(*(answer.split(":") for answer in answers), strict=True)
    assert len(set(sessions)) == len(set(connections)) == 50


def test_concurrent_requests_read_their_own_rows(server):
    tokens = [f"t{n}" for n in range(60)]
    assert all_at_once(server, [f"/token?token={each}" for each in tokens]) == [f"{each}/{each}" for each in tokens]


def test_work_is_rolled_back_when_nobody_commits(server):
    connection = server.connect()  # kept alive: the same task of gunicorn's serves both
    try:
        for path, expected in (("/write?n=1", "written"), ("/count?n=1", "0"), ("/write?n=2&commit=1", "written")):
            connection.request("GET", path)
            assert connection.getresponse().read().decode() == expected
    finally:
        connection.close()
    assert server.get("/count?n=2").text == "1"


def test_body_is_streamed_from_the_database(server):
    answer = server.get("/stream?rows=30")
    assert [line.split()[0] for line in answer.text.splitlines()] == [str(n) for n in range(30)]


def test_sessions_are_closed_when_the_client_leaves_in_mid_stream(server):
    clients = []
    for _ in range(5):
        client = socket.create_connection(("127.0.0.1", server.port), timeout=30)
        client.sendall(b"GET /stream?rows=1000000000 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"200 OK" in client.recv(4096)
        clients.append(client)
    wait_until(lambda: state(server)["checked_out"] >= 5, 30, "all five are at it")
    for client in clients:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
        client.close()
    nothing_in_use(server)


def test_sessions_are_closed_when_the_endpoint_raises(server):
    for _ in range(3):
        assert server.get("/fail").status == 500


def test_def_endpoint_gets_the_clear_error(server):
    answer = server.get("/def")
    assert answer.status == 503
    assert "use it in an `async def` function" in answer.text and "DBS-SCOPE-REQUIRED" in answer.text


def test_f41_telemetry_outside_sees_the_endpoint_and_its_parameters(server):
    """Of a mounted application's, too."""
    for path in ("/item/7", "/mounted/item/8"):
        assert server.get(path).text == path[-1]
    for path in ("/item/7", "/mounted/item/8"):
        seen = wait_until(lambda path=path: json.loads(server.get("/seen").body).get(path), 30, "the call is over")
        assert seen == ["item", {"n": path[-1]}, False]


def test_background_task_has_the_session_of_its_request(server):
    n = secrets.randbelow(10**6) + 10
    assert server.get(f"/background?n={n}").text == "later"
    wait_until(lambda: server.get(f"/count?n={n}").text == "1", 30, "it has committed")


@pytest.mark.parametrize("end", ["close", "reset"])
def test_websocket_reads_from_the_database_until_its_client_leaves(server, end):
    with connect(f"ws://127.0.0.1:{server.port}/chat", open_timeout=30, close_timeout=10) as client:
        for message in ("one", "two"):
            client.send(message)
            assert client.recv(timeout=30) == message
        assert state(server)["checked_out"] == 1
        if end == "reset":
            client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.socket.shutdown(socket.SHUT_RDWR)
    nothing_in_use(server)


@pytest.mark.parametrize("server_name", ["uvicorn", pytest.param("gunicorn", marks=pytest.mark.slow)])
def test_dependency_of_fastapi_commits_what_the_endpoint_did(request, tmp_path_factory, server_name):
    serving = Serving(request, tmp_path_factory, server_name, "asyncio", "fastapi_app", "sqlite")
    with serving.run() as server:
        assert server.get("/dependency?n=7").text == "7"
        # FastAPI runs what stands after the `yield` when the response has left.
        wait_until(lambda: server.get("/count?n=7").text == "1", 30, "it has committed")
        assert server.get("/dependency?n=-7").status == 500
        nothing_in_use(server)
        assert server.get("/count?n=-7").text == "0"
        serving.end(server)


@pytest.mark.slow
@pytest.mark.parametrize("param", BARE, ids="-".join)
def test_connections_are_gone_when_an_application_without_lifespan_ends(request, tmp_path_factory, param):
    serving = Serving(request, tmp_path_factory, *param)
    with serving.run() as server:
        assert server.get("/count?n=1").text == "0"
        nothing_in_use(server)
        # uvicorn raises the SIGTERM again before its loop has ended: nothing of ours runs any more.
        serving.end(server, cut=serving.server == "uvicorn")


@pytest.mark.slow
@pytest.mark.parametrize("server_name", ["uvicorn", "gunicorn"])
def test_connections_are_gone_when_a_client_is_still_there_at_the_end(request, tmp_path_factory, server_name):
    """A stream that goes on for ever, and a SIGTERM: both servers give it their graceful timeout. uvicorn then cancels
    it, of gunicorn the master kills the worker."""
    serving = Serving(request, tmp_path_factory, server_name, "asyncio", "starlette_app", "mariadb")
    running = serving.run(graceful_s=2)
    with running as server, socket.create_connection(("127.0.0.1", server.port), timeout=30) as client:
        client.sendall(b"GET /stream?rows=1000000000 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"200 OK" in client.recv(4096)
        server.term()
        server.wait(40)
        serving.gone()
