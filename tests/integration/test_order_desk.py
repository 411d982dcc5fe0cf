"""deploy/app.py, the order desk, on SQLite files, through Flask's test client and plain WSGI."""

from __future__ import annotations

import importlib
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

import dbsession
from dbsession import scope

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
ORDER = {"customer": "Ada", "item": "pencil", "quantity": 12, "price_cents": 95}
HEADER = "customer,item,quantity,price_cents\n"
NAMES = ("default", "audit")


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The module deploy/app.py with its application, on two empty databases."""
    folder = tmp_path_factory.mktemp("desk")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(DEPLOY))
        patch.setenv("DBSESSION_URL", f"sqlite:///{folder / 'orders.db'}")
        patch.setenv("DBSESSION_AUDIT_URL", f"sqlite:///{folder / 'audit.db'}")
        module = importlib.import_module("app")
        try:
            yield module
        finally:
            dbsession.configure({})
            for name in ("app", "orders"):
                sys.modules.pop(name, None)


@pytest.fixture
def client(desk: Any) -> Iterator[Any]:
    """A test client on empty tables; afterwards no connection may be in use."""
    with dbsession.session_scope("empty the tables"):
        for name, table in zip(NAMES, ("orders", "entries"), strict=True):
            dbsession.get_dbsession(name).execute(text(f"DELETE FROM {table}"))
            dbsession.get_dbsession(name).commit()
    yield desk.app.test_client()
    assert in_use() == [0, 0]


def in_use() -> list[int]:
    return [dbsession.get_engine(name).pool.checkedout() for name in NAMES]


def rows(name: str, query: str) -> list[tuple[Any, ...]]:
    with dbsession.session_scope("look"):
        return [tuple(row) for row in dbsession.get_dbsession(name).execute(text(query))]


def stored() -> int:
    return rows("default", "SELECT count(*) FROM orders")[0][0]


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


# -- orders ----------------------------------------------------------------------------------------------------


def test_order_is_stored_with_its_audit_entry_when_posted_as_json(client: Any) -> None:
    """One request writes both databases and answers 201 with the order and where it is."""
    answer = client.post("/orders", json=ORDER)
    assert answer.status_code == 201
    assert answer.json == ORDER | {"id": answer.json["id"], "created_at": answer.json["created_at"]}
    assert answer.headers["Location"] == f"/orders/{answer.json['id']}"
    assert client.get(answer.headers["Location"]).json == answer.json
    assert rows("audit", "SELECT action, order_id, detail FROM entries") == [
        ("order", answer.json["id"], "12 x pencil")
    ]


def test_order_is_stored_and_the_page_shown_again_when_posted_by_the_form(client: Any) -> None:
    """The page's own form redirects back, and what was typed is escaped there."""
    answer = client.post("/orders", data=ORDER | {"item": "<b>pen & co</b>"})
    assert (answer.status_code, answer.headers["Location"]) == (303, "/")
    page = client.get("/")
    assert "&lt;b&gt;pen &amp; co&lt;/b&gt;" in page.text and "<b>pen" not in page.text
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]


def test_form_shows_every_error_at_its_field_when_several_are_wrong(client: Any) -> None:
    """The typed values stay, each wrong field has its message, and nothing is stored."""
    answer = client.post("/orders", data=ORDER | {"customer": " ", "quantity": "many", "item": '"quoted"'})
    assert answer.status_code == 400
    assert 'id="customer-error"' in answer.text and 'id="quantity-error"' in answer.text
    assert 'id="item-error"' not in answer.text
    assert 'value="many"' in answer.text and 'value="&#34;quoted&#34;"' in answer.text
    assert stored() == 0


def test_list_is_newest_first_and_filtered_when_a_customer_is_given(client: Any) -> None:
    """`limit` and `customer` both hold; empty ones count as not given."""
    for customer in ("Ada", "Bob", "Ada"):
        client.post("/orders", json=ORDER | {"customer": customer})
    assert [order["customer"] for order in client.get("/orders?limit=2").json] == ["Ada", "Bob"]
    assert [order["customer"] for order in client.get("/orders?customer=Bob&limit=").json] == ["Bob"]
    assert len(client.get("/orders?customer=").json) == 3


# -- bad input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"customer": 1}, "customer"),
        ({"customer": ""}, "customer"),
        ({"customer": "x" * 81}, "customer"),
        ({"customer": "a\0b"}, "customer"),
        ({"item": "\ud800"}, "item"),
        ({"item": None}, "item"),
        ({"quantity": True}, "quantity"),
        ({"quantity": 1.0}, "quantity"),
        ({"quantity": "1"}, "quantity"),
        ({"quantity": 0}, "quantity"),
        ({"quantity": 10**30}, "quantity"),
        ({"price_cents": -1}, "price_cents"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_order_is_refused_and_the_field_named_when_a_value_is_bad(client: Any, change: Any, field: str) -> None:
    """400, and the error names the field."""
    answer = client.post("/orders", json=ORDER | change)
    assert (answer.status_code, answer.json["error"]["field"]) == (400, field)
    assert stored() == 0


@pytest.mark.parametrize("field", ORDER)
def test_order_is_refused_and_the_field_named_when_it_is_missing(client: Any, field: str) -> None:
    """Each field is required."""
    answer = client.post("/orders", json={name: value for name, value in ORDER.items() if name != field})
    assert (answer.status_code, answer.json["error"]["field"]) == (400, field)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 30_000, b'{"quantity": ' + b"9" * 5000 + b"}"]
)
def test_order_is_refused_when_the_body_is_no_json_object(client: Any, body: bytes) -> None:
    """Whatever it is instead: 400 and never 500."""
    answer = client.post("/orders", data=body, content_type="application/json")
    assert (answer.status_code, answer.json["error"]["field"]) == (400, "body")


