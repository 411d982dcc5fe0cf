"""Where an asyncio engine comes from (the twins, the process-wide configuration), and which loop it belongs to."""

from __future__ import annotations

import asyncio
import logging
import threading

import pytest
from sqlalchemy import URL, event, text
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.postgresql.psycopg2 import PGDialect_psycopg2
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import AsyncAdaptedQueuePool, NullPool, QueuePool, StaticPool

import dbsession
from dbsession import aio
from dbsession.aio import engine as databases
from dbsession.aio import teardown
from dbsession.aio.drivers import twin
from dbsession.aio.loop_local import shutdown
from dbsession.aio.pool import FairPool
from dbsession.core import engine as created
from dbsession.core import sources
from dbsession.core.entries import parse
from dbsession.errors import ConfigError, ExitUnfinished, LoopRequired, UnknownDatabase
from dbsession.green import api
from support.aio_cancel import stepped
from support.processes import run_python
from support.waiting import wait_until

BOUND_S = 60.0
ONE = text("SELECT 1")
SECRET = "s3cret"


def run(main):
    async def bounded():
        async with asyncio.timeout(BOUND_S):
            return await main()

    return asyncio.run(bounded())


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path}/a.db"


@pytest.fixture
def process(monkeypatch):
    """A process that nobody has configured."""
    for module in (api, aio):
        monkeypatch.setattr(module, "manager", type(module.manager)())
    monkeypatch.setattr(sources, "process_wide", sources.EnvironmentSource())
    yield
    api.manager.dispose()


# --- twins


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("mysql+pymysql://u@h/db", "mysql+asyncmy"),
        ("mysql+mysqldb://u@h/db", "mysql+asyncmy"),
        ("mysql://u@h/db", "mysql+asyncmy"),
        ("mariadb+pymysql://u@h/db", "mariadb+asyncmy"),
        ("mariadb://u@h/db", "mariadb+asyncmy"),
        ("sqlite:///a.db", "sqlite+aiosqlite"),
        ("sqlite+pysqlite:///a.db", "sqlite+aiosqlite"),
        ("postgresql+psycopg2://u@h/db", "postgresql+asyncpg"),
        ("postgresql+psycopg://u@h/db", "postgresql+psycopg"),
        ("mysql+asyncmy://u@h/db", "mysql+asyncmy"),
        ("mysql+aiomysql://u@h/db", "mysql+aiomysql"),
        ("mariadb+aiomysql://u@h/db", "mariadb+aiomysql"),
        ("sqlite+aiosqlite:///a.db", "sqlite+aiosqlite"),
        ("postgresql+asyncpg://u@h/db", "postgresql+asyncpg"),
    ],
)
def test_driver_is_replaced_by_its_asyncio_twin_and_nothing_else_is(given, wanted):
    given = given.replace("//u@h", f"//u:{SECRET}@h:33") + "?charset=latin1" * given.startswith("my")
    before = parse("a", {"url": given, "options": {"pool_size": 3}, "leak_after_s": 5})
    after = twin(before)
    assert after.url == before.url.set(drivername=wanted)
    assert after.url.drivername == wanted and after.url.password == before.url.password
    assert (after.name, after.options, after.leak_after_s) == ("a", {"pool_size": 3}, 5)


