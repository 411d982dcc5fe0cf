"""The verbs: get, clear, scope, release, engine, configure, dispose."""

from __future__ import annotations

import gevent
import gevent.event
import pytest
from sqlalchemy import String, text
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, scoped_session

import dbsession
from dbsession import SessionManager, UnknownDatabase, UnsavedWork
from support.processes import run_python


class Base(DeclarativeBase):
    pass


class Item(Base):
    __tablename__ = "item"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(20))


@pytest.fixture
def manager(tmp_path):
    manager = SessionManager({name: f"sqlite:///{tmp_path}/{name}.db" for name in ("default", "other")})
    Base.metadata.create_all(manager.engine())
    with manager.scope():
        manager.get().add_all([Item(id=1, name="one"), Item(id=2, name="two")])
        manager.get().commit()
    yield manager
    manager.clear()
    manager.dispose()


def in_use(manager, name="default"):
    return manager.engine(name).pool.checkedout()


def test_proxy_is_one_scoped_session_per_name_bound_to_its_engine(manager):
    proxy = manager.get()
    assert isinstance(proxy, scoped_session) and manager.get() is proxy is manager.get("default")
    assert manager.get("other") is not proxy
    for name in ("default", "other"):
        assert manager.get(name)().get_bind() is manager.engine(name) is manager.engine(name)


def test_proxy_works_as_users_of_scoped_session_know_it(manager):
    proxy = manager.get()
    assert proxy.registry.has() is False
    session = proxy(expire_on_commit=False)
    assert session.expire_on_commit is False and proxy() is session and proxy.registry() is session
    assert proxy.registry.has() is True
    with pytest.raises(InvalidRequestError, match="already present"):
        proxy(expire_on_commit=True)
    item = proxy.get(Item, 1)
    assert item in proxy and proxy.dirty == proxy.new == proxy.session_factory().new
    assert [found.name for found in proxy.query(Item).order_by(Item.id)] == ["one", "two"]
    proxy.remove()
    assert proxy.registry.has() is False and proxy() is not session
    proxy.registry.clear()
    proxy.remove()
    replacement = proxy.session_factory()
    proxy.registry.set(replacement)
    assert proxy() is replacement
    proxy.remove()
    proxy.configure(info={"x": 1})
    assert proxy().info == {"x": 1}

    class Model:
        query = proxy.query_property()

    Item.query = proxy.query_property()
    assert Item.query.count() == 2
    assert repr(proxy) == "<ScopedSession 'default'>"


def test_sessions_do_not_autoflush_by_default(manager):
    manager.get().add(Item(id=3, name="three"))
    assert manager.get().query(Item).count() == 2


def test_scopes_nest_and_each_has_its_own_sessions(manager):
    outer = manager.get()()
    with manager.scope("a job") as scope:
        assert scope.label == "a job" and not scope.ended
        inner = manager.get()()
        with manager.scope():
            assert manager.get()() not in (inner, outer)
        assert manager.get()() is inner is not outer
    assert scope.ended and manager.get()() is outer


def test_scope_ends_when_its_block_raises(manager):
    with pytest.raises(ZeroDivisionError), manager.scope():
        manager.get().add(Item(id=9, name="nine"))
        manager.get().flush()
        raise ZeroDivisionError
    assert in_use(manager) == 0 and manager.get().get(Item, 9) is None


def test_scope_is_a_decorator_too(manager):
    @dbsession.session_scope("a job")
    def job():
        return manager.get()()

    assert job() is not job() and in_use(manager) == 0


def test_clear_leaves_the_sessions_of_another_manager_alone(manager, tmp_path):
    second = SessionManager({"default": f"sqlite:///{tmp_path}/second.db"})
    mine, others = manager.get()(), second.get()()
    second.clear()
    assert manager.get()() is mine and second.get()() is not others
    second.clear()


def test_release_gives_connections_back_and_keeps_objects_attached(manager):
    item = manager.get().get(Item, 1)
    manager.get("other").execute(text("SELECT 1"))
    session = manager.get()()
    manager.release()
    assert in_use(manager) == in_use(manager, "other") == 0
    assert manager.get()() is session and item in session and "name" not in item.__dict__
    assert item.name == "one" and in_use(manager) == 1


