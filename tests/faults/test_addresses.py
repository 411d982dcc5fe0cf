"""A host with several addresses, of which the first are silent, and a resolver that hangs."""

from __future__ import annotations

import contextlib
import socket
import threading

import pytest
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from support.halves import done, entered, on_both_halves

NAME = "shop.invalid"
PORT = text("SELECT @@port")


@pytest.fixture
def managed(driver, half, mariadb, mariadb_url):
    managers = []

    def make(host=NAME, **entry):
        url = mariadb_url.replace("pymysql", driver).replace("127.0.0.1", host)
        entry = {"url": url, "connect_timeout_s": 1.5, **entry}
        managers.append(half.verbs.SessionManager({"default": entry}))
        return managers[-1]

    yield make

    async def dispose():
        for manager in managers:
            await done(manager.dispose())

    half.run(dispose)


@pytest.fixture
def resolves(monkeypatch):
    """Gives NAME addresses, of a kind each: cannot be provoked without the machine's own configuration."""
    ask = socket.getaddrinfo
    found = []

    def getaddrinfo(host, port, family=0, type=0, proto=0, flags=0):
        if host not in (NAME, NAME.encode()):
            return ask(host, port, family, type, proto, flags)
        if flags & socket.AI_NUMERICHOST:
            raise socket.gaierror("no number")
        asked.append(host)
        if not found:
            hanging.wait(30)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in found]

    asked, hanging = [], threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)

    def resolve(*addresses):
        found.extend(addresses)
        if addresses:
            hanging.set()
        return asked

    yield resolve
    hanging.set()


@pytest.fixture
def silent(mariadb):
    """Addresses that never answer, at the server's port: to the SYN, or to who has connected; and one that refuses."""
    with contextlib.ExitStack() as stack:
        deaf, mute = (stack.enter_context(socket.socket()) for _ in range(2))
        deaf.bind(("127.0.0.2", mariadb.port))
        deaf.listen(0)
        for _ in range(4):  # fill its backlog
            full = stack.enter_context(socket.socket())
            full.setblocking(False)
            full.connect_ex(("127.0.0.2", mariadb.port))
        mute.bind(("127.0.0.3", mariadb.port))
        mute.listen(16)
        yield {"deaf": "127.0.0.2", "mute": "127.0.0.3", "refusing": "127.0.0.4"}


async def answer(manager):
    async with entered(manager.scope()):
        return await done(manager.get().scalar(PORT))


@pytest.mark.parametrize("first", ["deaf", "mute", "refusing"])
@on_both_halves
async def test_f34_server_is_reached_when_its_first_address_is_silent(half, managed, mariadb, resolves, silent, first):
    resolves(silent[first], "127.0.0.1")
    assert await answer(managed()) == mariadb.port


@on_both_halves
async def test_f34_each_of_many_addresses_has_its_share(half, managed, mariadb, resolves, silent):
    resolves(*silent.values(), "127.0.0.1")
    assert await answer(managed()) == mariadb.port


@on_both_halves
async def test_f34_error_comes_in_time_when_all_addresses_are_silent_or_none_is_found(half, managed, resolves, silent):
    asked = resolves()
    for _ in range(2):
        with pytest.raises(OperationalError, match=r"2003|2013"):
            await answer(managed(connect_timeout_s=0.3))
        resolves(silent["mute"], silent["deaf"])
    assert len(asked) == 2


@on_both_halves
async def test_f34_kill_goes_to_the_address_of_the_connection(half, managed, mariadb, resolves, silent):
    asked = resolves(silent["refusing"], "127.0.0.1")
    manager = managed(read_timeout_s=0.3)
    async with entered(manager.scope()):
        with pytest.raises(OperationalError):
            await done(manager.get().execute(text("SELECT SLEEP(60)")))
    await half.until(lambda: manager.database("default").stats.kills == 1)
    assert len(asked) == 1


@on_both_halves
async def test_f34_name_without_an_address_is_an_error(half, managed, monkeypatch):
    ask = socket.getaddrinfo

    def getaddrinfo(host, port, family=0, type=0, proto=0, flags=0):
        return [] if host in (NAME, NAME.encode()) and not flags else ask(host, port, family, type, proto, flags)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with pytest.raises(OperationalError, match=f"2003.*{NAME}.*no address"):
        await answer(managed())
