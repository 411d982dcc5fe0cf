"""Fixtures every test may use."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Iterator

import pytest

# So that a failing assert inside a helper shows its values, too.
pytest.register_assert_rewrite("support.gunicorn", "support.processes", "support.waiting")

from support.mariadb import MariaDBMissing, MariaDBServer  # noqa: E402  # after the line above
from support.processes import MODES  # noqa: E402  # as well


def pytest_configure() -> None:
    # dbsession reads these; the developer's own must not reach a test.
    for name in [name for name in os.environ if name.startswith("DBSESSION_")]:
        del os.environ[name]
    os.environ["DBSESSION_GUARD"] = "warn"  # a session that crosses over anywhere in these tests is in their logs


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "mariadb" in getattr(item, "fixturenames", ()):
            item.add_marker("mariadb")


@pytest.fixture(scope="session")
def mariadb() -> Iterator[MariaDBServer]:
    """The tests' own server, for the whole run. A test that stops or pauses it gets it back after the test by
    asking for `mariadb_url` as well."""
    try:
        server = MariaDBServer()
    except MariaDBMissing as missing:
        pytest.fail(f"{missing}; tests/run does that where it may", pytrace=False)
    try:
        yield server
    finally:
        server.close()


@pytest.fixture
def mariadb_url(mariadb: MariaDBServer) -> Iterator[str]:
    """The URL of an empty database, dropped after the test, with the server running before and after."""
    mariadb.ensure_running()
    name = f"test_{secrets.token_hex(4)}"
    url = mariadb.create_database(name)
    yield url
    mariadb.ensure_running()
    mariadb.drop_database(name)


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