def test_release_of_one_name_leaves_the_others(manager):
    for name in ("default", "other"):
        manager.get(name).execute(text("SELECT 1"))
    manager.release("other")
    assert (in_use(manager), in_use(manager, "other")) == (1, 0)
    with pytest.raises(UnknownDatabase, match="'other'"):
        manager.release("othr")


def test_release_without_a_scope_or_a_transaction_does_nothing(manager):
    manager.release()
    session = manager.get()()
    manager.release()
    manager.release("default")
    assert manager.get()() is session


def new(session):
    session.add(Item(id=3, name="three"))


def dirty(session):
    session.get(Item, 1).name = "uno"


def deleted(session):
    session.delete(session.get(Item, 1))


def flushed(session):
    new(session)
    session.flush()


def core_write(session):
    session.execute(text("  -- a comment\n UPDATE item SET name = 'x'"))


def cte_write(session):
    session.execute(text("WITH ids AS (SELECT 1 AS id) DELETE FROM item WHERE id IN (SELECT id FROM ids)"))


@pytest.mark.parametrize("work", [new, dirty, deleted, flushed, core_write, cte_write])
def test_release_refuses_unsaved_work_and_changes_nothing(manager, work):
    session = manager.get()
    manager.get("other").execute(text("SELECT 1"))
    session.execute(text("SELECT 1"))
    work(session)
    with pytest.raises(UnsavedWork, match=r"'default'.*commit\(\) or rollback\(\)"):
        manager.release()
    assert (in_use(manager), in_use(manager, "other")) == (1, 1)
    session.commit()
    manager.release()
    assert in_use(manager) == 0
    work(session) if work is core_write else None
    session.rollback()
    manager.release()


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT 1",
        "/* a */ (SELECT 1)",
        "WITH a AS (SELECT 1 AS n) SELECT n FROM a",
        "PRAGMA journal_mode",
        "EXPLAIN SELECT 1",
        "VALUES (1)",
    ],
)
def test_release_takes_reading_for_no_work(manager, statement):
    if statement.startswith("/*"):
        statement = "/* a */ SELECT 1"  # SQLite knows no parentheses there; the pattern is the same
    manager.get().execute(text(statement)).all()
    manager.release()
    assert in_use(manager) == 0


def test_release_that_fails_to_roll_back_is_logged_and_gives_the_slot_back(manager, caplog):
    manager.get().execute(text("SELECT 1"))
    dialect = manager.engine().dialect

    def do_rollback(connection):
        del dialect.do_rollback
        raise RuntimeError("secret")

    dialect.do_rollback = do_rollback
    manager.release()
    assert in_use(manager) == 0 and manager.get().scalar(text("SELECT 1")) == 1
    lines = [record.getMessage() for record in caplog.records if record.name == "dbsession.manager"]
    assert len(lines) == 1 and "'default'" in lines[0] and "secret" not in lines[0]


def test_configure_again_disposes_the_old_engines_and_lets_transactions_finish(manager, tmp_path):
    proxy, old = manager.get(), manager.engine()
    proxy.execute(text("INSERT INTO item VALUES (7, 'seven')"))
    connection = proxy.connection().connection.dbapi_connection
    kept = old.connect()  # of somebody who holds a connection for longer
    manager.configure({"default": f"sqlite:///{tmp_path}/new.db"})
    assert manager.get() is proxy and manager.engine() is not old
    assert proxy().get_bind() is old
    proxy.commit()
    with pytest.raises(Exception, match="closed"):
        connection.execute("SELECT 1")  # closed when it was given back
    assert proxy().get_bind() is manager.engine()
    assert old.pool.checkedin() == 0
    kept.close()
    assert old.pool.checkedin() == 0
    with pytest.raises(UnknownDatabase):
        manager.get("other")
    manager.configure({"default": f"sqlite:///{tmp_path}/default.db"})
    assert manager.get().get(Item, 7).name == "seven"


def test_configure_again_gives_an_idle_session_of_a_long_scope_the_new_engine(manager, tmp_path):
    before = manager.get()()
    manager.configure({"default": f"sqlite:///{tmp_path}/new.db"})
    assert manager.get()() is not before and manager.get()().get_bind() is manager.engine()
    with pytest.raises(InvalidRequestError):
        before.execute(text("SELECT 1"))


