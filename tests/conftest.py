"""Fixtures every test may use."""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
from collections.abc import Callable, Iterator
from typing import TypeVar

import pytest

# So that a failing assert inside a helper shows its values, too.
pytest.register_assert_rewrite("support.gunicorn", "support.processes", "support.waiting")

from support.mariadb import MariaDBServer  # noqa: E402  # after the line above
from support.pgbouncer import PgBouncer  # noqa: E402  # as well
from support.postgresql import PostgreSQLServer  # noqa: E402  # as well
from support.processes import MODES  # noqa: E402  # as well
from support.servers import SERVERS, Server, ServerMissing  # noqa: E402  # as well


def pytest_configure() -> None:
    # dbsession reads these, and PostgreSQL's drivers; the developer's own must not reach a test.
    for name in [name for name in os.environ if name.startswith(("DBSESSION_", "PG"))]:
        del os.environ[name]
    os.environ["DBSESSION_GUARD"] = "warn"  # a session that crosses over anywhere in these tests is in their logs


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for server in {"mariadb", "postgresql"}.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(server)


S = TypeVar("S", bound=Server)


@contextlib.contextmanager
def lived(make: Callable[[], S]) -> Iterator[S]:
    try:
        server = make()
    except ServerMissing as missing:
        pytest.fail(f"{missing}; tests/run does that where it may", pytrace=False)
    try:
        yield server
    finally:
        server.close()


@contextlib.contextmanager
def empty_database(server: MariaDBServer | PostgreSQLServer) -> Iterator[str]:
    server.ensure_running()
    name = f"test_{secrets.token_hex(4)}"
    url = server.create_database(name)
    yield url
    server.ensure_running()
    server.drop_database(name)


@pytest.fixture(scope="session")
def mariadb() -> Iterator[MariaDBServer]:
    """The tests' own server, for the whole run. A test that stops or pauses it gets it back after the test by
    asking for `mariadb_url` as well."""
    with lived(MariaDBServer) as server:
        yield server


@pytest.fixture
def mariadb_url(mariadb: MariaDBServer) -> Iterator[str]:
    """The URL of an empty database, dropped after the test, with the server running before and after."""
    with empty_database(mariadb) as url:
        yield url


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgreSQLServer]:
    """A PostgreSQL server as `mariadb` is one of MariaDB; `postgresql_url` gives it back after the test."""
    with lived(PostgreSQLServer) as server:
        yield server


@pytest.fixture
def postgresql_url(postgresql: PostgreSQLServer) -> Iterator[str]:
    """The URL of an empty database of PostgreSQL's, for psycopg, dropped after the test, with the server running."""
    with empty_database(postgresql) as url:
        yield url


@pytest.fixture(scope="session")
def pgbouncer(postgresql: PostgreSQLServer) -> Iterator[PgBouncer]:
    """A PgBouncer in transaction mode in front of `postgresql`."""
    with lived(lambda: PgBouncer(postgresql)) as server:
        yield server


@pytest.fixture
def pgbouncer_url(pgbouncer: PgBouncer) -> Iterator[str]:
    """The URL of an empty database through PgBouncer, dropped after the test, with both servers running."""
    with empty_database(pgbouncer) as url:
        yield url


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest) -> MariaDBServer | PostgreSQLServer:
    """Runs the test with each kind of server, and with PostgreSQL in the slow run; `support.servers.on` names others.
    `server_url` gives it back after the test, as the server's own does."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def server_url(server: MariaDBServer | PostgreSQLServer) -> Iterator[str]:
    """The URL of an empty database, dropped after the test, with the server running before and after."""
    with empty_database(server) as url:
        yield url


# Patched late is patched, but for what was made before; that is seldom the subject.
@pytest.fixture(params=[pytest.param(each, marks=[pytest.mark.slow] if each == "late" else []) for each in MODES])
def mode(request: pytest.FixtureRequest) -> str:
    """Runs the test in each of the three modes of `support.processes.run_script`."""
    return str(request.param)


@pytest.fixture(params=["compiled", "python"])
def parser(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Who reads rows for PyMySQL, here and in scripts of `run_script`: asyncmy's compiled parser; or, as where asyncmy
    is not installed, a function in Python, made for the first row."""
    import asyncmy  # noqa: F401  # so that asyncio's half still has it

    from dbsession.green.mysql import columns, parser

    if request.param == "python":
        monkeypatch.setitem(sys.modules, "asyncmy.protocol", None)
        monkeypatch.setenv("ROWS_IN_PYTHON", "1")
        monkeypatch.setattr(columns, "WORTH_IT", 0)
    parser.compiled.cache_clear()
    columns._known.clear()
    assert (parser.compiled() is not None) is (request.param == "compiled")
    yield request.param
    parser.compiled.cache_clear()
    columns._known.clear()
