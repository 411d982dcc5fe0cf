"""The AsyncSession of a scope: classes of the user's own, what their close() does, and the proxy."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, object_session

from dbsession import aio
from dbsession.aio import teardown
from dbsession.errors import ConfigError

BOUND_S = 60.0
ONE = text("SELECT 1")


class Base(DeclarativeBase):
    pass


class Item(Base):
    __tablename__ = "item"
    id: Mapped[int] = mapped_column(primary_key=True)


calls: list[str] = []


class OwnSync(Session):
    def hello(self):
        return "hello"


class NotedSync(Session):
    def close(self):
        calls.append("sync close")
        super().close()


class Expunging(Session):
    def expunge_all(self):
        calls.append("expunge_all")
        super().expunge_all()


class Own(AsyncSession):
    sync_session_class = OwnSync

    def hello_async(self):
        return "hello"


class Noted(AsyncSession):
    async def close(self):
        calls.append("close")
        await super().close()


CLASSES = {
    "own": {"class_": Own},
    "sync": {"class_": OwnSync},
    "both": {"class_": Noted, "sync_session_class": OwnSync},
    "noted": {"class_": Noted},
    "noted_sync": {"sync_session_class": NotedSync},
    "expunging": {"class_": Expunging},
    "resets": {"close_resets_only": True},
    "expiring": {"expire_on_commit": True, "autoflush": True, "info": {"x": 1}},
}


@pytest.fixture
def manager(tmp_path):
    calls.clear()
    url = f"sqlite:///{tmp_path}/a.db"
    return aio.SessionManager({"default": url, **{name: {"url": url, "session": own} for name, own in CLASSES.items()}})


def run(main):
    async def bounded():
        async with asyncio.timeout(BOUND_S):
            return await main()

    return asyncio.run(bounded())


async def create(manager):
    async with manager.engine().begin() as connection:
        await connection.run_sync(Base.metadata.create_all)


def in_use(manager):
    return sum(manager.engine(name).pool.checkedout() for name in ("default", *CLASSES))


def test_proxy_is_an_async_scoped_session_with_the_awaitables_that_users_know(manager):
    async def main():
        await create(manager)
        proxy = manager.get()
        assert isinstance(proxy, async_scoped_session)
        proxy.add(Item(id=1))
        await proxy.commit()
        assert (await proxy.get(Item, 1)).id == 1 and await proxy.scalar(ONE) == 1
        assert await proxy().run_sync(lambda session: session.get_bind()) is manager.engine().sync_engine
        async for row in await proxy.stream(ONE):
            assert row == (1,)
        async with proxy.begin_nested():
            await proxy.execute(ONE)
        await proxy.rollback()
        async with proxy.begin():
            proxy.add(Item(id=2))
        assert (await proxy.get_one(Item, 2)).id == 2
        await proxy.aclose()
        assert in_use(manager) == 0

    run(main)


def test_user_classes_are_mixed_in(manager):
    async def main():
        own, sync, both = (manager.get(name)() for name in ("own", "sync", "both"))
        assert isinstance(own, Own) and own.hello_async() == own.sync_session.hello() == "hello"
        assert isinstance(sync, AsyncSession) and sync.sync_session.hello() == "hello"
        assert isinstance(both, Noted) and isinstance(both.sync_session, OwnSync)
        for session in (own, sync, both):
            assert await session.scalar(ONE) == 1
            assert await session.run_sync(lambda each: each.scalar(ONE)) == 1
        await manager.clear()
        assert in_use(manager) == 0

    run(main)


def test_session_arguments_reach_the_session(manager):
    async def main():
        session, plain = manager.get("expiring")().sync_session, manager.get()().sync_session
        assert (session.expire_on_commit, session.autoflush, session.info) == (True, True, {"x": 1})
        assert (plain.expire_on_commit, plain.autoflush, plain.info) == (False, False, {})
        session.info["y"] = 2
        await manager.clear()
        assert manager.get("expiring")().info == {"x": 1}

    run(main)


@pytest.mark.parametrize("name", ["noted", "both", "noted_sync", "expunging"])
@pytest.mark.parametrize("end", ["clear", "close", "remove", "end of the task", "end of the scope"])
@pytest.mark.parametrize("used", [False, True])
def test_what_a_class_of_the_users_own_does_in_close_is_done_once(manager, name, end, used):
    async def use():
        session = manager.get(name)()
        if used:
            await session.execute(ONE)
        if end == "clear":
            await manager.clear()
        elif end == "close":
            await session.close()
        elif end == "remove":
            await manager.get(name).remove()
        return session

    async def main():
        manager.engine(name)
        calls.clear()  # the class has been tried
        if end == "end of the scope":
            async with manager.scope():
                session = await use()
        else:
            session = await asyncio.create_task(use())
        await asyncio.sleep(0)
        await teardown.settle(asyncio.get_running_loop())
        wanted = {"noted_sync": "sync close", "expunging": "expunge_all"}.get(name, "close")
        assert calls == [wanted] and in_use(manager) == 0
        with pytest.raises(InvalidRequestError, match="permanently closed"):
            await session.execute(ONE)

    run(main)


def test_session_whose_close_is_a_reset_stays_usable_and_is_still_the_scopes(manager):
    async def main():
        async with manager.scope() as unit:
            session = manager.get("resets")()
            for _ in range(3):
                assert await session.scalar(ONE) == 1
                await session.close()
                assert list(unit.sessions.values()) == [session] and in_use(manager) == 0
            await session.execute(ONE)
        assert in_use(manager) == 0

    run(main)


USES = {
    "execute": lambda session: session.execute(ONE),
    "stream": lambda session: session.stream(ONE),
    "begin": lambda session: session.begin().start(),
    "connection": lambda session: session.connection(),
    "get": lambda session: session.get(Item, 1),
    "flush": lambda session: _add(session),
}


async def _add(session):
    session.add(Item(id=1))


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("end", ["clear", "close", "aclose", "remove"])
def test_untouched_session_refuses_every_use_after_its_end(manager, use, end):
    async def main():
        session, proxy = manager.get()(), manager.get()
        await {"clear": manager.clear, "close": session.close, "aclose": session.aclose, "remove": proxy.remove}[end]()
        with pytest.raises(InvalidRequestError, match="permanently closed"):
            await USES[use](session)
        assert manager.get()() is not session and in_use(manager) == 0

    run(main)


def test_session_with_objects_and_no_transaction_lets_them_go(manager):
    async def main():
        await create(manager)
        session, item = manager.get()(), Item(id=1)
        session.add(item)
        await session.commit()
        assert not session.in_transaction() and object_session(item) is session.sync_session and item.id == 1
        await manager.clear()
        assert object_session(item) is None and item.id == 1

    run(main)


@pytest.mark.parametrize("way_out", ["rollback", "expunge", "a savepoint's rollback", "nothing"])
def test_new_object_that_was_never_flushed_is_let_go(manager, way_out):
    async def main():
        session, item = manager.get()(), Item(id=2)
        if way_out == "a savepoint's rollback":
            async with session.begin_nested() as savepoint:
                session.add(item)
                await savepoint.rollback()
        else:
            session.add(item)
            if way_out == "expunge":
                session.expunge(item)
            elif way_out == "rollback":
                await session.rollback()
        await manager.clear()
        assert object_session(item) is None and in_use(manager) == 0

    run(main)


def test_factory_gives_what_configure_and_its_callers_say(manager):
    async def main():
        info = {"x": 1}
        manager.get().configure(info=info, expire_on_commit=True)
        session = manager.get()()
        session.info["y"] = 2
        assert session.info == {"x": 1, "y": 2} and info == {"x": 1} and session.sync_session.expire_on_commit is True
        own = manager.get().session_factory(info={"z": 3}, expire_on_commit=False)
        assert own.info == {"x": 1, "z": 3} and own.sync_session.expire_on_commit is False
        assert await own.scalar(ONE) == 1
        await own.close()
        assert in_use(manager) == 0

    run(main)


def test_session_made_by_the_factory_ends_with_who_made_it(manager):
    async def main():
        async with manager.get().session_factory() as own:
            await own.execute(ONE)
            await manager.clear()
            assert in_use(manager) == 1 and manager.get()() is not own
        assert in_use(manager) == 0

    run(main)


@pytest.mark.parametrize(
    "arguments",
    [
        {"class_": int},
        {"class_": "AsyncSession"},
        {"class_": Session()},
        {"sync_session_class": int},
        {"sync_session_class": AsyncSession},
        {"class_": Own, "sync_session_class": "x"},
        {"no_such": 1},
    ],
    ids=", ".join,  # of the keys: an id is the same in every process of a run
)
def test_session_class_that_is_none_is_refused(arguments):
    with pytest.raises(ConfigError, match=r"^Database 'a': .*\[DBS-CONFIG\]$"):
        aio.SessionManager({"a": {"url": "sqlite:///unused.db", "session": arguments}})


def test_listeners_of_the_users_stay_on_their_own_class(tmp_path):
    """Ours are set on a class of each database, and the user's class is as it was."""

    class Mine(Session):
        pass

    before = dict(vars(Mine))
    entry = {"url": f"sqlite:///{tmp_path}/a.db", "session": {"sync_session_class": Mine}}
    manager = aio.SessionManager({"a": entry, "b": entry})

    async def main():
        assert type(manager.get("a")().sync_session) is not type(manager.get("b")().sync_session)
        assert not list(Session().dispatch.after_begin) and not list(Mine().dispatch.after_begin)

    run(main)
    assert set(vars(Mine)) == set(before)


def test_release_refuses_a_write_that_a_listener_of_the_users_executes(manager):
    """A `do_execute` listener that returns True stands in for the dialect, whose methods then see nothing."""

    async def main():
        await create(manager)

        def execute(cursor, statement, parameters, context):
            cursor.execute(statement)
            return True

        event.listen(manager.engine().sync_engine, "do_execute", execute)
        await manager.get().execute(text("INSERT INTO item VALUES (1)"))
        with pytest.raises(aio.UnsavedWork):
            await manager.release()

    run(main)
