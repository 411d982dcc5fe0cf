"""deploy/asgi.py, the order desk in asyncio, under real servers: what only they can be asked."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import dbsession
from support.desks import (
    DEPLOY,
    HEADER,
    NAMES,
    ORDER,
    asgi_desk,
    check_page_of_failure,
    environment,
    http_client,
    post_csv,
    rows,
    server_urls,
    sqlite_urls,
    stored,
    uvicorn_desk,
)
from support.gunicorn import Gunicorn
from support.processes import run_python
from support.waiting import wait_until

SLOW_KINDS = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("uvloop", "gunicorn")]


@pytest.fixture(params=["sqlite", pytest.param("mariadb", marks=pytest.mark.mariadb)])
def urls(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[dict[str, str]]:
    if request.param == "sqlite":
        yield sqlite_urls(tmp_path)
    else:
        with server_urls(request.getfixturevalue("mariadb")) as found:
            yield found


@pytest.fixture
def client(urls: dict[str, str]) -> Iterator[Any]:
    with asgi_desk(urls) as client:
        yield client


def under(kind: str, urls: dict[str, str]) -> Any:
    if kind == "gunicorn":
        # Not with deploy/ as its folder: gunicorn would take the gunicorn.conf.py there, which patches for gevent.
        return Gunicorn("asgi:app", "-k", "asgi", "--pythonpath", str(DEPLOY), env=environment(urls))
    return uvicorn_desk(urls, f"--loop={kind}")


def test_desk_loads_nothing_of_gevent_when_it_is_imported(tmp_path: Path) -> None:
    """Nor Flask: what both desks share knows neither."""
    run_python(
        """
        import sys
        sys.path.insert(0, sys.argv[1])
        import asgi
        loaded = {"gevent", "flask"} & set(sys.modules)
        assert not loaded, loaded
        """,
        DEPLOY,
        env=environment(sqlite_urls(tmp_path)),
    )


@pytest.mark.parametrize("kind", ["asyncio", *SLOW_KINDS])
def test_fifty_orders_are_stored_each_with_its_entry_when_posted_at_once(kind: str, urls: dict[str, str]) -> None:
    """Then no connection is in use, and after the server's end none is left at the database."""
    dbsession.configure(dict(urls))
    try:
        with under(kind, urls) as server, http_client(server) as client:
            with ThreadPoolExecutor(50) as threads:
                answers = list(
                    threads.map(lambda number: client.post("/orders", json=ORDER | {"quantity": number}), range(1, 51))
                )
            assert [answer.status_code for answer in answers] == [201] * 50
            assert [answer.json["quantity"] for answer in answers] == list(range(1, 51))
            assert stored() == len({answer.json["id"] for answer in answers}) == 50
            entries = rows("audit", "SELECT order_id, detail FROM entries")
            assert sorted(entries) == sorted((a.json["id"], f"{a.json['quantity']} x pencil") for a in answers)
            wait_until(lambda: client.in_use() == [0, 0], 30)
            log = server.logs()
        for said in ("Traceback", "Warning", "different loop"):
            assert said not in log
    finally:
        dbsession.configure({})


@pytest.mark.mariadb
@pytest.mark.parametrize("kind", ["asyncio", *SLOW_KINDS])
def test_server_leaves_no_connection_at_the_database_when_it_ends(kind: str, mariadb: Any) -> None:
    """By SIGTERM, with idle connections in its pools."""

    def connected() -> list[int]:
        with mariadb.root() as cursor:
            cursor.execute("SELECT id FROM information_schema.processlist WHERE user = 'app'")
            return [row["id"] for row in cursor.fetchall()]

    with server_urls(mariadb) as urls:
        before = set(connected())
        with under(kind, urls) as server, http_client(server) as client:
            assert client.post("/orders", json=ORDER).status_code == 201
            assert set(connected()) - before
        wait_until(lambda: not set(connected()) - before, 30)


def test_export_gives_its_connection_back_when_the_client_goes_away(client: Any) -> None:
    """It holds one while the client reads, and the server notices the end of the client."""
    row = f"{'Ada' * 26},{'pen' * 40},1,2\n"
    assert post_csv(client, HEADER + row * 40_000).status_code == 201  # more than the sockets' buffers take
    with socket.socket() as reader:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.connect(("127.0.0.1", client.server.port))
        reader.sendall(b"GET /orders.csv HTTP/1.1\r\nHost: desk\r\n\r\n")
        assert reader.recv(12) == b"HTTP/1.1 200"
        assert client.in_use() == [1, 0]
    wait_until(lambda: client.in_use() == [0, 0], 30)
    assert client.get("/orders?limit=1").json[0]["item"] == "pen" * 40


def test_order_is_not_stored_when_the_client_goes_away_in_its_body(client: Any) -> None:
    """A form cut off after `quantity=1` of `quantity=12` must not become an order."""
    with socket.create_connection(("127.0.0.1", client.server.port)) as sender:
        sender.sendall(
            b"POST /orders HTTP/1.1\r\nHost: desk\r\nContent-Type: application/x-www-form-urlencoded\r\n"
            b"Content-Length: 47\r\n\r\ncustomer=Ada&item=pen&price_cents=1&quantity=1"
        )
        sender.shutdown(socket.SHUT_WR)
        sender.settimeout(30)
        while sender.recv(4096):
            pass  # until the server has closed it
    wait_until(lambda: client.in_use() == [0, 0], 30)
    assert stored() == 0
    assert "Traceback" not in client.server.logs()


def test_dead_database_gives_503_and_no_secret_when_it_cannot_be_opened(tmp_path: Path) -> None:
    """The health check names it; an order is refused with Retry-After; neither the answer nor the log tells more."""
    broken = sqlite_urls(tmp_path) | {"audit": f"sqlite:///{tmp_path}/secret/none.db"}
    with asgi_desk(broken) as client:
        health = client.get("/healthz")
        assert health.status_code == 503
        assert [health.json["databases"][name]["ok"] for name in NAMES] == [True, False]
        answer = client.post("/orders", json=ORDER)
        assert answer.status_code == 503 and int(answer.headers["Retry-After"]) > 0
        check_page_of_failure(client.post("/orders", data=ORDER, headers={"Accept": "text/html"}))
        log = client.server.logs()
        assert "The tables could not be checked (OperationalError): the first request tries again." in log
        assert "POST /orders failed: OperationalError" in log
        for shown in (health.text, answer.text, log):
            assert "secret" not in shown and "Ada" not in shown
        (tmp_path / "secret").mkdir()
        assert client.post("/orders", json=ORDER).status_code == 201
