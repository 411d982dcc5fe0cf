"""snapshot() of asyncio: the databases of every loop, who holds their connections, the scopes of tasks."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import threading

import pytest
from sqlalchemy import pool, text
from sqlalchemy.orm import Session

import dbsession
from dbsession import aio
from dbsession.core.pool.holders import Holder
from support.processes import run_python

DEADLINE_S = 30


@pytest.fixture
def managed(tmp_path):
    """Makes a manager of one SQLite database; `managed(**options)`."""
    return lambda **options: aio.SessionManager({"sights": {"url": f"sqlite:///{tmp_path}/a.db", "options": options}})


@pytest.fixture(autouse=True)
def alone():
    gc.collect()  # what other tests have left
    yield


def databases(seen):
    return [each for each in seen.databases if each.name == "sights"]


def holders(seen):
    return [each for each in seen.holders if each.database == "sights"]


def scopes(seen):
    return [each for each in seen.scopes if any(session.database == "sights" for session in each.sessions)]


def test_snapshot_has_pools_holders_and_scopes(managed):
    manager = managed(pool_size=2, max_overflow=1, pool_timeout=30)

    async def main():
        ready, end = asyncio.Semaphore(0), asyncio.Event()

        async def hold(label):
            async with manager.scope(label):
                await manager.get("sights").execute(text("SELECT 'secret'"))
                ready.release()
                await end.wait()

        async def wait():
            async with manager.engine("sights").connect():
                pass

        tasks = [asyncio.create_task(hold(f"job {n}")) for n in range(3)]
        for _ in tasks:
            await ready.acquire()
        tasks.append(asyncio.create_task(wait()))
        while not manager.engine("sights").pool.waiting():
            await asyncio.sleep(0)
        seen = aio.snapshot()
        (database,) = databases(seen)
        assert (database.backend, database.size, database.limit) == ("sqlite", 2, 3)
        assert (database.in_use, database.idle, database.waiting) == (3, 0, 1)
        assert (database.checkouts, database.connects, sum(database.holds.counts)) == (3, 3, 0)
        assert {each.scope for each in holders(seen)} == {"job 0", "job 1", "job 2"}
        assert [each.held_s for each in holders(seen)] == sorted((each.held_s for each in holders(seen)), reverse=True)
        assert all(type(each) is Holder and each.statement == "SELECT ?" for each in holders(seen))
        assert [(each.label, each.kind) for each in scopes(seen)] == [(f"job {n}", "block") for n in range(3)]
        assert all(each.sessions[0].in_transaction for each in scopes(seen))
        assert seen.pid == os.getpid()
        assert json.loads(json.dumps(seen.as_dict()))["version"] == 1 and "secret" not in repr(seen)
        end.set()
        await asyncio.gather(*tasks)
        seen = aio.snapshot()
        assert not holders(seen) and not scopes(seen)
        (database,) = databases(seen)
        assert (database.in_use, database.waiting, sum(database.holds.counts)) == (0, 0, 4)
        assert sum(database.waits.counts) == database.checkouts == 4

    asyncio.run(main())
    assert not databases(aio.snapshot())  # closed with its loop


def test_snapshot_has_every_loop_and_is_taken_without_one(managed):
    ready, end = threading.Barrier(3), threading.Event()
    manager = managed()

    def job(name):
        async def main():
            async with manager.scope(name):
                await manager.get("sights").execute(text("SELECT 1"))
                ready.wait(DEADLINE_S)
                assert end.wait(DEADLINE_S)

        asyncio.run(main())

    threads = [threading.Thread(target=job, args=(f"loop {n}",)) for n in range(2)]
    for thread in threads:
        thread.start()
    ready.wait(DEADLINE_S)
    try:
        seen = aio.snapshot()
    finally:
        end.set()
        for thread in threads:
            thread.join(DEADLINE_S)
    assert [each.in_use for each in databases(seen)] == [1, 1]
    assert {each.scope for each in holders(seen)} == {each.label for each in scopes(seen)} == {"loop 0", "loop 1"}


def test_snapshot_of_the_gevent_half_has_both_and_aios_its_own(managed, tmp_path):
    greenlets = dbsession.SessionManager({"sights": f"sqlite:///{tmp_path}/a.db"})
    manager = managed()

    async def main():
        async with manager.scope("a task"):
            await manager.get("sights").execute(text("SELECT 1"))
            return aio.snapshot(), dbsession.snapshot()

    with greenlets.scope("a greenlet"):
        greenlets.get("sights").execute(text("SELECT 1"))
        own, both = asyncio.run(main())
    greenlets.dispose()
    assert [each.scope for each in holders(own)] == [each.label for each in scopes(own)] == ["a task"]
    assert [each.scope for each in holders(both)] == [each.label for each in scopes(both)] == ["a greenlet", "a task"]
    assert len(databases(own)) == 1 and len(databases(both)) == 2
    assert type(own) is type(both) is dbsession.Snapshot is aio.Snapshot


def test_snapshot_says_what_is_known_of_another_pool(managed):
    manager = managed(poolclass=pool.NullPool)

    async def main():
        async with manager.engine("sights").connect():
            seen = aio.snapshot()
        (database,) = databases(seen)
        assert (database.size, database.limit, database.in_use, database.waiting) == (None, None, 1, 0)
        assert len(holders(seen)) == 1 and databases(aio.snapshot())[0].in_use == 0

    asyncio.run(main())


def test_snapshot_has_a_retired_database_as_long_as_somebody_holds_its_connection(managed, tmp_path):
    manager = managed()

    async def main():
        connection = await manager.engine("sights").connect()
        manager.configure({"sights": f"sqlite:///{tmp_path}/b.db"})
        manager.database("sights")
        assert len(databases(aio.snapshot())) == 2
        await connection.close()
        assert len(databases(aio.snapshot())) == 1

    asyncio.run(main())


def test_snapshot_shows_an_implicit_scope_by_its_task(managed):
    manager = managed()

    async def main():
        async def job():
            await manager.get("sights").execute(text("SELECT 1"))
            return aio.snapshot()

        seen = await asyncio.create_task(job(), name="the job")
        assert holders(seen)[0].scope.endswith(".job in the job")
        assert [each.kind for each in scopes(seen)] == ["implicit"]

    asyncio.run(main())


def test_snapshot_of_a_forked_child_has_nothing_of_its_parents(tmp_path):
    run_python(
        f"""
        import asyncio, os, sys
        from sqlalchemy import text
        from dbsession import aio

        aio.configure({{"default": "sqlite:///{tmp_path}/a.db"}})
        async def main():
            async with aio.session_scope("the parent's"):
                await aio.get_dbsession().execute(text("SELECT 1"))
                pid = os.fork()
                if pid == 0:
                    seen = aio.snapshot()
                    os._exit(bool(seen.databases or seen.holders or seen.scopes))
                assert os.waitpid(pid, 0)[1] == 0
                assert aio.snapshot().holders and aio.snapshot().scopes
        asyncio.run(main())
        assert not aio.snapshot().databases and "gevent" not in sys.modules
        """,
        timeout=60,
    )


def test_snapshot_may_be_taken_while_a_session_is_opened(tmp_path):
    """As by another thread, in both halves."""
    seen = []

    class Seen(Session):
        def __setattr__(self, name, value):
            super().__setattr__(name, value)
            seen.append(scopes(dbsession.snapshot()))

    databases = {"sights": {"url": f"sqlite:///{tmp_path}/a.db", "session": {"class_": Seen}}}

    async def main():
        manager = aio.SessionManager(databases)
        await manager.get("sights").execute(text("SELECT 1"))
        assert len(scopes(dbsession.snapshot())) == 1

    asyncio.run(main())
    manager = dbsession.SessionManager(databases)
    with manager.scope():
        manager.get("sights").execute(text("SELECT 1"))
        assert len(scopes(dbsession.snapshot())) == 1
    manager.dispose()
    assert seen
