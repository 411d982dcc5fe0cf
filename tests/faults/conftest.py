"""Fixtures for the tests in which the database server fails."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import make_url

from dbsession import SessionManager
from support.drivers import DRIVERS
from support.halves import HALVES
from support.mariadb import MariaDBServer
from support.postgresql import PostgreSQLServer
from support.processes import run_script
from support.steering import steering
from support.waiting import wait_until


@contextmanager
def script_runner(server: MariaDBServer | PostgreSQLServer, own_url: str) -> Iterator[Callable[..., Any]]:
    with steering(server) as port:

        def run(source, *args, mode="patched", url=own_url, timeout=120.0):
            source = "from support.server_prelude import *\n" + textwrap.dedent(source)
            return run_script(mode, source, url, port, *args, timeout=timeout)

        yield run


@pytest.fixture
def with_server(server, server_url):
    """Runs a script after `from support.server_prelude import *`; the server is as before when the test is over.

    `with_server(source, *args, mode="patched", url=server_url, timeout=120)`; `args` begin at sys.argv[3].
    """
    with script_runner(server, server_url) as run:
        yield run


@pytest.fixture(scope="module")
def mariadb_resolving():
    """A server for `support.servers.on` that shows its clients by their host names: no skip_name_resolve."""
    server = MariaDBServer("--skip-name-resolve=0")
    yield server
    server.close()


@pytest.fixture
def counter(mariadb):
    """Reads one of the server's counters, which nobody else makes grow: on one connection for all of the test, since
    the goodbye of each is a question, too, which the server may count late."""
    wait_until(lambda: not mariadb.processlist(), 20, "the connections of the test before are gone")
    with mariadb.root() as cursor:
        cursor.execute("SELECT CONNECTION_ID() AS id")
        mine = cursor.fetchone()["id"]

        def alone():
            cursor.execute("SELECT id FROM information_schema.processlist WHERE user = 'root'")
            return [row["id"] for row in cursor.fetchall()] == [mine]

        wait_until(alone, 20, "those of whoever asked before are gone")

        def so_far(name):
            cursor.execute("SHOW GLOBAL STATUS LIKE %s", (name,))
            return int(cursor.fetchone()["Value"])

        yield so_far


@pytest.fixture(params=["pymysql", "asyncmy", pytest.param("aiomysql", marks=pytest.mark.slow)])
def driver(request):
    """The driver of a test that holds for each of MariaDB's; `support.drivers.EVERY_DRIVER` has all."""
    return request.param


@pytest.fixture
def half(driver):
    """The half of dbsession that uses this driver."""
    return HALVES[DRIVERS[driver].half]


@pytest.fixture
def drivers_server(driver, request):
    """The server of the kind that this driver is for; `drivers_url` gives it back after the test."""
    return request.getfixturevalue(DRIVERS[driver].server)


@pytest.fixture
def drivers_url(driver, drivers_server, request):
    """The URL of an empty database for this driver."""
    url = request.getfixturevalue(f"{DRIVERS[driver].server}_url")
    return drivers_server.url(make_url(url).database, driver=driver)


@pytest.fixture
def managed(mariadb_url):
    """Makes managers with a pool of one; `managed(**entry)`, whose keys are those of the database's entry."""
    managers = []

    def make(**entry):
        options = {"pool_size": 1, "pool_timeout": 5, **entry.pop("options", {})}
        managers.append(SessionManager({"default": {"url": mariadb_url, "options": options, **entry}}))
        return managers[-1]

    yield make
    for manager in managers:
        manager.clear()
        manager.dispose()
