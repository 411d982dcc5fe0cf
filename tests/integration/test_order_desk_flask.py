"""deploy/app.py, the order desk in Flask, where its own process or plain WSGI has to be looked into."""

from __future__ import annotations

import importlib
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import dbsession
from dbsession.green import scope
from support.desks import (
    HEADER,
    NAMES,
    ORDER,
    check_page_of_failure,
    empty_tables,
    flask_desk,
    post_csv,
    rows,
    sqlite_urls,
    stored,
)
from support.gunicorn import DEMO_CONFIG


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The module deploy/app.py with its application, on two databases."""
    with flask_desk(sqlite_urls(tmp_path_factory.mktemp("desk"))) as module:
        yield module


@pytest.fixture
def client(desk: Any) -> Iterator[Any]:
    """A test client on empty tables; afterwards no connection may be in use."""
    empty_tables()
    yield desk.app.test_client()
    assert in_use() == [0, 0]


def in_use() -> list[int]:
    return [dbsession.get_engine(name).pool.checkedout() for name in NAMES]


def wsgi(app: Any, path: str, *, body: io.BytesIO | None = None, **environ: Any) -> tuple[str, Any]:
    """One request as a server sends it: the status and the body, which the caller closes."""
    answer: list[str] = []
    given = {
        "REQUEST_METHOD": "GET",
        "SCRIPT_NAME": "",
        "PATH_INFO": path,
        "QUERY_STRING": "",
        "SERVER_NAME": "desk",
        "SERVER_PORT": "80",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": "http",
        "wsgi.input": body or io.BytesIO(),
        "wsgi.errors": sys.stderr,
        "wsgi.multithread": True,
        "wsgi.multiprocess": True,
        "wsgi.run_once": False,
        **environ,
    }
    returned = app.wsgi_app(given, lambda status, headers, exc_info=None: answer.append(status))
    return answer[0], returned


def test_order_is_refused_when_less_of_the_body_arrives_than_was_announced(desk: Any, client: Any) -> None:
    """A form cut off after `quantity=1` of `quantity=12` must not become an order."""
    status, body = wsgi(
        desk.app,
        "/orders",
        body=io.BytesIO(b"customer=Ada&item=pen&price_cents=1&quantity=1"),
        REQUEST_METHOD="POST",
        CONTENT_TYPE="application/x-www-form-urlencoded",
        CONTENT_LENGTH="47",
        **{"wsgi.input_terminated": True},  # as gunicorn says, which does not raise for this
    )
    assert status.startswith("400") and b"body" in b"".join(body)
    assert stored() == 0


@pytest.mark.parametrize("terminated", [True, False])
def test_import_stores_nothing_when_the_client_stops_sending(desk: Any, client: Any, terminated: bool) -> None:
    """What arrived is valid by itself, but less than was announced."""
    sent = (HEADER + "Ada,pen,1,2\n").encode()
    status, body = wsgi(
        desk.app,
        "/orders/import",
        body=io.BytesIO(sent),
        REQUEST_METHOD="POST",
        CONTENT_TYPE="text/csv",
        CONTENT_LENGTH=str(len(sent) + 12),
        **({"wsgi.input_terminated": True} if terminated else {}),
    )
    assert b"body" in b"".join(body)
    body.close()
    assert status.startswith("400")
    assert stored() == 0


def test_import_stores_nothing_when_the_server_fails_to_read_the_body(desk: Any, client: Any) -> None:
    """A chunked body without a valid end: the server raises an error of its own, and the answer is 400."""

    class Broken(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            data = super().read(size)
            if not data:
                raise OSError("no more data")
            return data

    status, body = wsgi(
        desk.app,
        "/orders/import",
        body=Broken((HEADER + "Ada,pen,1,2\n").encode()),
        REQUEST_METHOD="POST",
        CONTENT_TYPE="text/csv",
        **{"wsgi.input_terminated": True},
    )
    assert status.startswith("400") and b"body" in b"".join(body)
    assert stored() == 0


def test_import_holds_no_connection_while_the_client_sends(desk: Any, client: Any) -> None:
    """Neither a connection nor a write lock: another request stores an order in the middle of the body."""
    seen: list[Any] = []

    class Slow(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            seen.append((in_use(), client.post("/orders", json=ORDER).status_code))
            return super().read(20)

    sent = (HEADER + "Bob,pen,1,2\n").encode()
    status, _ = wsgi(
        desk.app,
        "/orders/import",
        body=Slow(sent),
        REQUEST_METHOD="POST",
        CONTENT_TYPE="text/csv",
        CONTENT_LENGTH=str(len(sent)),
        **{"wsgi.input_terminated": True},
    )
    assert status.startswith("201")
    assert len(seen) > 2 and all(entry == ([0, 0], 201) for entry in seen)


def test_export_is_read_lazily_and_gives_its_connection_back_when_closed_early(desk: Any, client: Any) -> None:
    """The body holds one connection while it is read, and none after close(), whatever was left."""
    post_csv(client, HEADER + "Ada,pen,1,2\n" * 3000)
    status, body = wsgi(desk.app, "/orders.csv")
    iterator = iter(body)
    assert status.startswith("200")
    assert next(iterator) == b"id,customer,item,quantity,price_cents,created_at\r\n"
    assert next(iterator).count(b"\r\n") == desk.answers.BATCH_ROWS
    assert in_use() == [1, 0]
    body.close()
    assert in_use() == [0, 0]


def test_slow_request_holds_no_connection_while_it_waits(
    desk: Any, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It queries first, and releases before it sleeps."""
    seen: list[Any] = []
    monkeypatch.setattr(desk.time, "sleep", lambda seconds: seen.append((seconds, in_use())))
    assert client.get("/slow?seconds=2.5").json == {"slept": 2.5, "latest_order": None}
    assert seen == [(2.5, [0, 0])]


