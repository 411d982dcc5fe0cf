"""A server that has no room for as many connections as the pool may have: the others wait for those that there are."""

from __future__ import annotations

import contextlib
from collections import Counter
from time import time

import pymysql
import pytest
from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, OperationalError

from dbsession.core.engine import discard_earlier
from dbsession.core.pool import queue
from dbsession.errors import PoolTimeout
from support.dialects import dialect_of
from support.drivers import EVERY_DRIVER
from support.halves import done, entered, on_both_halves, sync


@pytest.fixture
def few(drivers_server, drivers_url):
    """The URL of a user who may have two connections, and what sets how many."""
    with drivers_server.user_with_few(make_url(drivers_url).database) as allow:
        allow(2)
        yield drivers_url.replace("app:", "few:"), allow


@pytest.fixture
def managed(half):
    managers = []

    def make(url, **entry):
        options = {"pool_size": 5, "pool_timeout": 20, **entry.pop("options", {})}
        entry = {"url": url, "options": options, **entry}
        managers.append(half.verbs.SessionManager({"default": entry}))
        return managers[-1]

    yield make

    async def dispose():
        for manager in managers:
            await done(manager.dispose())

    half.run(dispose)


async def who(manager):
    """The server's number of our connection."""
    words = dialect_of(str(sync(manager.engine()).url))
    return await done(manager.get().scalar(text(f"SELECT {words.who}")))


async def pause(half):
    """Let the others run."""
    passed = half.event()
    passed.set()
    await half.until(passed.is_set)


class Holder:
    """Has a connection until it is told to give it back."""

    def __init__(self, half, manager):
        self.end = half.event()
        self.number = None
        self.job = half.spawn(lambda: self._hold(manager))

    async def _hold(self, manager):
        async with entered(manager.scope()):
            self.number = await who(manager)
            await done(self.end.wait())


async def serve_twenty(half, manager):
    """Twenty at once; the connections that they had."""
    numbers = []

    async def request():
        async with entered(manager.scope()):
            numbers.append(await who(manager))
            await pause(half)

    for job in [half.spawn(request) for _ in range(20)]:
        await half.join(job)
    return Counter(numbers)


@EVERY_DRIVER
@on_both_halves
async def test_f43_others_wait_for_the_connections_that_a_user_may_have(half, managed, few):
    url, _ = few
    manager = managed(url)
    holders = [Holder(half, manager) for _ in range(2)]
    await half.until(lambda: all(holder.number for holder in holders))
    waiting = half.spawn(lambda: serve_twenty(half, manager))
    await half.until(lambda: manager.database("default").engine.pool.waiting() == 20)
    for holder in holders:
        holder.end.set()
    served = await half.join(waiting)
    assert set(served) <= {holder.number for holder in holders} and served.total() == 20
    for holder in holders:
        await half.join(holder.job)


@on_both_halves
async def test_f43_others_wait_when_the_server_has_too_many_connections(
    half, managed, drivers_url, mariadb, mariadb_url
):
    """1040, and twenty who come before any connection is open."""
    manager = managed(drivers_url)
    arguments = make_url(mariadb_url).translate_connect_args(username="user")
    with mariadb.root() as cursor, contextlib.ExitStack() as others:
        for _ in range(8):
            others.callback(pymysql.connect(**arguments).close)

        def room():
            cursor.execute("SHOW GLOBAL STATUS LIKE 'Threads_connected'")
            return 8 + 1 + 2 - int(cursor.fetchone()["Value"]) == 2

        await half.until(room)
        cursor.execute("SET GLOBAL max_connections = 11")
        try:
            assert (await serve_twenty(half, manager)).total() == 20
            assert manager.database("default").engine.pool.checkedin() <= 2
        finally:
            cursor.execute("SET GLOBAL max_connections = 500")


@EVERY_DRIVER
@on_both_halves
async def test_f43_error_comes_at_once_when_no_connection_can_be_opened(half, managed, drivers_server, few):
    url, allow = few
    manager, another = managed(url), managed(url)
    held = Holder(half, another)
    await half.until(lambda: held.number)
    allow(1)
    errors = []

    async def request():
        with pytest.raises(DBAPIError) as caught:
            async with entered(manager.scope()):
                await who(manager)
        errors.append(drivers_server.dialect.is_full(caught.value))

    for job in [half.spawn(request) for _ in range(10)]:
        await half.join(job)
    assert errors == [True] * 10
    held.end.set()
    await half.join(held.job)
    await done(another.dispose())
    assert (await serve_twenty(half, manager)).total() == 20


