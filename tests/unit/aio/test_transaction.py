"""What run_in_transaction does in asyncio beyond the common contract (tests/contract/test_both_halves.py): tasks,
cancellation, awaitables of every kind."""

from __future__ import annotations

import asyncio
import functools
import inspect
import sqlite3

import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import OperationalError

from dbsession import aio
from dbsession.aio import scope
from dbsession.errors import RollbackRequired

BOUND_S = 60.0


@pytest.fixture
def manager(tmp_path):
    manager = aio.SessionManager({name: f"sqlite:///{tmp_path}/{name}.db" for name in ("default", "other")})

    async def prepare():
        for name in ("default", "other"):
            async with manager.engine(name).begin() as connection:
                await connection.execute(text("CREATE TABLE t (n INT)"))

    run(prepare)
    return manager


def run(main):
    async def bounded():
        async with asyncio.timeout(BOUND_S):
            return await main()

    return asyncio.run(bounded())


def busy():
    error = sqlite3.OperationalError("database is locked")
    error.sqlite_errorcode = sqlite3.SQLITE_BUSY
    return OperationalError(None, None, error)


async def insert(manager, n, name="default"):
    await manager.get(name).execute(text("INSERT INTO t VALUES (:n)"), {"n": n})


async def rows(manager, name="default"):
    async with manager.engine(name).connect() as connection:
        return sorted((await connection.scalars(text("SELECT n FROM t"))).all())


class Work:
    """A callable object, whose __call__ is a coroutine function."""

    def __init__(self, manager):
        self.manager = manager

    async def __call__(self, session=None):
        await insert(self.manager, 1)
        return "done"


def test_fn_may_be_anything_that_gives_an_awaitable(manager):
    async def plain():
        await insert(manager, 1)
        return "done"

    async def with_session(session):
        assert session is manager.get()
        return await plain()

    def future():
        return asyncio.ensure_future(asyncio.sleep(0, "done"))

    async def main():
        work = Work(manager)
        for fn in (
            plain,
            with_session,
            work,
            work.__call__,
            functools.partial(with_session, manager.get()),
            lambda: plain(),
            future,
            lambda: "done",
        ):
            assert await manager.run_in_transaction(fn) == "done"
        assert await rows(manager) == [1] * 6

    run(main)


def test_work_in_a_child_task_is_a_unit_of_its_own(manager):
    """A child has a scope of its own, so what it does is not the parent's to commit or to roll back."""

    async def part(n):
        await insert(manager, n)

    async def whole():
        await asyncio.create_task(manager.run_in_transaction(lambda: part(2)))
        await insert(manager, 1)
        raise KeyError

    async def main():
        with pytest.raises(KeyError):
            await manager.run_in_transaction(whole)
        assert await rows(manager) == [2]

    run(main)


def test_nested_use_in_a_block_of_its_own_is_a_unit_of_its_own(manager):
    async def whole():
        async with manager.scope():
            await manager.run_in_transaction(functools.partial(insert, manager, 2, "other"), name="other")
        await insert(manager, 1)

    async def main():
        await manager.run_in_transaction(whole)
        assert (await rows(manager), await rows(manager, "other")) == ([1], [2])

    run(main)


def test_units_of_two_managers_do_not_join(manager, tmp_path):
    second = aio.SessionManager({"default": f"sqlite:///{tmp_path}/other.db"})

    async def part():
        await second.get().execute(text("INSERT INTO t VALUES (2)"))

    async def whole():
        await second.run_in_transaction(part)
        await insert(manager, 1)
        raise KeyError

    async def main():
        with pytest.raises(KeyError):
            await manager.run_in_transaction(whole)
        assert (await rows(manager), await rows(manager, "other")) == ([], [2])

    run(main)


def test_cancellation_rolls_back_and_goes_on(manager):
    async def main():
        reached = asyncio.Event()

        async def work():
            await insert(manager, 1)
            reached.set()
            await asyncio.Event().wait()

        job = asyncio.create_task(manager.run_in_transaction(work))
        await reached.wait()
        job.cancel()
        with pytest.raises(asyncio.CancelledError):
            await job
        assert await rows(manager) == [] and manager.engine().pool.checkedout() == 0

    run(main)


def test_cancellation_in_the_pause_ends_it(manager):
    async def main():
        calls, failed = [], asyncio.Event()

        async def work():
            calls.append(1)
            asyncio.get_running_loop().call_soon(failed.set)
            raise busy()

        job = asyncio.create_task(manager.run_in_transaction(work, backoff_s=1000, attempts=1000))
        await failed.wait()
        job.cancel()
        with pytest.raises(asyncio.CancelledError):
            await job
        assert manager.engine().pool.checkedout() == 0 and len(calls) >= 1

    run(main)


def test_part_that_was_cancelled_refuses_the_whole(manager):
    """A timeout round a part of it: half of the part may be done."""

    async def part(limit):
        await insert(manager, 2)
        limit.reschedule(0)
        await asyncio.Event().wait()

    async def whole():
        await insert(manager, 1)
        try:
            async with asyncio.timeout(None) as limit:
                await manager.run_in_transaction(lambda: part(limit))
        except TimeoutError:
            pass

    async def main():
        with pytest.raises(RollbackRequired, match=r"CancelledError.*\[DBS-ROLLBACK\]$"):
            await manager.run_in_transaction(whole)
        assert await rows(manager) == []

    run(main)


def test_busy_part_makes_the_whole_run_again(manager):
    calls = []

    async def part():
        calls.append(1)
        if len(calls) < 3:
            raise busy()
        await insert(manager, 2)

    async def whole():
        await insert(manager, 1)
        try:
            await manager.run_in_transaction(part)
        except OperationalError:
            pass  # the whole is refused for it, and the reason is one to try again

    async def main():
        await manager.run_in_transaction(whole, backoff_s=0.001)
        assert await rows(manager) == [1, 2] and len(calls) == 3

    run(main)


def test_concurrent_units_each_commit_their_own(manager):
    async def work(n):
        await insert(manager, n)
        await asyncio.sleep(0)

    async def main():
        commits = []
        event.listen(manager.engine().sync_engine, "commit", commits.append)
        await asyncio.gather(*[manager.run_in_transaction(functools.partial(work, n), attempts=50) for n in range(10)])
        assert await rows(manager) == list(range(10)) and len(commits) == 10

    run(main)


def test_decorated_coroutine_function_stays_one(manager):
    @manager.transactional
    async def work(n, *, more=0):
        """What it does."""
        await insert(manager, n + more)
        return scope.current().label

    async def main():
        assert (await work(1, more=1)).endswith("work") and await rows(manager) == [2]

    assert inspect.iscoroutinefunction(work) and work.__doc__ == "What it does." and work.__name__ == "work"
    assert list(inspect.signature(work).parameters) == ["n", "more"]
    run(main)


def test_transaction_outside_a_task_is_refused(manager):
    async def main():
        seen = asyncio.get_running_loop().create_future()

        def callback():
            try:
                manager.run_in_transaction(lambda: None).send(None)
            except aio.ScopeRequired as error:
                seen.set_result(error)

        asyncio.get_running_loop().call_soon(callback)
        assert "[DBS-SCOPE-REQUIRED]" in str(await seen)

    run(main)