def test_configure_during_a_build_does_not_leave_a_stale_engine(tmp_path):
    building, go = gevent.event.Event(), gevent.event.Event()

    def find(name):
        building.set()
        go.wait()
        return f"sqlite:///{tmp_path}/old.db"

    manager = SessionManager()
    proxy = manager.get()
    manager.configure(find)
    job = gevent.spawn(lambda: proxy().get_bind().url.database)
    building.wait()
    manager.configure({"default": f"sqlite:///{tmp_path}/new.db"})
    go.set()
    assert job.get(timeout=30) == f"{tmp_path}/new.db"


def test_reconfiguring_a_name_away_lets_its_transaction_finish(tmp_path):
    urls = {name: f"sqlite:///{tmp_path}/{name}.db" for name in ("default", "other")}
    manager = SessionManager(urls)
    session = manager.get("other")
    session.execute(text("CREATE TABLE t (n INTEGER)"))
    session.execute(text("INSERT INTO t VALUES (1)"))
    manager.configure({"default": urls["default"]})
    session.execute(text("INSERT INTO t VALUES (2)"))
    session.commit()
    with pytest.raises(UnknownDatabase):
        session.execute(text("SELECT 1"))
    manager.clear()
    manager.configure(urls)
    assert session.scalar(text("SELECT COUNT(*) FROM t")) == 2
    manager.clear()
    manager.dispose()


def test_dispose_closes_idle_connections_now_and_those_in_use_on_return(manager):
    engine = manager.engine()
    manager.get().execute(text("SELECT 1"))
    with manager.scope():
        manager.get().execute(text("SELECT 1"))
    assert (engine.pool.checkedout(), engine.pool.checkedin()) == (1, 1)
    connection = manager.get().connection().connection.dbapi_connection
    manager.dispose()
    assert manager.get().scalar(text("SELECT 5")) == 5  # in the middle of its transaction
    manager.clear()
    with pytest.raises(Exception, match="closed"):
        connection.execute("SELECT 1")
    assert manager.get().scalar(text("SELECT 6")) == 6 and manager.engine() is engine


def test_dispose_with_waiters_does_not_multiply_connections(tmp_path):
    run_python(
        """
        from gevent import monkey; monkey.patch_all()
        import sys
        import gevent, gevent.event, dbsession
        from sqlalchemy import event, text
        from support.waiting import wait_until
        dbsession.configure({"default": {"url": f"sqlite:///{sys.argv[1]}/a.db", "options": {"pool_size": 2}}})
        engine, opened = dbsession.get_engine(), set()
        event.listen(engine, "connect", lambda connection, _: opened.add(connection))
        event.listen(engine, "close", lambda connection, _: opened.discard(connection))
        def use():
            with dbsession.session_scope():
                dbsession.get_dbsession().execute(text("SELECT 1"))
                go_on.wait(20)
        for _ in range(3):
            go_on = gevent.event.Event()
            jobs = [gevent.spawn(use) for _ in range(6)]
            wait_until(lambda: engine.pool.waiting() == 4, 20)
            dbsession.dispose()
            go_on.set()
            gevent.joinall(jobs, timeout=20, raise_error=True)
        assert len(opened) <= 2, opened
        dbsession.dispose()
        assert not opened
        """,
        tmp_path,
    )


def test_process_wide_functions_are_those_of_one_manager(tmp_path):
    proxy = dbsession.get_dbsession("early")  # before configure(): unchecked
    dbsession.configure({"default": f"sqlite:///{tmp_path}/a.db", "early": f"sqlite:///{tmp_path}/e.db"})
    try:
        assert dbsession.get_dbsession("early") is proxy
        assert proxy().get_bind() is dbsession.get_engine("early")
        proxy.execute(text("SELECT 1"))
        dbsession.release_dbsession("early")
        assert dbsession.get_engine("early").pool.checkedout() == 0
        dbsession.clear_dbsession()
        with pytest.raises(UnknownDatabase):
            dbsession.get_dbsession("late")
    finally:
        dbsession.clear_dbsession()
        dbsession.configure()
