"""The end of a scope's sessions in asyncio: whatever fails, hangs or is cancelled, each is closed or discarded."""

from __future__ import annotations

import asyncio
import gc
import logging
import sqlite3
import threading
import time

import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.util import await_

from dbsession import aio
from dbsession.aio import teardown
from dbsession.core import session as sessions
from dbsession.core import teardown as core_teardown
from support.waiting import wait_until

BOUND_S = 60.0
NAMES = ("a", "b", "c")
ONE = text("SELECT 1")


class Boom(Exception):
    pass


class Kill(BaseException):
    """What is no Exception, and not one of those that asyncio treats in a way of their own."""


@pytest.fixture
def manager(tmp_path):
    return aio.SessionManager({name: f"sqlite:///{tmp_path}/{name}.db" for name in NAMES})


def run(main):
    async def bounded():
        async with asyncio.timeout(BOUND_S):
            return await main()

    return asyncio.run(bounded())


def in_use(manager):
    return sum(manager.engine(name).pool.checkedout() for name in NAMES)


def at_rollback(engine, what):
    """Make the next ROLLBACK on this engine call `what` in its place, once."""
    dialect = engine.sync_engine.dialect

    def do_rollback(connection):
        del dialect.do_rollback
        what()

    dialect.do_rollback = do_rollback


def fail(error):
    def what():
        raise error

    return what


def hang(reached=None):
    def what():
        if reached is not None:
            reached.set()
        await_(asyncio.Event().wait())

    return what


async def open_all(manager):
    for name in NAMES:
        await manager.get(name).execute(ONE)
    assert in_use(manager) == 3


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.name.startswith("dbsession")]


@pytest.mark.parametrize("failing", [("a",), ("b",), ("c",), NAMES])
def test_failing_session_is_discarded_and_the_others_are_closed(manager, caplog, failing):
    async def main():
        async with manager.scope("POST /orders"):
            before = [manager.get(name)() for name in NAMES]
            await open_all(manager)
            for name in failing:
                at_rollback(manager.engine(name), fail(Boom("secret-value")))
            await manager.clear()
            assert in_use(manager) == 0
            assert all(manager.get(name)() is not session for name, session in zip(NAMES, before, strict=True))
            await open_all(manager)
        assert in_use(manager) == 0
        for session in before:
            with pytest.raises(InvalidRequestError):
                await session.execute(ONE)

    gc.collect()
    gc.disable()
    try:
        run(main)
    finally:
        gc.enable()
    lines = warnings(caplog)
    assert len(lines) == len(failing)
    assert all("POST /orders" in line and "Boom" in line and "secret" not in line for line in lines)


def test_remove_of_a_failing_session_drops_it_first(manager, caplog):
    async def main():
        await open_all(manager)
        kept = manager.get("a")()
        at_rollback(manager.engine("a"), fail(Boom()))
        await manager.get("a").remove()
        assert manager.engine("a").pool.checkedout() == 0 and manager.get("a")() is not kept

    run(main)
    assert len(warnings(caplog)) == 1


def test_second_connection_of_a_session_is_given_back_too(manager):
    async def main():
        session = manager.get("a")()
        for name in NAMES:
            await session.execute(ONE, bind_arguments={"bind": manager.engine(name).sync_engine})
        assert in_use(manager) == 3
        for name in NAMES:
            at_rollback(manager.engine(name), fail(Boom()))
        await manager.clear()
        assert in_use(manager) == 0

    run(main)


@pytest.mark.parametrize("kill", [asyncio.CancelledError, Kill])
@pytest.mark.parametrize("at", NAMES)
def test_kill_in_teardown_goes_on_after_the_last_session(manager, kill, at):
    thrown = kill()

    async def main():
        async with manager.scope():
            await open_all(manager)
            at_rollback(manager.engine(at), fail(thrown))

    async def guarded():
        with pytest.raises(kill) as caught:
            await main()
        assert caught.value is thrown and in_use(manager) == 0
        await open_all(manager)

    run(guarded)


def test_kill_goes_before_an_error(manager):
    kill = Kill()

    async def main():
        with pytest.raises(Kill):
            async with manager.scope():
                await open_all(manager)
                for name, error in zip(NAMES, (Boom(), kill, Boom()), strict=True):
                    at_rollback(manager.engine(name), fail(error))
        assert in_use(manager) == 0

    run(main)


def test_cancellation_in_the_middle_of_a_close_goes_on_and_leaves_no_connection_out(manager, caplog):
    async def main():
        reached = asyncio.Event()

        async def use():
            async with manager.scope("a job"):
                await open_all(manager)
                at_rollback(manager.engine("b"), hang(reached))

        job = asyncio.create_task(use())
        await reached.wait()
        job.cancel()
        with pytest.raises(asyncio.CancelledError):
            await job
        assert in_use(manager) == 0
        await open_all(manager)

    run(main)
    assert warnings(caplog) and all("of a job failed to close with CancelledError" in line for line in warnings(caplog))


