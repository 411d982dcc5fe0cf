"""What is called in one task and awaited in another: by shield(), create_task(), gather(), a TaskGroup, wait_for()."""

from __future__ import annotations

import asyncio
import gc
import inspect
import warnings

import pytest
from sqlalchemy import event, exc, select, text
from sqlalchemy.ext.asyncio import async_scoped_session
from sqlalchemy.util import await_

from dbsession import aio
from support.loops import in_loop
from support.models import Base, Line, Order

run = in_loop("asyncio")


@pytest.fixture(params=["aiosqlite", "asyncmy", pytest.param("aiomysql", marks=pytest.mark.slow)])
def url(request):
    if request.param == "aiosqlite":
        return f"sqlite+aiosqlite:///{request.getfixturevalue('tmp_path')}/a.db"
    return request.getfixturevalue("mariadb_url").replace("pymysql", request.param)


@pytest.fixture
def managed(url):
    """Runs an async function with a manager whose database has the tables of support.models, empty."""

    def in_a_loop(work):
        async def within():
            manager = aio.SessionManager({"default": {"url": url, "options": {"pool_size": 2, "pool_timeout": 5}}})
            async with manager.running():
                async with manager.engine().begin() as connection:
                    await connection.run_sync(Base.metadata.create_all)
                await work(manager, manager.get())

        run(within)

    return in_a_loop


async def in_group(awaitable):
    async with asyncio.TaskGroup() as group:
        return await group.create_task(awaitable)


async def gathered(awaitable):
    (found,) = await asyncio.gather(awaitable)
    return found


async def waited(awaitable):
    return await asyncio.wait_for(awaitable, 30)


async def run_soon(awaitable):
    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(awaitable, asyncio.get_running_loop()))


WAYS = {"shield": asyncio.shield, "create_task": asyncio.create_task, "gather": gathered, "group": in_group}
WAYS |= {"wait_for": waited, "run_coroutine_threadsafe": run_soon}


@pytest.fixture(params=list(WAYS))
def elsewhere(request):
    """Awaits something in a task of its own, and returns what it gave."""
    return WAYS[request.param]


def test_f25_method_uses_the_session_of_the_task_that_calls_it(managed, elsewhere):
    """Each method that is awaited, one way of awaiting at a time: on one session, whose work is stored at its end."""

    async def work(manager, session):
        async with manager.scope():
            mine = session()
            session.add(Order(id=1))
            await elsewhere(session.flush())
            one = await elsewhere(session.get(Order, 1))
            assert one in mine and one is await elsewhere(session.get_one(Order, 1))
            assert await elsewhere(session.merge(Order(id=1))) is one
            assert await elsewhere(session.merge_all([Order(id=1)])) == [one]
            assert await elsewhere(session.scalar(select(Order))) is one
            assert (await elsewhere(session.scalars(select(Order)))).all() == [one]
            assert (await elsewhere(session.execute(select(Order)))).all() == [(one,)]
            assert [each async for each in await elsewhere(session.stream_scalars(select(Order)))] == [one]
            assert [row async for row in await elsewhere(session.stream(select(Order)))] == [(one,)]
            await elsewhere(session.refresh(one))
            connection = await elsewhere(session.connection())
            assert connection.sync_connection in mine.sync_session._open_connections
            await elsewhere(session.commit())
            assert not mine.in_transaction()

            await elsewhere(session.delete(one))
            await elsewhere(session.flush())
            await elsewhere(session.rollback())
            async with session.begin():
                session.add(Line(id=1, order_id=1))
            async with session.begin(), session.begin_nested():
                await elsewhere(session.delete_all(list(await elsewhere(session.scalars(select(Line))))))
            session.add(Line(id=2, order_id=1))
            await elsewhere(session.flush())
            await elsewhere(manager.clear())
            assert session() is not mine
            another = session()
            await elsewhere(session.execute(text("SELECT 1")))
            await elsewhere(manager.release())
            assert session() is another and not another.in_transaction()
            for end in (session.reset, session.close, session.aclose, session.invalidate, session.remove):
                ended = session()
                await elsewhere(end())
                assert (session() is not ended) == (end != session.reset) or ended.sync_session._close_state.value == 3
        async with manager.scope():
            assert (await session.scalars(select(Order.id))).all() == [1]
            assert (await session.scalars(select(Line.id))).all() == []

    managed(work)