def test_dialect_like_postgresqls_without_an_asyncio_driver_is_refused_as_such(monkeypatch):
    monkeypatch.setitem(registry.impls, "likepg.psycopg2", lambda: PGDialect_psycopg2)
    with pytest.raises(ConfigError, match=r"'likepg\+psycopg2' is not for asyncio"):
        databases.check(twin(parse("a", "likepg+psycopg2://u@h/db")))


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"url": f"mysql+pymysql://u:{SECRET}@h/db", "reset": "connection"}, "`reset` is 'connection'"),
        ({"url": "sqlite:///a.db", "options": {"creator": lambda: None}}, "`creator`"),
        (f"msyql://u:{SECRET}@h/db", "'msyql'"),
        (f"msyql+asyncmy://u:{SECRET}@h/db", "'msyql+asyncmy'"),
        (f"mysql+pymsql://u:{SECRET}@h/db", "'mysql+pymsql'"),
        (f"postgresql+pg8000://u:{SECRET}@h/db", "not for asyncio"),
        (f"oracle+oracledb://u:{SECRET}@h/db", "not installed"),
        (f"oracle+cx_oracle://u:{SECRET}@h/db", "not for asyncio"),
        ({"url": "sqlite:///a.db", "options": {"pool_sise": SECRET}}, "`pool_sise`"),
        ({"url": "sqlite:///a.db", "options": {"poolclass": QueuePool}}, "poolclass"),
        ({"url": "sqlite:///a.db", "options": {"poolclass": NullPool, "max_overflow": 1}}, "`max_overflow`"),
        ({"url": "sqlite:///a.db", "options": {"poolclass": "NullPool"}}, "`poolclass`"),
        ({"url": "sqlite:///a.db", "options": {"connect_args": [SECRET]}}, "`connect_args`"),
        ("sqlite+aiosqlite://", "in-memory"),
        ("sqlite+aiosqlite:///:memory:", "in-memory"),
    ],
    ids=lambda each: None if isinstance(each, str) else "",
)
def test_entry_that_asyncio_cannot_use_is_refused_by_configure(entry, said):
    with pytest.raises(ConfigError, match=r"^Database 'orders'.*\[DBS-CONFIG\]$") as caught:
        aio.SessionManager({"orders": entry})
    shown = "".join(map(str, (caught.value, caught.value.__cause__)))
    assert said in shown and SECRET not in shown


def test_url_object_and_mapping_are_taken(tmp_path, url):
    manager = aio.SessionManager(
        {"a": url, "b": URL.create("sqlite", database=f"{tmp_path}/b.db"), "c": {"url": url}, "d": {"url": "sqlite+aiosqlite:///x"}}
    )  # fmt: skip

    async def main():
        found = [manager.engine(name).url for name in "abcd"]
        assert [each.drivername for each in found] == ["sqlite+aiosqlite"] * 4
        assert [each.database for each in found[:3]] == [f"{tmp_path}/{name}.db" for name in "aba"]

    run(main)


def test_engine_defaults_may_each_be_overridden():
    manager = aio.SessionManager(
        {
            "plain": "mysql+pymysql://u:p@h/db",
            "own": {"url": "mysql+asyncmy://u:p@h/db", "options": {"pool_size": 3, "max_overflow": 2}},
            "null": {"url": "mysql+aiomysql://u:p@h/db", "options": {"poolclass": NullPool}},
            "stock": {"url": "mysql+asyncmy://u:p@h/db", "options": {"poolclass": AsyncAdaptedQueuePool}},
        }
    )

    async def main():
        plain, own = manager.engine("plain").pool, manager.engine("own").pool
        assert isinstance(manager.engine("plain"), AsyncEngine)
        assert type(plain) is FairPool and (plain.size(), plain._max_overflow, plain._recycle) == (20, 0, 3600)
        assert plain.held.name == "plain"
        assert type(own) is FairPool and (own.size(), own._max_overflow) == (3, 2)
        assert type(manager.engine("null").pool) is NullPool
        assert type(manager.engine("stock").pool) is AsyncAdaptedQueuePool and manager.engine("stock").pool.size() == 20

    run(main)


def test_readonly_database_refuses_a_write(url):
    writer, reader = aio.SessionManager({"a": url}), aio.SessionManager({"a": {"url": url, "readonly": True}})

    async def main():
        await writer.get("a").execute(text("CREATE TABLE t (n INT)"))
        await writer.get("a").commit()
        with pytest.raises(Exception, match="readonly"):
            await reader.get("a").execute(text("INSERT INTO t VALUES (1)"))
        await reader.get("a").rollback()
        assert (await reader.get("a").execute(text("SELECT * FROM t"))).all() == []

    run(main)


def test_memory_sqlite_with_a_poolclass_is_one_database_for_all_tasks():
    manager = aio.SessionManager({"a": {"url": "sqlite://", "options": {"poolclass": StaticPool}}})

    async def main():
        async with manager.scope():
            await manager.get("a").execute(text("CREATE TABLE t (n INT)"))
            await manager.get("a").commit()
        assert (await manager.get("a").execute(text("SELECT * FROM t"))).all() == []

    run(main)


def test_nothing_printable_shows_a_password(caplog):
    caplog.set_level(logging.DEBUG)
    entry = {
        "url": f"mysql+pymysql://u:{SECRET}@h/db?k={SECRET}",
        "options": {"connect_args": {"password": SECRET}},
    }
    manager = aio.SessionManager({"a": entry})

    async def main():
        manager.get("a")()
        return [
            repr(each)
            for each in (manager, manager.get("a"), manager.database("a"), manager.present(), twin(parse("a", entry)))
        ]

    assert not any(SECRET in shown for shown in [*run(main), *caplog.messages])


