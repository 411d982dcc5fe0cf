"""A unit of work that the server gives up for another's is run again by run_in_transaction(), and stored once."""

from __future__ import annotations

import pytest
from sqlalchemy import text

from support.drivers import every_driver
from support.halves import done, entered, on_both_halves, stepped
from support.servers import on


@pytest.fixture
def managed(half, drivers_url):
    managers = []

    def make(**options):
        entry = {"url": drivers_url, "options": {"pool_size": 2, **options}}
        managers.append(half.verbs.SessionManager({"default": entry}))
        return managers[-1]

    yield make

    async def dispose():
        for manager in managers:
            await done(manager.dispose())

    half.run(dispose)


class Pair:
    """Two units of work at once, each of which has done its first part before either does its second."""

    def __init__(self, half, manager):
        self.half, self.manager = half, manager
        self.attempts = [0, 0]
        self._first_parts = [half.event(), half.event()]

    async def run(self, first_part, second_part):
        """`first_part(session, k)` and `second_part(session, k)` are coroutine functions, with k of 0 and 1."""

        async def unit(k):
            self.attempts[k] += 1
            session = self.manager.get()
            await first_part(session, k)
            self._first_parts[k].set()
            await done(self._first_parts[1 - k].wait())
            await second_part(session, k)

        async def run(k):
            if self.half.name == "aio":
                await self.manager.run_in_transaction(lambda: unit(k), attempts=5)
            else:
                self.manager.run_in_transaction(lambda: stepped(unit(k)), attempts=5)

        for job in [self.half.spawn(lambda k=k: run(k)) for k in (0, 1)]:
            await self.half.join(job)


async def rows(manager):
    async with entered(manager.scope()):
        return (await done(manager.get().scalars(text("SELECT n FROM t ORDER BY id")))).all()


@pytest.fixture
def table(drivers_server, drivers_url):
    with drivers_server.root(drivers_url.rpartition("/")[2]) as cursor:
        cursor.execute(f"CREATE TABLE t (id {drivers_server.dialect.serial}, n INT)")
        cursor.execute("INSERT INTO t (id, n) VALUES (101, 0), (102, 0)")


@every_driver("mariadb", "postgresql", half="aio")  # gevent's wait in a process of their own, below
@on_both_halves
async def test_unit_of_work_runs_again_when_it_was_the_victim_of_a_deadlock(half, managed, table):
    async def add(session, k):
        await done(session.execute(text(f"UPDATE t SET n = n + 1 WHERE id = {101 + k}")))

    manager = managed()
    pair = Pair(half, manager)
    await pair.run(add, lambda session, k: add(session, 1 - k))
    assert await rows(manager) == [2, 2] and sum(pair.attempts) == 3


@on("mariadb", "postgresql")
def test_unit_of_work_of_a_greenlet_runs_again_when_it_was_the_victim_of_a_deadlock(with_server):
    with_server(
        """
        configure()
        request("CREATE TABLE t (id INT PRIMARY KEY, n INT)", commit=True)
        request("INSERT INTO t VALUES (0, 0), (1, 0)", commit=True)
        attempts, locked = [0, 0], [threading.Event(), threading.Event()]
        def add(id):
            session.execute(text(f"UPDATE t SET n = n + 1 WHERE id = {id}"))
        def unit(k):
            attempts[k] += 1
            add(k)
            locked[k].set()
            locked[1 - k].wait(20)
            add(1 - k)
        join([spawn(dbsession.run_in_transaction, lambda k=k: unit(k)) for k in (0, 1)])
        assert request("SELECT MIN(n) * 10 + MAX(n) FROM t") == 22 and sum(attempts) == 3, attempts
        nothing_in_use()
        """
    )


@every_driver("postgresql")
@on_both_halves
async def test_unit_of_work_runs_again_when_its_commit_is_a_serialization_failure(half, managed, table):
    """Each stores how many rows it has seen: one after the other, they would not see the same."""
    seen = [None, None]

    async def count(session, k):
        seen[k] = await done(session.scalar(text("SELECT COUNT(*) FROM t")))
        await done(session.execute(text(f"INSERT INTO t (n) VALUES ({seen[k]})")))

    async def nothing(session, k):
        pass

    manager = managed(isolation_level="SERIALIZABLE")
    pair = Pair(half, manager)
    await pair.run(count, nothing)
    assert sorted(await rows(manager)) == [0, 0, 2, 3] and sum(pair.attempts) == 3
