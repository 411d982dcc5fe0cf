"""A request's deadline under real gunicorn 27: the bytes that the client gets, and what is left behind."""

from __future__ import annotations

import http.client
import itertools
import json
import socket
import time
from pathlib import Path

import pytest

from support.gunicorn import PRELOAD, Gunicorn
from support.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
AT_THE_TOP = ROOT / "deploy" / "gunicorn.conf.py"
BY_THE_WORKER = Path(__file__).with_name("gunicorn_late.conf.py")
DEADLINE_S = 2  # more than a request that is not late takes anywhere


def serve(tmp_path, *arguments, config=AT_THE_TOP, worker="gevent", **more):
    return Gunicorn(
        "support.deadline_app:wrapped",
        f"--worker-class={worker}",
        "--graceful-timeout=5",
        *arguments,
        config=config,
        env={"DBSESSION_URL": more.pop("url", f"sqlite:///{tmp_path}/a.db"), "PROBE_DEADLINE_S": str(DEADLINE_S)},
        ready="/state",
        **more,
    )


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("d")) as server:
        yield server


def connect(server, path, method="GET", *headers):
    client = socket.create_connection(("127.0.0.1", server.port), 30)
    lines = [f"{method} {path} HTTP/1.1", "Host: x", *headers, "", ""]
    client.sendall("\r\n".join(lines).encode())
    return client


def exchange(server, path, method="GET", *headers):
    """Every byte the server sends until it closes the connection."""
    with connect(server, path, method, "Connection: close", *headers) as client:
        return b"".join(iter(lambda: client.recv(65536), b""))


def nothing_in_use(server):
    wait_until(lambda: json.loads(server.get("/state").body)["checked_out"] == 0, 30)


def reports(server, path):
    return server.logs().count(f"{path} was not over within its deadline of {DEADLINE_S} s; it was ended.")


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(AT_THE_TOP, id="patched at the top"),
        pytest.param(BY_THE_WORKER, id="patched by the worker", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("preload", PRELOAD)
def test_late_request_gets_a_503_however_gevent_came_in(tmp_path, config, preload):
    with serve(tmp_path, *preload, config=config) as server:
        answer = server.get("/late-list")
        assert answer.status == 503 and answer.headers["X-Own"] is None
        nothing_in_use(server)
        assert server.get("/query").text == "42"
        assert reports(server, "/late-list") == 1


@pytest.mark.parametrize("path", ["/late-list", "/late"])
@pytest.mark.parametrize(
    "accept, kind",
    [("text/html, */*", b"text/plain"), pytest.param("application/json", b"application/json", marks=pytest.mark.slow)],
)
def test_503_is_the_only_reply_on_the_wire(server, path, accept, kind):
    """/late has given start_response() its own headers, and an empty chunk to send."""
    raw = exchange(server, path, "GET", f"Accept: {accept}")
    head, _, body = raw.partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    assert lines[0] == b"HTTP/1.1 503 Service Unavailable"
    assert raw.count(b"HTTP/1.") == 1 and b"X-Own" not in raw
    names = [line.partition(b":")[0].lower() for line in lines[1:]]
    assert len(names) == len(set(names)), names
    headers = {name: value.strip() for name, _, value in (line.partition(b":") for line in lines[1:])}
    assert headers[b"Content-Type"].startswith(kind) and headers[b"Retry-After"] == b"%d" % DEADLINE_S
    assert int(headers[b"Content-Length"]) == len(body) > 0 and b"Transfer-Encoding" not in headers
    if accept == "application/json":
        assert json.loads(body)["error"] == "deadline exceeded"
    nothing_in_use(server)


@pytest.mark.slow
def test_503_to_head_has_no_body(server):
    head, _, body = exchange(server, "/late", "HEAD").partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503 ") and body == b""


@pytest.mark.slow
def test_stream_that_is_late_in_the_middle_reaches_the_client_incomplete(server):
    client = server.connect()
    client.request("GET", "/late-stream")
    answer = client.getresponse()
    assert answer.status == 200
    with pytest.raises(http.client.IncompleteRead) as caught:
        answer.read()
    assert caught.value.partial == b"begun\n"
    client.close()
    nothing_in_use(server)
    raw = exchange(server, "/late-stream")
    assert raw.count(b"HTTP/1.") == 1 and raw.endswith(b"6\r\nbegun\n\r\n")  # and no last chunk "0"
    wait_until(lambda: reports(server, "/late-stream") == 2, 30)
    assert "Traceback" not in server.logs()


def test_reader_that_stops_reading_is_cut_and_its_connection_is_back(server):
    with connect(server, "/flood") as client:
        assert client.recv(100).startswith(b"HTTP/1.1 200 OK")
        wait_until(lambda: reports(server, "/flood") == 1, 30)  # nothing is read meanwhile
        nothing_in_use(server)
        received = b""
        try:
            while data := client.recv(1 << 20):
                received = data
        except ConnectionResetError:
            pass
        assert not received.endswith(b"0\r\n\r\n")
    assert "Traceback" not in server.logs()


@pytest.mark.slow
def test_timer_of_a_fast_request_hits_none_of_the_next_ones_on_its_connection(server):
    """On the same connection, so in the same greenlet, until the deadlines of the first ones are over."""
    before = server.logs().count("was not over")
    client = server.connect()
    client.connect()
    port = client.sock.getsockname()[1]
    end = time.monotonic() + 1.5 * DEADLINE_S
    for number in itertools.count():
        client.request("GET", "/query" if number % 2 else "/streamed")
        answer = client.getresponse()
        assert (answer.status, answer.read()) == (200, b"42" if number % 2 else b"44")
        assert client.sock.getsockname()[1] == port
        if time.monotonic() > end:
            break
    client.close()
    nothing_in_use(server)
    assert server.logs().count("was not over") == before


@pytest.mark.slow
def test_503_leaves_a_keep_alive_connection_usable(server):
    client = server.connect()
    for path, status in (("/late-list", 503), ("/query", 200), ("/late", 503), ("/streamed", 200)):
        client.request("POST", path, b"body that nobody reads")
        answer = client.getresponse()
        answer.read()
        assert answer.status == status
    client.close()
    assert "Traceback" not in server.logs()


@pytest.mark.slow
def test_deadline_ends_a_query_at_mariadb(tmp_path, mariadb_url):
    with serve(tmp_path, url=mariadb_url) as server:
        assert server.get("/late-sql").status == 503
        nothing_in_use(server)
        assert server.get("/query").text == "42"


@pytest.mark.parametrize("worker", ["sync", pytest.param("gthread", marks=pytest.mark.slow)])
@pytest.mark.parametrize("preload", PRELOAD)
def test_worker_without_gevent_refuses_to_boot(tmp_path, worker, preload):
    server = serve(tmp_path, *preload, config=BY_THE_WORKER, worker=worker)
    with pytest.raises(RuntimeError, match="gunicorn ended with status") as caught, server:
        pass
    log = "".join(caught.value.__notes__)
    assert "A deadline was asked for where gevent does not run" in log and "worker_class = 'gevent'" in log
    assert "Worker failed to boot" in log