# --- the configuration of the process


def test_process_wide_configuration_is_used_with_twins_and_followed(process, tmp_path, url):
    proxy = aio.get_dbsession()

    async def main():
        with pytest.raises(UnknownDatabase, match="DBSESSION_URL is not set"):
            proxy()
        dbsession.configure({"default": url, "other": url})
        assert aio.get_dbsession() is proxy
        before = proxy()
        assert aio.get_engine().url == parse("a", url).url.set(drivername="sqlite+aiosqlite")
        assert dbsession.get_engine().url.drivername == "sqlite"
        dbsession.configure({"default": f"sqlite:///{tmp_path}/new.db"})
        assert proxy() is not before and proxy().get_bind().url.database == f"{tmp_path}/new.db"
        with pytest.raises(InvalidRequestError):
            await before.execute(ONE)
        with pytest.raises(UnknownDatabase, match="'other'"):
            aio.get_engine("other")
        assert await proxy.scalar(ONE) == 1

    run(main)


def test_configuration_of_its_own_goes_before_the_process_wide_one(process, tmp_path, url):
    async def main():
        dbsession.configure({"default": url})
        assert aio.get_engine().url.database == f"{tmp_path}/a.db"
        aio.configure({"default": f"sqlite:///{tmp_path}/mine.db"})
        assert aio.get_engine().url.database == f"{tmp_path}/mine.db"
        dbsession.configure({"default": f"sqlite:///{tmp_path}/again.db"})
        assert aio.get_engine().url.database == f"{tmp_path}/mine.db"

    run(main)


def test_process_wide_entry_without_a_twin_is_refused_at_its_first_use_only(process, url):
    dbsession.configure({"default": url, "old": {"url": "mysql+pymysql://u@h/db", "reset": "connection"}})

    async def main():
        assert await aio.get_dbsession().scalar(ONE) == 1
        with pytest.raises(ConfigError, match=r"^Database 'old'.*`reset`"):
            aio.get_engine("old")

    run(main)


def test_environment_is_read_with_twins(process, monkeypatch, url):
    monkeypatch.setenv("DBSESSION_URL", url)

    async def main():
        assert aio.get_engine().url.drivername == "sqlite+aiosqlite"
        assert await aio.get_dbsession().scalar(ONE) == 1

    run(main)


def test_names_are_loaded_at_their_first_use_and_asyncio_without_gevent(url):
    run_python(
        """
        import sys
        import dbsession.aio
        assert "gevent" not in sys.modules and "aiosqlite" not in sys.modules
        import asyncio
        from sqlalchemy import text
        from dbsession import aio
        aio.configure({"default": sys.argv[1]})
        async def main():
            async with aio.session_scope():
                return await aio.get_dbsession().scalar(text("SELECT 1"))
        assert asyncio.run(main()) == 1
        from dbsession import ConfigError, UnknownDatabase
        assert ConfigError is aio.ConfigError
        assert "gevent" not in sys.modules
        assert set(dbsession.__all__) <= set(dir(dbsession))
        dbsession.configure({"default": sys.argv[1]})
        assert "gevent" in sys.modules
        for name in dbsession.__all__:
            assert getattr(dbsession, name) is vars(dbsession)[name], name
        try:
            dbsession.no_such_name
        except AttributeError as error:
            assert "no_such_name" in str(error)
        else:
            raise AssertionError
        """,
        url,
    )


# --- loops


def test_engine_is_one_per_loop_and_name(url):
    manager = aio.SessionManager({"a": url, "b": url})

    async def ask():
        return manager.engine("a")

    async def main():
        mine = manager.engine("a")
        assert mine is manager.engine("a") is not manager.engine("b")
        assert all(each is mine for each in await asyncio.gather(*[ask() for _ in range(5)]))
        return mine

    first, second = run(main), run(main)
    assert first is not second


def test_engine_without_a_running_loop_is_refused(url):
    manager = aio.SessionManager({"a": url})
    with pytest.raises(LoopRequired, match=r"\[DBS-LOOP\]$"):
        manager.engine("a")
    with pytest.raises(LoopRequired):
        manager.dispose().send(None)