def test_close_that_hangs_is_given_up_within_its_bound(manager, caplog, monkeypatch):
    monkeypatch.setattr(core_teardown, "BOUND_S", 0.05)

    async def main():
        async with manager.scope("a job"):
            before = [manager.get(name)() for name in NAMES]
            await open_all(manager)
            for name in NAMES:
                at_rollback(manager.engine(name), hang())
        assert in_use(manager) == 0
        for session in before:
            with pytest.raises(InvalidRequestError):
                await session.execute(ONE)
        await open_all(manager)

    run(main)
    assert len(warnings(caplog)) == 3 and all("failed to close with TimeoutError" in line for line in warnings(caplog))


class Stuck(AsyncSession):
    async def close(self):
        await asyncio.Event().wait()


class Failing(AsyncSession):
    async def close(self):
        await super().close()
        raise Boom("secret")


@pytest.mark.parametrize("own", [Stuck, Failing])
@pytest.mark.parametrize("end", ["clear", "remove", "end of the scope", "end of the task"])
def test_close_of_the_users_own_that_hangs_or_fails_costs_no_connection(tmp_path, caplog, monkeypatch, own, end):
    monkeypatch.setattr(core_teardown, "BOUND_S", 0.05)
    manager = aio.SessionManager({"default": {"url": f"sqlite:///{tmp_path}/a.db", "session": {"class_": own}}})

    async def use():
        async with manager.scope():
            await manager.get().execute(ONE)
            if end == "clear":
                await manager.clear()
            elif end == "remove":
                await manager.get().remove()
        if end == "end of the task":
            await manager.get().execute(ONE)

    async def main():
        await asyncio.create_task(use())
        await asyncio.sleep(0)
        await teardown.settle(asyncio.get_running_loop())
        assert manager.engine().pool.checkedout() == 0

    run(main)
    assert not any("secret" in line for line in warnings(caplog)) and warnings(caplog)


@pytest.mark.parametrize("times", [1, 2, 3, 4])
def test_closing_task_that_is_cancelled_before_its_first_step_is_started_again_or_discards(manager, times):
    async def use():
        for name in NAMES:
            await manager.get(name).execute(ONE)

    async def main():
        job = asyncio.create_task(use())
        await asyncio.wait([job])
        for _ in range(times):
            while not teardown._under_way and in_use(manager):
                await asyncio.sleep(0)
            for task in list(teardown._under_way):
                task.cancel()  # before its first step: it was made in the pass of the loop that has just ended
            await asyncio.sleep(0)
        while teardown._under_way:
            await asyncio.wait(list(teardown._under_way))
        assert in_use(manager) == 0
        await open_all(manager)

    run(main)


def test_end_of_asyncio_run_with_tasks_in_the_middle_of_their_work_leaves_nothing_open(manager):
    closed = []

    async def hold(ready, name):
        await manager.get(name).execute(ONE)
        ready.release()
        await asyncio.Event().wait()

    async def main():
        ready, jobs = asyncio.Semaphore(0), []
        for name in NAMES:
            event.listen(manager.engine(name).sync_engine.pool, "close", lambda *_: closed.append(1))
            jobs += [asyncio.create_task(hold(ready, name)) for _ in range(2)]
        for _ in jobs:
            await ready.acquire()
        main.jobs = jobs  # referenced: what ends them is the loop's end

    threads = set(threading.enumerate())
    asyncio.run(main())
    assert all(job.cancelled() for job in main.jobs) and len(closed) == 6
    assert not teardown._under_way and not sessions._pinned
    wait_until(lambda: set(threading.enumerate()) <= threads, what="the end of the drivers' threads")


def test_task_that_ends_with_an_error_in_its_own_work_has_its_sessions_closed(manager):
    async def use():
        await open_all(manager)
        raise Boom

    async def main():
        with pytest.raises(Boom):
            await asyncio.create_task(use())
        await asyncio.sleep(0)
        await teardown.settle(asyncio.get_running_loop())
        assert in_use(manager) == 0

    run(main)


def test_listener_that_fails_at_a_tasks_end_leaves_the_other_sessions_no_connection(manager, caplog):
    async def use():
        await open_all(manager)
        await manager.get("a").rollback()
        await manager.get("a").begin()  # a transaction without a connection: closed on the spot
        event.listen(manager.get("a")().sync_session, "after_transaction_end", fail_at_end)

    def fail_at_end(session, transaction):
        raise Boom("secret")

    async def main():
        await asyncio.create_task(use())
        await asyncio.sleep(0)
        await teardown.settle(asyncio.get_running_loop())
        assert in_use(manager) == 0

    run(main)
    assert len(warnings(caplog)) == 1 and "secret" not in warnings(caplog)[0]