@EVERY_DRIVER
@on_both_halves
async def test_f43_pool_grows_again_when_the_server_has_room_again(half, managed, few, monkeypatch):
    monkeypatch.setattr(queue, "TRY_EVERY_S", 0.05)
    monkeypatch.setattr("dbsession.aio.pool.TRY_EVERY_S", 0.05)
    url, allow = few
    manager = managed(url)
    holders = [Holder(half, manager) for _ in range(4)]
    await half.until(lambda: sum(bool(holder.number) for holder in holders) == 2)
    allow(5)
    await half.until(lambda: all(holder.number for holder in holders))
    assert len({holder.number for holder in holders}) == 4
    for holder in holders:
        holder.end.set()
        await half.join(holder.job)


@EVERY_DRIVER
@on_both_halves
async def test_f43_all_who_wait_are_tried_once_the_server_has_let_one_more_in(half, managed, few, monkeypatch):
    monkeypatch.setattr(queue, "TRY_EVERY_S", 60)
    monkeypatch.setattr("dbsession.aio.pool.TRY_EVERY_S", 60)
    url, allow = few
    manager = managed(url)
    holders = [Holder(half, manager) for _ in range(5)]
    pool = manager.database("default").engine.pool
    await half.until(lambda: pool.waiting() == 3)
    allow(5)
    pool._try_at = 0.0  # the time has come, once
    pool._try_more()
    await half.until(lambda: all(holder.number for holder in holders))
    for holder in holders:
        holder.end.set()
        await half.join(holder.job)


@EVERY_DRIVER
@on_both_halves
async def test_f43_timeout_says_that_the_server_refuses_more(half, managed, few):
    url, _ = few
    manager = managed(url, options={"pool_timeout": 0.3})
    holders = [Holder(half, manager) for _ in range(2)]
    await half.until(lambda: all(holder.number for holder in holders))
    with pytest.raises(PoolTimeout, match=r"the server refuses more connections \(.* with 2 in use"):
        async with entered(manager.scope()):
            await who(manager)
    for holder in holders:
        holder.end.set()
        await half.join(holder.job)


@EVERY_DRIVER
@on_both_halves
async def test_f43_waiters_get_the_error_when_the_last_connection_is_lost(half, managed, few, drivers_server):
    url, allow = few
    manager = managed(url)
    holders = [Holder(half, manager) for _ in range(2)]
    await half.until(lambda: all(holder.number for holder in holders))
    blocked = half.spawn(lambda: serve_twenty(half, manager))
    await half.until(lambda: manager.database("default").engine.pool.waiting() == 20)
    allow(1)
    for holder in holders:
        drivers_server.kill_connection(holder.number)
        holder.end.set()
    with contextlib.suppress(DBAPIError):
        await half.join(blocked)
    for holder in holders:
        await half.join(holder.job)
    assert manager.database("default").engine.pool.waiting() == 0


@EVERY_DRIVER
@on_both_halves
async def test_f43_another_one_is_waited_for_when_an_old_one_cannot_be_replaced(half, managed, few):
    url, allow = few
    manager = managed(url)
    holders = [Holder(half, manager) for _ in range(2)]
    await half.until(lambda: all(holder.number for holder in holders))
    holders[0].end.set()
    await half.join(holders[0].job)
    allow(1)
    pool = manager.database("default").engine.pool
    discard_earlier(manager.database("default").config.url, time() + 0.001)
    waiting = Holder(half, manager)
    await half.until(lambda: pool.waiting() == 1)
    allow(2)  # what comes back is replaced, too, and the server may still count the connection that it replaces
    holders[1].end.set()
    await half.until(lambda: waiting.number)
    waiting.end.set()
    for job in (holders[1].job, waiting.job):
        await half.join(job)


@on_both_halves
async def test_f43_refused_kill_is_tried_again(half, managed, few):
    url, allow = few
    manager = managed(url)
    held = Holder(half, manager)
    await half.until(lambda: held.number)
    async with entered(manager.scope(read_timeout_s=0.3)):
        with pytest.raises(OperationalError):
            await done(manager.get().execute(text("SELECT SLEEP(60)")))
    await pause(half)
    stats = manager.database("default").stats
    assert stats.kills == 0
    allow(3)
    await half.until(lambda: stats.kills == 1)
    held.end.set()
    await half.join(held.job)