def test_two_loops_in_two_threads_at_once_have_engines_and_sessions_of_their_own(url):
    """Both use one proxy, whose shortcut knows one loop's database at a time."""
    manager, proxy = aio.SessionManager({"a": url}), None
    proxy = manager.get("a")
    barrier, found = threading.Barrier(2, timeout=BOUND_S), []

    async def main():
        seen = set()
        for turn in range(200):
            if turn % 20 == 0:
                await asyncio.to_thread(barrier.wait)
            async with manager.scope():
                session = proxy()
                for _ in range(5):
                    assert proxy() is session and session.bind is manager.engine("a")
                assert await proxy.scalar(ONE) == 1
                seen.add(session.bind)
        assert len(seen) == 1 and manager.engine("a").pool.checkedout() == 0
        found.append(seen.pop())

    threads = [threading.Thread(target=run, args=(main,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(BOUND_S)
    assert len(found) == 2 and found[0] is not found[1]


def test_configure_in_another_thread_is_followed_by_every_loop(tmp_path, url):
    manager = aio.SessionManager({"a": url})
    proxy, ready, go = manager.get("a"), threading.Barrier(2), threading.Event()

    async def main():
        async with manager.scope():
            before = proxy()
            ready.wait(BOUND_S)
            await asyncio.to_thread(go.wait, BOUND_S)
            assert proxy() is not before and proxy().get_bind().url.database == f"{tmp_path}/new.db"

    failed = []

    def in_thread():
        try:
            run(main)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=in_thread)
    thread.start()
    ready.wait(BOUND_S)
    manager.configure({"a": f"sqlite:///{tmp_path}/new.db"})
    go.set()
    thread.join(BOUND_S)
    assert not failed and not thread.is_alive()


def test_configure_while_a_session_is_opened_does_not_leave_a_stale_shortcut(tmp_path, url, monkeypatch):
    """In another thread, between the look-up of the database and the note of it."""
    manager = aio.SessionManager({"a": url})
    new = {"a": f"sqlite:///{tmp_path}/new.db"}
    lookup = manager.database

    def database(name):
        found = lookup(name)
        monkeypatch.undo()
        thread = threading.Thread(target=manager.configure, args=(new,))
        thread.start()
        thread.join(BOUND_S)
        return found

    monkeypatch.setattr(manager, "database", database)

    async def main():
        proxy = manager.get("a")
        assert proxy().get_bind().url.database == f"{tmp_path}/a.db"
        assert proxy().get_bind().url.database == f"{tmp_path}/new.db"

    run(main)


@pytest.mark.parametrize("poolclass", [FairPool, AsyncAdaptedQueuePool])
def test_configure_again_closes_what_is_idle_and_what_is_in_use_on_its_return(tmp_path, url, poolclass):
    manager = aio.SessionManager({"a": {"url": url, "options": {"poolclass": poolclass}}})
    closed = []

    async def main():
        proxy, old, pool = manager.get("a"), manager.engine("a"), manager.engine("a").pool
        event.listen(old.sync_engine, "close", lambda *_: closed.append(1))
        kept = await old.connect()  # of somebody who holds a connection for longer
        async with manager.scope():
            await proxy.execute(ONE)
        await proxy.begin()  # else configure() would end what has only read
        await proxy.execute(ONE)
        assert (pool.checkedout(), pool.checkedin()) == (2, 0)
        async with manager.scope():
            await proxy.execute(ONE)
        assert (pool.checkedout(), pool.checkedin()) == (2, 1)
        manager.configure({"a": f"sqlite:///{tmp_path}/new.db"})
        manager.configure({"a": f"sqlite:///{tmp_path}/newer.db"})
        assert manager.engine("a").url.database == f"{tmp_path}/newer.db"
        assert await proxy.scalar(ONE) == 1 and proxy().bind is old
        await asyncio.sleep(0)
        await teardown.settle(asyncio.get_running_loop())
        assert len(closed) == 1
        await proxy.commit()
        assert len(closed) == 2
        await kept.close()
        assert len(closed) == 3
        assert proxy().bind is manager.engine("a") and await proxy.scalar(ONE) == 1

    threads = set(threading.enumerate())
    run(main)
    wait_until(lambda: set(threading.enumerate()) <= threads)


@pytest.mark.parametrize("poolclass", [FairPool, AsyncAdaptedQueuePool])
def test_connection_of_a_retired_engine_gives_its_place_back_when_its_close_is_cancelled(tmp_path, url, poolclass):
    options = {"poolclass": poolclass, "pool_size": 1}
    manager = aio.SessionManager({"a": {"url": url, "options": options}})

    async def cancelled_at(step):
        """Whether the close came that far."""
        old = manager.engine("a")
        (database,) = (each for each in created.all_databases() if each.engine is old)
        connection = await old.connect()
        manager.configure({"a": {"url": url, "options": options}})
        assert manager.engine("a") is not old and len(database.held.notes()) == 1
        await teardown.settle(asyncio.get_running_loop())
        again = await old.connect()  # of somebody who finishes there, in the pool that took the other's place
        steps = 0

        def at(_):
            nonlocal steps
            steps += 1
            if steps == step:
                victim.cancel()

        async def close():
            await stepped(again.close(), at)

        victim = asyncio.create_task(close())
        await asyncio.wait([victim])
        assert victim.cancelled() is (steps >= step)
        assert old.pool.checkedout() == 0 and len(database.held.notes()) == 1
        await connection.close()
        assert database.held.notes() == []
        async with old.connect() as last:
            await last.execute(ONE)
        return steps >= step

    async def main():
        step = 1
        while await cancelled_at(step):
            step += 1
        assert step > 1

    run(main)


def test_engine_that_a_told_function_asks_for_is_the_one_that_is_built(url, monkeypatch):
    monkeypatch.setattr(created, "listeners", [])
    manager, told = aio.SessionManager({"a": url}), []

    @aio.on_engine_created
    def tell(name, engine):
        if engine.url.database == parse("a", url).url.database:
            told.append((engine, manager.engine("a").sync_engine))

    async def main():
        assert told == [] and manager.engine("a")
        assert told == [(manager.engine("a").sync_engine,) * 2]

    run(main)


def test_running_closes_the_tasks_sessions_and_the_connections(url):
    manager = aio.SessionManager({"a": url})

    async def main():
        async with manager.running():
            await manager.get("a").execute(ONE)
            pool = manager.engine("a").pool
        assert (pool.checkedout(), pool.checkedin()) == (0, 0)
        with pytest.raises(ZeroDivisionError):
            async with manager.running():
                await manager.get("a").execute(ONE)
                raise ZeroDivisionError
        assert manager.engine("a").pool.checkedout() == 0

    run(main)


def test_manager_that_nobody_refers_to_goes_with_its_loops(url):
    import gc
    import weakref

    async def main():
        manager = aio.SessionManager({"a": url})
        assert await manager.get("a").scalar(ONE) == 1
        return weakref.ref(manager)

    reference = run(main)
    gc.collect()
    assert reference() is None
    assert all(each.retired or each.inherited or each.owner is not None for each in created.all_databases())


def test_loop_is_not_kept_alive_by_a_proxy_that_was_used_in_it(url):
    import gc
    import weakref

    manager = aio.SessionManager({"a": url})

    async def main():
        assert await manager.get("a").scalar(ONE) == 1
        return weakref.ref(asyncio.get_running_loop())

    loop = run(main)
    gc.collect()
    assert loop() is None


def test_connections_that_an_older_exit_opens_are_closed_before_the_loop_ends(mariadb, mariadb_url):
    manager = aio.SessionManager({"a": mariadb_url})
    seen = []

    async def use():
        seen.append(await manager.get("a").scalar(text("SELECT CONNECTION_ID()")))

    async def main():
        aio.loop_local.at_close(use)  # before the first use of the database: it runs when that is closed already
        await use()

    run(main)
    first, second = seen
    assert first != second
    wait_until(lambda: not {first, second} & {row["id"] for row in mariadb.processlist()}, what="no connection is left")


def test_connections_are_closed_when_another_engine_does_not_close_in_time(url, mariadb, mariadb_url, monkeypatch):
    manager = aio.SessionManager({"hangs": url, "later": mariadb_url})
    monkeypatch.setattr(shutdown, "EXIT_TIMEOUT_S", 0.05)
    pools = []

    async def main():
        asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context["exception"]))
        for name in "hangs", "later":
            async with manager.engine(name).connect() as connection:
                await connection.execute(ONE)
            pools.append(manager.engine(name).pool)  # kept, or a collection would close what is in it

    async def hang(_):
        await asyncio.Event().wait()

    monkeypatch.setattr(databases.LoopDatabase, "close", hang)  # of the first one; the others' turn never comes

    reported = []
    run(main)
    (group,) = reported
    assert [type(each) for each in group.exceptions] == [ExitUnfinished]
    assert [pool.checkedin() for pool in pools] == [1, 1]
    wait_until(lambda: not mariadb.processlist(), what="no connection is left")