def test_f25_every_method_that_is_awaited_is_looked_up_at_the_call(managed):
    """Those that a later SQLAlchemy adds, too: no method of the proxy is a coroutine that has yet to find its session.
    To frameworks, which run a plain function in a thread, all of them are coroutine functions still."""

    async def work(manager, session):
        stock = {name for name, each in vars(async_scoped_session).items() if inspect.iscoroutinefunction(each)}
        assert {"commit", "execute", "scalar", "remove", "stream"} <= stock
        for name in sorted(stock):
            assert inspect.iscoroutinefunction(getattr(session, name)), name
            assert getattr(type(session), name) is not getattr(async_scoped_session, name), name
            with pytest.raises(aio.ScopeRequired):
                await asyncio.to_thread(getattr(session, name))
        for verb in (manager.clear, manager.release, aio.clear_dbsession, aio.release_dbsession):
            assert inspect.iscoroutinefunction(verb), verb
            with pytest.raises(aio.ScopeRequired):
                await asyncio.to_thread(verb)

    managed(work)


def test_f25_method_that_nobody_awaits_leaves_nothing_behind(managed):
    """But Python's own warning; the scope's end closes the session, and what was not called did not happen."""

    async def work(manager, session):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            async with manager.scope() as scope:
                mine = session()
                await session.execute(text("SELECT 1"))
                for forgotten in (session.commit, session.remove, manager.clear, manager.release):
                    forgotten()
                gc.collect()
                assert session() is mine and mine.in_transaction() and list(scope.sessions.values()) == [mine]
        assert len(caught) == 4 and all("was never awaited" in str(each.message) for each in caught)
        assert not scope.sessions and manager.engine().pool.checkedout() == 0

    managed(work)


def test_f25_two_methods_at_once_on_one_session_are_refused(managed):
    """One of them says so; nothing of the other task's is mixed up, and the scope ends without a connection less."""

    async def work(manager, session):
        async with manager.scope():
            texts = ["one", "two", "three", "four"]
            asked = [session.scalar(text(f"SELECT '{each}'")) for each in texts]
            found = await asyncio.gather(*asked, return_exceptions=True)
            loud = [each for each in found if isinstance(each, exc.InvalidRequestError)]
            assert len(loud) == 3 and all(each in (own, *loud) for own, each in zip(texts, found, strict=True))
        async with manager.scope():
            assert await session.scalar(text("SELECT 'five'")) == "five"
        assert manager.engine().pool.checkedout() == 0

    managed(work)


ENDS = {"clear": lambda manager: manager.clear(), "remove": lambda manager: manager.get().remove()}


@pytest.mark.parametrize("end", ["cancelled", "cancelled again", "returns", *ENDS])
def test_f25_shielded_commit_is_finished_when_its_scope_ends_meanwhile(managed, caplog, end):
    """The end waits for it, or, where that is cancelled too, leaves the rest to a task of ours. Nothing is said."""

    async def work(manager, session):
        begun, go_on = asyncio.Event(), asyncio.Event()

        def slow(_):
            begun.set()
            await_(go_on.wait())

        async def request():
            async with manager.scope():
                session.add(Order(id=1))
                await session.flush()
                event.listen(session().sync_session, "before_commit", slow)
                commit = asyncio.shield(session.commit())
                if end.startswith("cancelled"):
                    await commit
                await begun.wait()
                if end in ENDS:
                    await ENDS[end](manager)

        task = asyncio.create_task(request())
        await begun.wait()
        for _ in range(2 if end == "cancelled again" else 1):
            if end.startswith("cancelled"):
                task.cancel()
            await asyncio.sleep(0.02)
        assert task.done() == (end == "cancelled again")
        go_on.set()
        await asyncio.wait([task])
        async with asyncio.timeout(20):
            while manager.engine().pool.checkedout():
                await asyncio.sleep(0.001)
        assert task.cancelled() == end.startswith("cancelled")
        async with manager.scope():
            assert (await session.scalars(select(Order.id))).all() == [1]

    managed(work)
    assert not caplog.records


def test_f25_holder_is_the_scopes_task_when_a_child_ran_the_method_for_it(managed):
    """In the texts of PoolTimeout and of the leak watch: the child has ended, and the connection is the scope's."""

    async def work(manager, session):
        async with manager.scope("a job"):
            await asyncio.create_task(session.execute(text("SELECT 1")), name="child")
            asyncio.current_task().set_name("parent")
            (holder,) = manager.database("default").held.holders()
            assert holder.scope == "a job" and "parent" in holder.greenlet
            assert any("test_aio_tasks.py" in each for each in holder.stack)

    managed(work)