@pytest.mark.parametrize(
    ("method", "path", "arguments", "status"),
    [
        ("GET", "/nothing", {}, 404),
        ("GET", "/orders/9223372036854775807", {}, 404),
        ("DELETE", "/orders", {}, 405),
        ("POST", "/orders", {"data": b" " * 70_000, "content_type": "application/json"}, 413),
        ("POST", "/orders", {"data": "x", "content_type": "text/plain"}, 415),
        ("POST", "/orders/import", {"data": "{}", "content_type": "application/json"}, 415),
    ],
)
def test_error_is_json_when_the_request_as_a_whole_is_wrong(
    client: Any, method: str, path: str, arguments: Any, status: int
) -> None:
    """404, 405, 413 and 415 have the same form as 400."""
    answer = client.open(path, method=method, **arguments)
    assert answer.status_code == status
    assert answer.json["error"]["message"]


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("/orders/x", "id"),
        ("/orders/-1", "id"),
        ("/orders/9223372036854775808", "id"),
        ("/orders/" + "9" * 5000, "id"),
        ("/orders?limit=x", "limit"),
        ("/orders?limit=0", "limit"),
        ("/orders?limit=1001", "limit"),
        ("/orders?customer=%00", "customer"),
        ("/slow?seconds=nan", "seconds"),
        ("/slow?seconds=31", "seconds"),
        ("/slow?seconds=x", "seconds"),
    ],
)
def test_query_is_refused_and_the_field_named_when_a_value_is_bad(client: Any, path: str, field: str) -> None:
    """Also an id that no 64-bit column can hold, which a driver would answer with an OverflowError."""
    answer = client.get(path)
    assert (answer.status_code, answer.json["error"]["field"]) == (400, field)


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


# -- import and export -----------------------------------------------------------------------------------------


def post_csv(client: Any, body: str | bytes) -> Any:
    return client.post("/orders/import", data=body, content_type="text/csv; charset=utf-8")


def test_import_stores_everything_when_every_line_is_good(client: Any) -> None:
    """More rows than one batch, with quotes, line ends in a field, CRLF, an empty line and a byte order mark."""
    many = "".join(f"Bob,pen {number},1,2\r\n" for number in range(1200))
    answer = post_csv(client, "\ufeff" + HEADER + 'Ada,"a ""b"", c\nd",3,4\r\n\r\n' + many)
    assert (answer.status_code, answer.json) == (201, {"imported": 1201})
    assert rows("default", "SELECT item FROM orders WHERE customer = 'Ada'") == [('a "b", c\nd',)]
    assert stored() == 1201
    assert rows("audit", "SELECT action, detail FROM entries") == [("import", "1201 orders")]


@pytest.mark.parametrize(
    ("body", "line", "column"),
    [
        (HEADER + "Ada,pen,1,2\nAda,pen,x,2\n", 3, "quantity"),
        (HEADER + "Ada,pen,1\n", 2, "price_cents"),
        (HEADER + "Ada,pen,1,2,3\n", 2, "5"),
        (HEADER + 'Ada,"p\nen",1,2\nAda,"p\nen",1,-2\n', 4, "price_cents"),
        (HEADER + 'Ada,"pen"x,1,2\n', 2, "item"),
        (HEADER + 'Ada,"pen,1,2\n', 2, "item"),
        (HEADER.encode() + b"Ada,p\xffn,1,2\n", 2, "item"),
        (HEADER + "A\0da,pen,1,2\n", 2, "customer"),
        (HEADER + "x" * 1_000_000, 2, "customer"),
        (HEADER + '"a\nb",' * 10_000, 2, "5"),
        ("customer,item,price_cents,quantity\nAda,pen,1,2\n", 1, "quantity"),
        ("", 1, "customer"),
    ],
)
def test_import_stores_nothing_and_names_line_and_column_when_one_is_bad(
    client: Any, body: str | bytes, line: int, column: str
) -> None:
    """All or nothing."""
    answer = post_csv(client, body)
    error = answer.json["error"]
    assert (answer.status_code, error["line"], error["column"]) == (400, line, column)
    assert f"line {line}, column {column}" in error["message"]
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
    assert next(iterator).count(b"\r\n") == desk.BATCH_ROWS
    assert in_use() == [1, 0]
    body.close()
    assert in_use() == [0, 0]


def test_export_quotes_and_keeps_formulas_from_spreadsheets(client: Any) -> None:
    """Quotes, commas and line ends survive; what a spreadsheet would calculate gets an apostrophe in front."""
    client.post("/orders", json=ORDER | {"customer": "=1+1", "item": 'a "b", c\nd'})
    with client.get("/orders.csv") as answer:  # a streamed response is the test's to close
        assert answer.mimetype == "text/csv"
        _, row = answer.text.split("\r\n", 1)
    assert row.split(",", 1)[1].startswith('\'=1+1,"a ""b"", c\nd",12,95,')


# -- the rest --------------------------------------------------------------------------------------------------


def test_slow_request_holds_no_connection_while_it_waits(
    desk: Any, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It queries first, and releases before it sleeps."""
    seen: list[Any] = []
    monkeypatch.setattr(desk.time, "sleep", lambda seconds: seen.append((seconds, in_use())))
    assert client.get("/slow?seconds=2.5").json == {"slept": 2.5, "latest_order": None}
    assert seen == [(2.5, [0, 0])]


def test_health_is_ok_when_every_database_answers(client: Any) -> None:
    """With a latency for each."""
    answer = client.get("/healthz")
    assert answer.status_code == 200
    assert set(answer.json["databases"]) == set(NAMES)
    assert all(found["ok"] and found["latency_ms"] >= 0 for found in answer.json["databases"].values())


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