# --- fork

FORK = """
    import asyncio, gc, os, sys, traceback
    from sqlalchemy import text
    from dbsession import aio
    manager = aio.SessionManager({"a": sys.argv[1]})
    proxy = manager.get("a")

    async def use():
        assert aio.scope.current() is None
        assert (await proxy.scalars(text("SELECT n FROM t"))).all() == [1]
        await asyncio.sleep(0)
        return proxy()

    async def own():
        sessions = await asyncio.gather(*[use() for _ in range(5)])
        async with manager.scope():
            sessions.append(proxy())
        assert len(set(map(id, sessions))) == 6
        return sessions

    def child(inherited):
        for verb in (proxy, proxy.registry.has, manager.scope().__aenter__().__await__().__next__,
                     manager.release, manager.clear):
            try:
                verb()
            except aio.ScopeRequired:
                continue
            raise AssertionError(verb)
        assert inherited not in asyncio.run(own())
        gc.collect()

    async def main():
        await proxy.execute(text("CREATE TABLE t (n INT)"))
        await proxy.execute(text("INSERT INTO t VALUES (1)"))
        await proxy.commit()
        async with manager.scope("the parent's") as unit:
            await proxy.execute(text("INSERT INTO t VALUES (2)"))
            session = proxy()
            pid = os.fork()
            if not pid:
                try:
                    child(session)
                    await unit.end()
                    del unit
                    gc.collect()
                    os._exit(0)
                except BaseException:
                    traceback.print_exc()
                os._exit(1)
            assert os.waitpid(pid, 0)[1] == 0
            assert proxy() is session
            await proxy.execute(text("INSERT INTO t VALUES (3)"))
            await proxy.commit()
        assert (await proxy.scalars(text("SELECT n FROM t"))).all() == [1, 2, 3]

    asyncio.run(main())
"""


