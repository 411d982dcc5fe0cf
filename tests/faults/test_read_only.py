"""A primary that takes no writes any more, and connections that are lost one by one: what is discarded for it."""

from __future__ import annotations

from contextlib import AsyncExitStack, ExitStack, closing
from time import monotonic

import pytest
from sqlalchemy import make_url, text
from sqlalchemy.exc import DBAPIError

from dbsession.core import discards
from support.dialects import dialect_of
from support.drivers import EVERY_DRIVER
from support.halves import done, entered, on_both_halves, sync
from support.proxy import Proxy

SIZE = 4


pytestmark = EVERY_DRIVER


@pytest.fixture
def managed(drivers_url, half):
    managers = []

    def make(port=None, **entries):
        url = drivers_url if port is None else make_url(drivers_url).set(port=port)
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
def read_only(drivers_server, drivers_url):
    """Makes the server read-only; `drivers_url` has a table `t`."""
    with drivers_server.root(make_url(drivers_url).database) as cursor:
        cursor.execute("CREATE TABLE t (n INT)")
    yield lambda: drivers_server.refuse_writes(True)
    drivers_server.refuse_writes(False)


def words(manager):
    return dialect_of(str(sync(manager.engine()).url))


async def ask(manager, name="default", what="who"):
    async with entered(manager.scope()):
        return await done(manager.get(name).scalar(text(f"SELECT {getattr(words(manager), what)}")))


async def write(manager, begin=None):
    async with entered(manager.scope()):
        if begin:
            await done(manager.get().execute(text(begin)))
        await done(manager.get().execute(text("INSERT INTO t VALUES (1)")))
        await done(manager.get().commit())


async def refused(manager, code="READ_ONLY", begin=None):
    with pytest.raises(DBAPIError) as raised:
        await write(manager, begin)
    assert words(manager).code(raised.value) == getattr(words(manager), code)


async def everyone(manager, name="default", what="who"):
    """What each connection of a pool answers."""
    async with AsyncExitStack() as stack:
        answers = []
        for _ in range(SIZE):
            await stack.enter_async_context(entered(manager.scope()))
            answers.append(await done(manager.get(name).scalar(text(f"SELECT {getattr(words(manager), what)}"))))
        return sorted(answers)


@on_both_halves
async def test_f33_readers_keep_their_connections_while_writes_are_refused(half, managed, read_only):
    manager = managed(default={}, other={}, reports={"readonly": True})
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
async def test_f33_all_names_of_an_address_move_after_a_failover(half, managed, drivers_server, read_only, second):
    with Proxy(drivers_server.port) as proxy:
        manager = managed(proxy.port, default={}, other={}, reports={"readonly": True})
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
            except DBAPIError as error:
                assert words(manager).code(error) == words(manager).READ_ONLY
                return False
            return True

        end, tries = monotonic() + 30, 0
        while not await moved():
            tries += monotonic() > last + discards.GAP_S
            assert tries <= 2 and monotonic() < end  # one of them may have been under way when the second was over
        for name in names:
            assert await everyone(manager, name, "port") == [second.port] * SIZE, name
        kept = await everyone(manager, "reports")
        assert await everyone(manager, "reports") == kept


@pytest.fixture(scope="module")
def others():
    """Another server of each kind, once it was needed."""
    with ExitStack() as stack:
        made = {}

        def of(kind):
            if kind not in made:
                made[kind] = stack.enter_context(closing(kind()))
            return made[kind]

        yield of


@pytest.fixture
def second(others, drivers_server, drivers_url):
    """Another server with the same database, account and table."""
    server, name = others(type(drivers_server)), make_url(drivers_url).database
    server.set_password(drivers_server.password)
    server.create_database(name)
    with server.root(name) as cursor:
        cursor.execute("CREATE TABLE t (n INT)")
    return server


@on_both_halves
async def test_f33_programs_own_read_only_transaction_discards_nothing(half, managed, read_only):
    manager = managed(default={})
    before = await everyone(manager)
    for begin in (words(manager).read_only, words(manager).read_write):
        if begin.endswith("ONLY"):
            await refused(manager, "OWN_READ_ONLY", begin)
        else:
            async with AsyncExitStack() as stack:
                for _ in range(SIZE):
                    await stack.enter_async_context(entered(manager.scope()))
                    await done(manager.get().execute(text(begin)))
    assert await everyone(manager) == before


@on_both_halves
async def test_f33_connections_lost_one_by_one_cost_others_nothing(half, managed, drivers_server, monkeypatch):
    """By an operator's KILL, or a proxy that ends them: in use, or idle."""
    monkeypatch.setattr(discards, "GAP_S", 3600.0)
    kill = drivers_server.kill_connection
    manager = managed(default={}, other={})

    async def lose_one_in_use():
        async with entered(manager.scope()):
            kill(await done(manager.get().scalar(text(f"SELECT {words(manager).who}"))))
            with pytest.raises(DBAPIError):
                await done(manager.get().execute(text("SELECT 1")))

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
