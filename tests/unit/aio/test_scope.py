"""Whose scope a task of asyncio has, and when it ends: in children, callbacks, threads, generators, dropped scopes."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import sys
import threading
import weakref
from contextlib import aclosing

import pytest
from sqlalchemy import text
from sqlalchemy.exc import InvalidRequestError

from dbsession import aio
from dbsession.aio import scope, teardown
from dbsession.core import session as sessions
from dbsession.errors import ScopeEnded, ScopeRequired

BOUND_S = 60.0
ONE = text("SELECT 1")


@pytest.fixture
def manager(tmp_path):
    return aio.SessionManager({name: f"sqlite:///{tmp_path}/{name}.db" for name in ("default", "other")})


def run(main):
    async def bounded():
        async with asyncio.timeout(BOUND_S):
            return await main()

    return asyncio.run(bounded())


def in_use(manager, name="default"):
    return manager.engine(name).pool.checkedout()


async def passes(n=3):
    """Let what is due run: done-callbacks, and the first steps of the tasks that they start."""
    for _ in range(n):
        await asyncio.sleep(0)


async def all_given_back(manager):
    await passes()
    await teardown.settle(asyncio.get_running_loop())
    assert in_use(manager) == 0


def of_type(*types):
    return [each for each in gc.get_objects() if type(each) in types]


def test_stack_has_the_current_scopes_sessions_when_blocks_end_in_another_order(manager):
    """A look-up goes to them without a look at the scopes."""

    async def main():
        stack, session = scope.stack_here(), manager.get()
        assert not stack.sessions
        implicit = session()
        assert stack.sessions is scope.current().sessions and list(stack.sessions.values()) == [implicit]
        outer, inner = manager.scope("outer"), manager.scope("inner")
        for block in (outer, inner):
            await block.__aenter__()
            assert stack.sessions is scope.current().sessions and not stack.sessions
        innermost = session()
        await outer.__aexit__(None, None, None)  # as of a generator that somebody else closes
        assert session() is innermost and stack.sessions is scope.current().sessions
        await inner.__aexit__(None, None, None)
        assert session() is implicit and stack.sessions is scope.current().sessions
        return stack

    assert run(main).sessions is scope._NO_SESSIONS


def test_stack_sets_one_done_callback_however_often_sessions_are_used(manager):
    added = []

    class Counting(asyncio.Task):
        def add_done_callback(self, callback, **more):
            added.append(callback)
            super().add_done_callback(callback, **more)

    async def use():
        for name in ("default", "other"):
            for _ in range(100):
                manager.get(name)()
            await manager.get(name).execute(ONE)
            await manager.clear()
            async with manager.scope():
                await manager.get(name).execute(ONE)
            await manager.run_in_transaction(lambda session: session.execute(ONE), name=name)

    async def main():
        asyncio.get_running_loop().set_task_factory(lambda loop, work, **more: Counting(work, loop=loop, **more))
        await asyncio.create_task(use())
        assert [each.__qualname__ for each in added if isinstance(getattr(each, "__self__", None), scope.Stack)] == [
            "Stack._task_done"
        ]

    run(main)


@pytest.mark.parametrize("used", [False, True], ids=["untouched", "in a transaction"])
def test_tasks_leave_nothing_behind_when_nobody_calls_remove(manager, used):
    """A thousand of them, without garbage collection."""
    seen = []

    async def use():
        session = manager.get()()
        seen.extend(map(weakref.ref, (asyncio.current_task(), session, session.sync_session)))
        if used:
            await manager.get().execute(ONE)

    async def main():
        for _ in range(50):
            await asyncio.gather(*[use() for _ in range(20)])
        await all_given_back(manager)
        await passes()
        assert len(seen) == 3000 and [each() for each in seen if each() is not None] == []
        assert not of_type(scope.Scope)
        # Empty ones, in contexts: of the loop's exits, and of cancelled timers, of which asyncio keeps up to 100.
        stacks = of_type(scope.Stack)
        assert len(stacks) <= 101 and not any(each.task or each.loop or each.scopes for each in stacks)
        assert not teardown._under_way and not sessions._pinned

    gc.collect()
    gc.disable()
    try:
        run(main)
    finally:
        gc.enable()


def test_children_have_scopes_of_their_own(manager):
    async def use():
        assert scope.current() is None
        mine = manager.get()()
        await manager.get().execute(ONE)
        assert manager.get()() is mine
        return mine

    async def main():
        mine = manager.get()()
        async with manager.scope("of the parent") as unit:
            inner = manager.get()()
            children = list(await asyncio.gather(use(), use()))
            async with asyncio.TaskGroup() as group:
                jobs = [group.create_task(use()) for _ in range(2)]
            children += [job.result() for job in jobs]
            children.append(await asyncio.create_task(use()))
            children.append(await asyncio.wait_for(asyncio.create_task(use()), BOUND_S))
            assert manager.get()() is inner and len(unit.sessions) == 1
        assert manager.get()() is mine
        assert len({id(each) for each in [mine, inner, *children]}) == 8
        await all_given_back(manager)
        for session in children:
            with pytest.raises(InvalidRequestError):
                await session.execute(ONE)

    run(main)


def test_child_that_outlives_its_parent_keeps_its_own_scope(manager):
    async def child(go):
        mine = manager.get()()
        await go.wait()
        assert manager.get()() is mine and await manager.get().scalar(ONE) == 1

    async def parent(go):
        manager.get()()
        return asyncio.create_task(child(go))

    async def main():
        go = asyncio.Event()
        job = await asyncio.create_task(parent(go))
        await passes()
        go.set()
        await job

    run(main)


def test_copied_context_in_the_same_task_finds_its_scope(manager):
    async def main():
        mine = manager.get()()
        assert contextvars.copy_context().run(manager.get()) is mine
        assert contextvars.Context().run(manager.get()) is mine  # by the task, where the context knows nothing

    run(main)


@pytest.mark.parametrize("use", ["session", "scope", "clear", "release", "has"])
def test_callback_of_the_loop_is_refused(manager, use):
    uses = {
        "session": manager.get(),
        "scope": lambda: manager.scope().__aenter__().send(None),
        "clear": lambda: manager.clear().send(None),
        "release": lambda: manager.release().send(None),
        "has": manager.get().registry.has,
    }

    async def main():
        mine, loop = manager.get()(), asyncio.get_running_loop()
        for schedule in (
            lambda callback: loop.call_soon(callback),
            lambda callback: loop.call_later(0, callback),
            lambda callback: loop.call_soon_threadsafe(callback),
            lambda callback: loop.call_soon(callback, context=contextvars.copy_context()),
        ):
            seen = loop.create_future()

            def callback(seen=seen):
                try:
                    seen.set_result(uses[use]())
                except ScopeRequired as error:
                    seen.set_exception(error)

            schedule(callback)
            with pytest.raises(ScopeRequired, match=r"callback.*create_task.*\[DBS-SCOPE-REQUIRED\]$"):
                await seen
        assert manager.get()() is mine

    run(main)


def test_thread_is_refused_while_the_parent_runs_on(manager):
    """With the parent's context, whose task asyncio names as the one that runs in the parent's loop: only the thread
    tells the two apart."""

    def use(used):
        try:
            with pytest.raises(ScopeRequired, match=r"thread.*\[DBS-SCOPE-REQUIRED\]$"):
                manager.get()()
            with pytest.raises(ScopeRequired):
                manager.get().add(object())
        finally:
            used.set()

    async def main():
        loop, mine = asyncio.get_running_loop(), manager.get()()
        for in_context in (contextvars.copy_context().run, lambda use, used: use(used)):
            used = threading.Event()
            job = loop.run_in_executor(None, in_context, use, used)
            assert used.wait(BOUND_S)  # in the middle of this task's step
            await job
            await asyncio.to_thread(use, used)
        assert manager.get()() is mine

    run(main)


def test_loop_in_a_thread_with_a_copied_context_has_scopes_of_its_own(manager):
    async def use():
        assert scope.current() is None
        mine = manager.get()()
        await manager.get().execute(ONE)
        assert manager.get()() is mine
        return mine

    async def main():
        mine = manager.get()()
        await manager.get().execute(ONE)
        theirs = await asyncio.to_thread(asyncio.run, use())
        assert theirs is not mine and theirs.bind is not mine.bind
        assert manager.get()() is mine and await mine.scalar(ONE) == 1

    run(main)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="Python 3.11 has no eager tasks")
@pytest.mark.parametrize("waits", [False, True])
def test_eager_task_has_a_scope_of_its_own(manager, waits):
    async def use():
        mine = manager.get()()
        if waits:
            await manager.get().execute(ONE)
        return mine

    async def main():
        asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)
        mine = manager.get()()
        job = asyncio.create_task(use())
        assert manager.get()() is mine
        theirs = await job
        assert theirs is not mine and manager.get()() is mine
        await all_given_back(manager)
        with pytest.raises(InvalidRequestError):
            await theirs.execute(ONE)

    run(main)


def test_task_that_is_cancelled_before_its_first_step_leaves_nothing(manager):
    async def main():
        job = asyncio.create_task(manager.get().execute(ONE))
        job.cancel()
        with pytest.raises(asyncio.CancelledError):
            await job
        await all_given_back(manager)

    run(main)


def test_implicit_scope_is_opened_by_the_first_use_outside_any_block(manager):
    async def main():
        async with manager.scope():
            manager.get()()
        assert scope.current() is None
        manager.get()()
        assert (scope.current().kind, scope.current().label) == ("implicit", "the rest of a task")
        async with manager.scope() as unit:
            assert scope.current() is unit
        assert scope.current().kind == "implicit"

    run(main)


async def lines(manager, seen):
    async with manager.scope("lines") as unit:
        seen.append(unit)
        await manager.get().execute(ONE)
        yield 1
        yield 2


@pytest.mark.parametrize("opener_lives", [True, False])
def test_generator_that_is_closed_in_another_task_ends_its_own_scope(manager, opener_lives):
    async def main():
        seen, opened, go = [], asyncio.Event(), asyncio.Event()
        generator = lines(manager, seen)

        async def opener():
            assert await anext(generator) == 1
            opened.set()
            if opener_lives:
                await go.wait()
                assert scope.current() is None

        async def closer():
            mine = manager.get()()
            await generator.aclose()
            assert manager.get()() is mine and seen[0].ended and not seen[0].sessions

        job = asyncio.create_task(opener())
        await opened.wait()
        await passes()
        assert in_use(manager) == 1 and not seen[0].ended
        await asyncio.create_task(closer())
        go.set()
        await job
        await all_given_back(manager)

    run(main)


def test_generator_that_nobody_closes_is_ended_with_its_loop(manager):
    seen = []

    async def main():
        generator = lines(manager, seen)
        await anext(generator)
        return generator

    generator = run(main)
    assert seen[0].ended and not seen[0].sessions and generator is not None


def test_generator_in_its_own_task_uses_its_scope_only_while_it_is_open(manager):
    async def main():
        mine, seen = manager.get()(), []
        async with aclosing(lines(manager, seen)) as generator:
            async for _ in generator:
                break
        assert seen[0].ended and manager.get()() is mine

    run(main)


def test_scope_may_be_ended_twice_and_its_block_left_afterwards(manager):
    async def main():
        block = manager.scope()
        async with block as unit:
            await manager.get().execute(ONE)
            await unit.end()
            await unit.end()
            with pytest.raises(ScopeEnded):
                manager.get()()
        await unit.end()
        await block.__aexit__(None, None, None)
        assert in_use(manager) == 0 and scope.current() is None

    run(main)


def test_scope_is_ended_from_another_task_and_refuses_its_own(manager):
    async def main():
        async with manager.scope("a request") as unit:
            await manager.get().execute(ONE)
            await asyncio.create_task(unit.end())
            assert in_use(manager) == 0
            with pytest.raises(ScopeEnded, match="a request"):
                await manager.get().execute(ONE)

    run(main)


async def leave_open(manager, kept):
    """A task that ends in the middle of a block, as nobody should."""
    unit = await manager.scope("left open").__aenter__()
    await manager.get().execute(ONE)
    kept.append(unit)


@pytest.mark.parametrize("where", ["the task's end", "the loop's thread", "another thread"])
def test_scope_that_is_dropped_without_an_end_gives_its_connections_back(manager, where):
    async def main():
        kept = []
        await asyncio.create_task(leave_open(manager, [] if where == "the task's end" else kept))
        await passes()
        if where != "the task's end":
            await teardown.settle(asyncio.get_running_loop())
            assert in_use(manager) == 1 and not kept[0].ended
            if where == "another thread":
                await asyncio.to_thread(kept.clear)
            kept.clear()
        await passes(5)
        await all_given_back(manager)

    gc.collect()
    gc.disable()
    try:
        run(main)
    finally:
        gc.enable()


def test_scope_that_is_dropped_after_its_loop_has_gone_disturbs_nobody(manager, caplog):
    kept = []
    run(lambda: leave_open(manager, kept))
    assert kept[0].sessions
    kept.clear()
    gc.collect()
    assert run(lambda: manager.get().scalar(ONE)) == 1
    assert not sessions._pinned


def test_context_that_lives_on_keeps_no_session_and_no_task(manager):
    seen = []

    async def use():
        session = manager.get()()
        seen.extend(map(weakref.ref, (asyncio.current_task(), session)))
        return contextvars.copy_context()

    async def main():
        context = await asyncio.create_task(use())
        await passes()
        assert [each() for each in seen] == [None, None] and context is not None

    run(main)