def test_child_of_a_running_loop_uses_nothing_of_its_parents(url):
    """It may run a loop of its own, end the parent's block and drop its scopes, while the parent's transaction goes
    on."""
    run_python(FORK, url)


def test_child_of_a_running_loop_sends_nothing_on_its_parents_connections(mariadb_url):
    run_python(FORK, mariadb_url)


def test_task_that_is_resumed_in_a_child_opens_a_session_of_its_own(url):
    """A loop that stood still at the fork: its tasks and their scopes are the child's as much as the parent's."""
    run_python(
        """
        import asyncio, os, sys, traceback
        from sqlalchemy import text
        from dbsession import aio
        manager = aio.SessionManager({"a": sys.argv[1]})
        proxy = manager.get("a")

        async def work(ready, go):
            await proxy.execute(text("SELECT 1"))
            before = proxy()
            ready.set()
            await go.wait()
            assert await proxy.scalar(text("SELECT 2")) == 2
            return proxy() is before

        loop, ready, go = asyncio.new_event_loop(), asyncio.Event(), asyncio.Event()
        task = loop.create_task(work(ready, go))
        loop.run_until_complete(ready.wait())
        go.set()
        pid = os.fork()
        if not pid:
            try:
                same = loop.run_until_complete(asyncio.wait_for(task, 10))
                loop.run_until_complete(aio.loop_local.aclose())
                os._exit(same)
            except BaseException:
                traceback.print_exc()
            os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert loop.run_until_complete(task)
        loop.close()
        """,
        url,
    )


def test_new_file_is_opened_by_two_loops_at_once(tmp_path):
    """Of two that change a file to WAL at once SQLite refuses one, whatever its busy timeout is."""
    barrier, found = threading.Barrier(2, timeout=BOUND_S), []

    async def main(turn):
        manager = aio.SessionManager({"a": f"sqlite:///{tmp_path}/{turn}.db"})
        manager.engine("a")
        await asyncio.to_thread(barrier.wait)
        found.append(await manager.get("a").scalar(ONE))

    def loops():
        for turn in range(60):
            asyncio.run(main(turn))

    threads = [threading.Thread(target=loops) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(BOUND_S)
    assert found == [1] * 120
