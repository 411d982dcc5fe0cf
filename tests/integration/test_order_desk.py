"""What both order desks of deploy/ answer: app.py through Flask's test client, asgi.py under uvicorn.

The same tests run over them; what only one can be asked is in test_order_desk_flask.py and test_order_desk_asgi.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import dbsession
from support.desks import (
    HEADER,
    NAMES,
    ORDER,
    asgi_desk,
    empty_tables,
    flask_desk,
    post_csv,
    rows,
    server_urls,
    sqlite_urls,
    stored,
)
from support.waiting import wait_until


@pytest.fixture(
    scope="module",
    params=[
        "flask-sqlite",
        "asgi-sqlite",
        pytest.param("asgi-mariadb", marks=[pytest.mark.mariadb, pytest.mark.slow]),
        pytest.param("flask-postgresql", marks=[pytest.mark.postgresql, pytest.mark.slow]),
        pytest.param("asgi-postgresql", marks=[pytest.mark.postgresql, pytest.mark.slow]),
    ],
)
def desk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """(a client of the running desk, what counts its connections in use), on two databases."""
    if request.param == "flask-sqlite":
        with flask_desk(sqlite_urls(tmp_path_factory.mktemp("desk"))) as module:
            yield module.app.test_client(), lambda: [dbsession.get_engine(name).pool.checkedout() for name in NAMES]
    elif request.param == "asgi-sqlite":
        with asgi_desk(sqlite_urls(tmp_path_factory.mktemp("desk"))) as client:
            yield client, client.in_use
    elif request.param == "flask-postgresql":
        with server_urls(request.getfixturevalue("postgresql")) as urls, flask_desk(urls) as module:
            yield module.app.test_client(), lambda: [dbsession.get_engine(name).pool.checkedout() for name in NAMES]
    else:
        server = request.getfixturevalue(request.param.removeprefix("asgi-"))
        with server_urls(server) as urls, asgi_desk(urls) as client:
            yield client, client.in_use


@pytest.fixture
def client(desk: Any) -> Iterator[Any]:
    """A client, and empty tables; afterwards no connection may be in use."""
    client, in_use = desk
    empty_tables()
    yield client
    wait_until(lambda: in_use() == [0, 0], 30, "a request that is over holds no connection")


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


# -- import and export -----------------------------------------------------------------------------------------


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


def test_export_quotes_and_keeps_formulas_from_spreadsheets(client: Any) -> None:
    """Quotes, commas and line ends survive; what a spreadsheet would calculate gets an apostrophe in front."""
    client.post("/orders", json=ORDER | {"customer": "=1+1", "item": 'a "b", c\nd'})
    with client.get("/orders.csv") as answer:  # a streamed response is the test's to close
        assert answer.mimetype == "text/csv"
        _, row = answer.text.split("\r\n", 1)
    assert row.split(",", 1)[1].startswith('\'=1+1,"a ""b"", c\nd",12,95,')


# -- the rest --------------------------------------------------------------------------------------------------


def test_health_is_ok_when_every_database_answers(client: Any) -> None:
    """With a latency for each."""
    answer = client.get("/healthz")
    assert answer.status_code == 200
    assert set(answer.json["databases"]) == set(NAMES)
    assert all(found["ok"] and found["latency_ms"] >= 0 for found in answer.json["databases"].values())