@pytest.mark.parametrize("end", ["close", "invalidate", "reset"])
def test_session_that_the_user_ends_and_that_fails_costs_no_connection(manager, end):
    async def main():
        session = manager.get("a")()
        await session.execute(ONE)
        if end != "invalidate":
            at_rollback(manager.engine("a"), fail(Boom()))
            with pytest.raises(Boom):
                await getattr(session, end)()
        else:
            await session.invalidate()
        assert in_use(manager) == 0

    run(main)


def test_close_of_a_session_by_its_user_that_is_cancelled_gives_its_connection_back(manager):
    async def main():
        reached = asyncio.Event()

        async def use():
            await manager.get("a").execute(ONE)
            at_rollback(manager.engine("a"), hang(reached))
            await manager.get("a").close()

        job = asyncio.create_task(use())
        await reached.wait()
        job.cancel()
        with pytest.raises(asyncio.CancelledError):
            await job
        assert in_use(manager) == 0 and await manager.get("a").scalar(ONE) == 1

    run(main)


def test_session_used_as_a_block_leaves_its_scope(manager):
    async def main():
        async with manager.scope() as unit:
            async with manager.get("a")() as session:
                await session.execute(ONE)
            assert not unit.sessions and in_use(manager) == 0
            assert await manager.get("a").scalar(ONE) == 1

    run(main)


def test_session_set_over_another_closes_that_one_aside(manager):
    async def main():
        proxy = manager.get("a")
        before = proxy()
        await proxy.execute(ONE)
        proxy.registry.set(proxy.session_factory())
        assert proxy() is not before
        await asyncio.sleep(0)
        await teardown.settle(asyncio.get_running_loop())
        assert in_use(manager) == 0
        with pytest.raises(InvalidRequestError):
            await before.execute(ONE)

    run(main)


def test_connection_that_is_thrown_away_at_the_loops_end_is_waited_for(tmp_path, monkeypatch):
    """Its thread answers the loop, which must not be closed by then."""
    released, failed = threading.Event(), []
    monkeypatch.setattr(threading, "excepthook", failed.append)

    class Slow(sqlite3.Connection):
        def close(self):
            assert released.wait(BOUND_S)
            super().close()

    entry = {"url": f"sqlite:///{tmp_path}/a.db", "options": {"connect_args": {"factory": Slow}}}
    manager = aio.SessionManager({"a": entry})

    async def main():
        await manager.get("a").execute(ONE)
        manager.get("a")().discard()
        threading.Timer(0.1, released.set).start()

    threads = set(threading.enumerate())
    run(main)
    wait_until(lambda: set(threading.enumerate()) <= threads)
    assert not failed


def test_connection_that_another_task_waits_for_is_given_back_when_its_session_has_ended(tmp_path):
    """A child may have been handed its parent's session, and wait in the pool when the parent is done."""
    entry = {"url": f"sqlite:///{tmp_path}/a.db", "options": {"pool_size": 1}}
    manager = aio.SessionManager({"default": entry})

    async def main():
        pool = manager.engine().pool
        async with manager.engine().connect() as holder:
            async with manager.scope():
                session = manager.get()()
                child = asyncio.create_task(session.execute(text("SELECT 1")))
                while not pool.waiting():
                    await asyncio.sleep(0)
            await holder.close()
        with pytest.raises(InvalidRequestError, match="unit of work is over"):
            await child
        assert pool.checkedout() == 0
        async with manager.scope():
            assert await manager.get().scalar(text("SELECT 2")) == 2

    run(main)


def test_log_handler_that_fails_keeps_no_session_from_being_closed(manager):
    class Broken(logging.Handler):
        def emit(self, record):
            raise RuntimeError("the handler is broken")

    async def main():
        await open_all(manager)
        for name in NAMES:
            at_rollback(manager.engine(name), fail(ValueError()))
        await manager.clear()
        assert in_use(manager) == 0

    handler = Broken()
    logging.getLogger("dbsession.aio.closing").addHandler(handler)
    try:
        run(main)
    finally:
        logging.getLogger("dbsession.aio.closing").removeHandler(handler)
    assert not sessions._pinned


def test_one_timer_cancels_each_closing_at_its_own_time_and_none_that_has_ended():
    async def main():
        bounds, now = teardown.Bounds(), time.monotonic()
        later, sooner, ended = (asyncio.create_task(asyncio.Event().wait()) for _ in range(3))
        last = bounds.begin(later, now + 0.06)
        first = bounds.begin(sooner, now + 0.02)
        bounds.open.discard(bounds.begin(ended, now + 0.04))
        await asyncio.wait([sooner])
        assert sooner.cancelled() and first.late and not last.late
        await asyncio.wait([later])
        assert later.cancelled() and last.late and not ended.done()
        assert time.monotonic() >= now + 0.06
        ended.cancel()

    run(main)
