"""The order desk of deploy/, in Flask and in asyncio, behind one client; and what its tests store and look for.

Its databases are those of this process's `dbsession`, too, so that `rows()` sees what the desk has stored.
"""

from __future__ import annotations

import importlib
import json
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import text

import dbsession

from .mariadb import MariaDBServer
from .postgresql import PostgreSQLServer
from .uvicorn import Uvicorn

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
ORDER = {"customer": "Ada", "item": "pencil", "quantity": 12, "price_cents": 95}
HEADER = "customer,item,quantity,price_cents\n"
NAMES = ("default", "audit")
VARIABLES = {"default": "DBSESSION_URL", "audit": "DBSESSION_AUDIT_URL"}


def sqlite_urls(folder: Path) -> dict[str, str]:
    return {"default": f"sqlite:///{folder / 'orders.db'}", "audit": f"sqlite:///{folder / 'audit.db'}"}


@contextmanager
def server_urls(server: MariaDBServer | PostgreSQLServer) -> Iterator[dict[str, str]]:
    """Two empty databases, which are dropped at the end."""
    names = {name: f"desk_{secrets.token_hex(4)}" for name in NAMES}
    yield {name: server.create_database(database) for name, database in names.items()}
    for database in names.values():
        server.drop_database(database)


def environment(urls: dict[str, str]) -> dict[str, str]:
    """What tells the desk its databases."""
    return {VARIABLES[name]: url for name, url in urls.items()}


@contextmanager
def flask_desk(urls: dict[str, str]) -> Iterator[Any]:
    """The module deploy/app.py with its application, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(DEPLOY))
        for name, value in environment(urls).items():
            patch.setenv(name, value)
        dbsession.configure(dict(urls))  # a test before has configured none, and the desk asks at its import
        try:
            yield importlib.import_module("app")
        finally:
            dbsession.configure({})
            for name in ("app", "orders", "answers"):
                sys.modules.pop(name, None)


@contextmanager
def asgi_desk(urls: dict[str, str]) -> Iterator[HttpClient]:
    """deploy/asgi.py under a uvicorn of its own."""
    dbsession.configure(dict(urls))
    try:
        with uvicorn_desk(urls) as server, http_client(server) as client:
            yield client
    finally:
        dbsession.configure({})


def uvicorn_desk(urls: dict[str, str], *arguments: str) -> Uvicorn:
    return Uvicorn("asgi:app", f"--app-dir={DEPLOY}", *arguments, env=environment(urls) | {"PYTHONWARNINGS": "error"})


@contextmanager
def http_client(server: Any) -> Iterator[HttpClient]:
    # No limit on the connections: fifty orders at once are to arrive at once.
    limits = httpx.Limits(max_connections=None)
    with httpx.Client(base_url=server.url, timeout=60, limits=limits) as http:
        yield HttpClient(http, server)


class HttpClient:
    """Requests to a running server, in the words of Flask's test client."""

    def __init__(self, http: httpx.Client, server: Any) -> None:
        self._http = http
        self.server = server

    def open(
        self,
        path: str,
        method: str = "GET",
        *,
        json: Any = None,
        data: Any = None,
        content_type: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> Answer:
        content = data if isinstance(data, (str, bytes)) else None
        if json is not None:
            content, content_type = as_json(json), "application/json"
        headers = (headers or {}) | ({"Content-Type": content_type} if content_type else {})
        form = data if content is None else None
        return Answer(self._http.request(method, path, content=content, data=form, headers=headers))

    def get(self, path: str) -> Answer:
        return self.open(path)

    def post(self, path: str, **arguments: Any) -> Answer:
        return self.open(path, "POST", **arguments)

    def in_use(self) -> list[int]:
        """Of each database's pool in the server's process."""
        found = self.get("/healthz").json["databases"]
        return [found[name]["in_use"] for name in NAMES]


class Answer:
    def __init__(self, response: httpx.Response) -> None:
        self.status_code = response.status_code
        self.headers = response.headers
        self.text = response.text
        self.mimetype = response.headers.get("Content-Type", "").partition(";")[0]

    @property
    def json(self) -> Any:
        return json.loads(self.text)

    def __enter__(self) -> Answer:
        return self

    def __exit__(self, *_: object) -> None:
        pass  # it has been read


def check_page_of_failure(answer: Any) -> None:
    """What a browser is shown for an order that the database has not taken: what was typed in, and why."""
    assert answer.status_code == 503 and answer.mimetype == "text/html" and int(answer.headers["Retry-After"]) > 0
    assert "The database is not available, try again." in answer.text and 'value="Ada"' in answer.text
    assert "secret" not in answer.text and "There are none yet" not in answer.text


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()  # httpx's own fails for half a surrogate pair


def empty_tables() -> None:
    with dbsession.session_scope("empty the tables"):
        for name, table in zip(NAMES, ("orders", "entries"), strict=True):
            dbsession.get_dbsession(name).execute(text(f"DELETE FROM {table}"))
            dbsession.get_dbsession(name).commit()


def rows(name: str, query: str) -> list[tuple[Any, ...]]:
    with dbsession.session_scope("look"):
        return [tuple(row) for row in dbsession.get_dbsession(name).execute(text(query))]


def stored() -> int:
    return int(rows("default", "SELECT count(*) FROM orders")[0][0])


def post_csv(client: Any, body: str | bytes) -> Any:
    return client.post("/orders/import", data=body, content_type="text/csv; charset=utf-8")