def test_dead_database_gives_503_and_no_secret_when_it_cannot_be_opened(
    desk: Any, client: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The health check names it; an order is refused with Retry-After; neither the answer nor the log tells more."""
    working = desk.databases()
    try:
        dbsession.configure(working | {"audit": working["audit"] | {"url": f"sqlite:///{tmp_path}/secret/none.db"}})
        health = client.get("/healthz")
        assert health.status_code == 503
        assert [health.json["databases"][name]["ok"] for name in NAMES] == [True, False]
        answer = client.post("/orders", json=ORDER)
        assert answer.status_code == 503 and int(answer.headers["Retry-After"]) > 0
        check_page_of_failure(client.post("/orders", data=ORDER, headers={"Accept": "text/html"}))
        assert "OperationalError" in caplog.text
        for shown in (health.text, answer.text, caplog.text):
            assert "secret" not in shown and "Ada" not in shown
    finally:
        dbsession.configure(working)
    assert stored() == 0


def test_order_stands_when_only_its_audit_entry_fails_to_commit(
    desk: Any, client: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The client must not be told to order again; the log says what is missing."""
    from sqlalchemy.exc import OperationalError

    def fail() -> None:
        raise OperationalError("COMMIT", {}, Exception("gone"))

    monkeypatch.setattr(desk.audit, "commit", fail)
    answer = client.post("/orders", json=ORDER)
    assert answer.status_code == 201
    assert stored() == 1 and rows("audit", "SELECT * FROM entries") == []
    assert f"order {answer.json['id']} was not stored" in caplog.text


def test_tables_are_created_once_when_they_exist_already(desk: Any, client: Any) -> None:
    """A second start changes nothing, and leaves no connection open."""
    client.post("/orders", json=ORDER)
    with dbsession.session_scope():
        importlib.import_module("orders").create_tables()
    assert stored() == 1
    assert scope.current() is None or not scope.current().sessions


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("DBSESSION_URL", "hello", "Database 'default': `url` cannot be read as a URL"),
        ("DBSESSION_AUDIT_URL", "mysql+nosuch://desk:s3cret@host/audit", "Database 'audit': SQLAlchemy has no dialect"),
        ("TIMEOUT", "soon", "must be a whole number from 0 to 3600"),
        ("LOG_LEVEL", "loud", "must be debug, info, warning, error or critical"),
    ],
)
def test_bad_value_in_the_environment_stops_the_start_with_one_line(variable, value, said):
    ended = subprocess.run(
        [sys.executable, "-m", "gunicorn", "-c", str(DEMO_CONFIG)],
        env={**os.environ, variable: value},
        capture_output=True,
        text=True,
        timeout=120,
    )
    (line,) = (ended.stdout + ended.stderr).strip().splitlines()
    assert ended.returncode == 1 and line.startswith("gunicorn.conf.py: ") and variable in line and said in line
    assert "s3cret" not in line
