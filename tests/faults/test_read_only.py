"""A primary that takes no writes any more, and connections that are lost one by one: what is discarded for it."""

from __future__ import annotations

from contextlib import AsyncExitStack
from time import monotonic

import pytest
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from dbsession.core import discards
from support.halves import done, entered, on_both_halves
from support.mariadb import MariaDBServer
from support.proxy import Proxy

WHO = text("SELECT CONNECTION_ID()")
SIZE = 4


@pytest.fixture
def managed(driver, half):
    managers = []

    def make(url, **entries):
        url = url.replace("pymysql", driver)
        entries = {name: {"url": url, "options": {"pool_size": SIZE}, **entry} for name, entry in entries.items()}
        managers.append(half.verbs.SessionManager(entries))
        return managers[-1]

    yield make

    async def dispose():
        for manager in managers:
            await done(manager.clear())
            await done(manager.dispose())

    half.run(dispose)


@pytest.fixture
def read_only(mariadb, mariadb_url):
    """Makes the server read-only; `mariadb_url` has a table `t`."""
    with mariadb.root() as cursor:
        cursor.execute(f"CREATE TABLE {mariadb_url.rpartition('/')[2]}.t (n INT)")
        yield lambda: cursor.execute("SET GLOBAL read_only = 1")
        cursor.execute("SET GLOBAL read_only = 0")


async def ask(manager, name="default", statement=WHO):
    async with entered(manager.scope()):
        return await done(manager.get(name).scalar(statement))


async def write(manager, begin=None):
    async with entered(manager.scope()):
        if begin:
            await done(manager.get().execute(text(begin)))
        await done(manager.get().execute(text("INSERT INTO t VALUES (1)")))
        await done(manager.get().commit())


async def refused(manager, number="1290", begin=None):
    with pytest.raises(OperationalError, match=number):
        await write(manager, begin)


async def everyone(manager, name="default", statement=WHO):
    """What each connection of a pool answers."""
    async with AsyncExitStack() as stack:
        answers = []
        for _ in range(SIZE):
            await stack.enter_async_context(entered(manager.scope()))
            answers.append(await done(manager.get(name).scalar(statement)))
        return sorted(answers)


@on_both_halves
async def test_f33_readers_keep_their_connections_while_writes_are_refused(half, managed, mariadb_url, read_only):
    manager = managed(mariadb_url, default={}, other={}, reports={"readonly": True})
    for name in ("default", "other", "reports"):
        await everyone(manager, name)
    others = {name: await everyone(manager, name) for name in ("other", "reports")}
    stats = manager.database("default").stats
    read_only()
    began, before = monotonic(), stats.connects
    for _ in range(40):
        await refused(manager)
        await refused(manager)
        await ask(manager)
    # The whole pool once, and then one each second.
    assert stats.connects - before <= SIZE + 1 + (monotonic() - began) / discards.GAP_S
    assert {name: await everyone(manager, name) for name in others} == others


@on_both_halves
async def test_f33_all_names_of_an_address_move_after_a_failover(
    half, managed, mariadb, mariadb_url, read_only, second
):
    with Proxy(mariadb.port) as proxy:
        manager = managed(
            mariadb_url.replace(str(mariadb.port), str(proxy.port)), default={}, other={}, reports={"readonly": True}
        )
        names = ("default", "other", "reports")
        for name in names:
            await everyone(manager, name)
        read_only()
        await refused(manager)
        last = monotonic()
        await everyone(manager)  # opened by now, to the server of before
        proxy.lead_to(second.port)

        async def moved():
            try:
                await write(manager)
            except OperationalError as error:
                assert error.orig.args[0] == 1290
                return False
            return True

        end, tries = monotonic() + 30, 0
        while not await moved():
            tries += monotonic() > last + discards.GAP_S
            assert tries <= 2 and monotonic() < end  # one of them may have been under way when the second was over
        for name in names:
            assert await everyone(manager, name, text("SELECT @@port")) == [second.port] * SIZE, name
        kept = await everyone(manager, "reports")
        assert await everyone(manager, "reports") == kept


@pytest.fixture(scope="module")
def second_server(mariadb):
    server = MariaDBServer()
    try:
        with server.root() as cursor:
            cursor.execute("SET PASSWORD FOR app@'127.0.0.1' = PASSWORD(%s)", (mariadb.password,))
        yield server
    finally:
        server.close()


@pytest.fixture
def second(second_server, mariadb_url):
    """Another server with the same database."""
    name = mariadb_url.rpartition("/")[2]
    second_server.create_database(name)
    with second_server.root() as cursor:
        cursor.execute(f"CREATE TABLE {name}.t (n INT)")
    return second_server


@on_both_halves
async def test_f33_programs_own_read_only_transaction_discards_nothing(half, managed, mariadb_url, read_only):
    manager = managed(mariadb_url, default={})
    before = await everyone(manager)
    for begin in ("SET SESSION TRANSACTION READ ONLY", "SET SESSION TRANSACTION READ WRITE"):
        if begin.endswith("ONLY"):
            await refused(manager, "1792", begin)
        else:
            async with AsyncExitStack() as stack:
                for _ in range(SIZE):
                    await stack.enter_async_context(entered(manager.scope()))
                    await done(manager.get().execute(text(begin)))
    assert await everyone(manager) == before


@on_both_halves
async def test_f33_connections_lost_one_by_one_cost_others_nothing(half, managed, mariadb, mariadb_url, monkeypatch):
    """By an operator's KILL, or a proxy that ends them: in use, or idle."""
    monkeypatch.setattr(discards, "GAP_S", 3600.0)
    manager = managed(mariadb_url, default={}, other={})

    async def lose_one_in_use():
        async with entered(manager.scope()):
            kill(await done(manager.get().scalar(WHO)))
            with pytest.raises(OperationalError):
                await done(manager.get().execute(text("SELECT 1")))

    def kill(number):
        with mariadb.root() as cursor:
            cursor.execute("KILL %s", (number,))

    before = await everyone(manager)
    await lose_one_in_use()  # the first one of all: the server may be gone
    after = await everyone(manager)
    assert not set(before) & set(after)
    await lose_one_in_use()
    again = await everyone(manager)
    assert len(set(after) & set(again)) == SIZE - 1
    kill(again[0])
    last = await everyone(manager)
    assert len(set(again) & set(last)) == SIZE - 1
