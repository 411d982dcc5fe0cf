"""The drivers that tests are run with, and one whose connections only count what is done with them."""

from __future__ import annotations

from typing import NamedTuple

import pytest


class Its(NamedTuple):
    """A driver's half of dbsession, and the fixture with its server."""

    half: str
    server: str


DRIVERS = {
    "pymysql": Its("gevent", "mariadb"),
    "asyncmy": Its("aio", "mariadb"),
    "aiomysql": Its("aio", "mariadb"),
    "psycopg": Its("gevent", "postgresql"),
    "psycopg2": Its("gevent", "postgresql"),
    "psycopg_async": Its("aio", "postgresql"),
    "asyncpg": Its("aio", "postgresql"),
}
_QUICK = ("pymysql", "asyncmy", "psycopg")


def _param(name: str) -> object:
    marks = [getattr(pytest.mark, DRIVERS[name].server)] + [pytest.mark.slow] * (name not in _QUICK)
    return pytest.param(name, marks=marks)


def every_driver(*servers: str, half: str | None = None) -> pytest.MarkDecorator:
    """A claim that holds for every driver of these servers, in one half if it is given: the fixtures are `driver`,
    `half`, `drivers_url` and `drivers_server`. Those that are not quick are for the slow run."""
    names = [name for name, its in DRIVERS.items() if its.server in servers and half in (None, its.half)]
    return pytest.mark.parametrize("driver", [_param(name) for name in names], indirect=True)


EVERY_DRIVER = every_driver("mariadb", "postgresql")


class Driver:
    """Opens connections, and can be shut down."""

    def __init__(self):
        self.opened = []
        self.down = False

    def connect(self):
        if self.down:
            raise OSError("the server is down")
        self.opened.append(Connection())
        return self.opened[-1]

    def open(self):
        return sum(not connection.closed for connection in self.opened)


class Connection:
    def __init__(self):
        self.closed = self.rolled_back = 0

    def rollback(self):
        self.rolled_back += 1

    def close(self):
        self.closed += 1
