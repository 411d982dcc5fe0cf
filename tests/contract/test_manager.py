"""The verbs: get, clear, scope, release, engine, configure, dispose."""

from __future__ import annotations

import gevent
import gevent.event
import pytest
from sqlalchemy import String, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, scoped_session

import dbsession
from dbsession import SessionManager, UnknownDatabase
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


def test_proxy_has_what_is_of_scoped_session_alone(manager):
    proxy = manager.get()
    session = proxy(expire_on_commit=False)
    assert session.expire_on_commit is False and proxy() is session
    assert [found.name for found in proxy.query(Item).order_by(Item.id)] == ["one", "two"]
    Item.query = proxy.query_property()
    assert Item.query.count() == 2


def test_attribute_read_after_a_release_checks_a_connection_out_again(manager):
    item = manager.get().get(Item, 1)
    manager.release()
    assert in_use(manager) == 0 and item.name == "one" and in_use(manager) == 1


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
