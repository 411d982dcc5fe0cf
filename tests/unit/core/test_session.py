"""The end of a session that nothing was done with, which SQLAlchemy's close() is spared; and the proxy's short way."""

from __future__ import annotations

import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, object_session

import dbsession
from dbsession import SessionManager, UnknownDatabase, UnsavedWork


class Base(DeclarativeBase):
    pass


class Item(Base):
    __tablename__ = "item"
    id: Mapped[int] = mapped_column(primary_key=True)


class Noted(Session):
    calls = ()

    def close(self):
        Noted.calls += ("close",)
        super().close()


class Expunging(Session):
    def expunge_all(self):
        Noted.calls += ("expunge_all",)
        super().expunge_all()


@pytest.fixture
def manager(tmp_path):
    url = f"sqlite:///{tmp_path}/a.db"
    manager = SessionManager(
        {
            "default": url,
            "resets": {"url": url, "session": {"close_resets_only": True}},
            "noted": {"url": url, "session": {"class_": Noted}},
            "expunging": {"url": url, "session": {"class_": Expunging}},
        }
    )
    Base.metadata.create_all(manager.engine())
    yield manager
    manager.clear()
    manager.dispose()


USES = {
    "execute": lambda session: session.execute(text("SELECT 1")),
    "add": lambda session: session.add(Item(id=1)),
    "begin": lambda session: session.begin(),
    "connection": lambda session: session.connection(),
    "get": lambda session: session.get(Item, 1),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("end", ["clear", "close", "remove"])
def test_untouched_session_refuses_every_use_after_its_end(manager, use, end):
    session = manager.get()()
    {"clear": manager.clear, "close": session.close, "remove": manager.get().remove}[end]()
    with pytest.raises(InvalidRequestError, match="permanently closed"):
        USES[use](session)
    assert manager.get()() is not session and manager.engine().pool.checkedout() == 0


def test_session_with_objects_and_no_transaction_lets_them_go(manager):
    session, item = manager.get()(), Item(id=1)
    session.add(item)
    session.commit()
    assert not session.in_transaction() and object_session(item) is session
    manager.clear()
    assert object_session(item) is None


@pytest.mark.parametrize("way_out", ["rollback", "expunge", "a savepoint's rollback"])
def test_new_object_that_was_never_flushed_is_let_go(manager, way_out):
    session, item = manager.get()(), Item(id=2)
    if way_out == "a savepoint's rollback":
        with session.begin_nested() as savepoint:
            session.add(item)
            savepoint.rollback()
    else:
        session.add(item)
        session.expunge(item) if way_out == "expunge" else session.rollback()
    manager.clear()
    assert object_session(item) is None and manager.engine().pool.checkedout() == 0


def test_session_whose_close_is_a_reset_stays_usable_when_it_was_untouched(manager):
    session = manager.get("resets")()
    manager.clear()
    assert session.execute(text("SELECT 1")).scalar() == 1
    session.close()
    assert session.execute(text("SELECT 1")).scalar() == 1
    session.close()


def test_what_a_class_of_the_users_own_does_in_close_is_done_though_the_session_is_untouched(manager):
    Noted.calls = ()
    for name in ("noted", "expunging"):
        manager.get(name)()
        manager.clear()
    assert Noted.calls == ("close", "expunge_all")


def test_factory_gives_what_configure_and_its_callers_say(manager):
    info = {"x": 1}
    manager.get().configure(info=info, expire_on_commit=False)
    session = manager.get()()
    session.info["y"] = 2
    assert session.info == {"x": 1, "y": 2} and info == {"x": 1} and session.expire_on_commit is False
    own = manager.get().session_factory(info={"z": 3}, expire_on_commit=True)
    assert own.info == {"x": 1, "z": 3} and own.expire_on_commit is True
    own.close()


def test_name_that_a_later_configuration_does_not_have_is_refused_at_once(manager, tmp_path):
    proxy = manager.get("noted")
    assert manager.get("noted") is proxy
    manager.configure({"default": f"sqlite:///{tmp_path}/b.db"})
    with pytest.raises(UnknownDatabase, match="noted"):
        manager.get("noted")
    with pytest.raises(UnknownDatabase):
        proxy.execute(text("SELECT 1"))


@pytest.mark.parametrize("how", ["one", "many", "none"])
def test_release_refuses_a_write_that_a_listener_of_the_users_executes(tmp_path, how):
    """A `do_execute` listener that returns True stands in for the dialect, whose methods then see nothing."""
    manager = SessionManager({"default": f"sqlite:///{tmp_path}/a.db"})
    session = manager.get()
    name = {"one": "do_execute", "many": "do_executemany", "none": "do_execute_no_params"}[how]

    def execute(cursor, statement, parameters, context=None):
        cursor.executemany(statement, parameters) if how == "many" else cursor.execute(statement)
        return True

    def execute_alone(cursor, statement, context):
        return execute(cursor, statement, ())

    with dbsession.session_scope():
        session.execute(text("CREATE TABLE t (a INT)"))
        session.commit()
        event.listen(manager.engine(), name, execute_alone if how == "none" else execute)
        if how == "many":
            session.execute(text("INSERT INTO t VALUES (:a)"), [{"a": 1}, {"a": 2}])
        else:
            options = {"no_parameters": True} if how == "none" else {}
            session.connection().exec_driver_sql("INSERT INTO t VALUES (1)", execution_options=options)
        with pytest.raises(UnsavedWork):
            manager.release()
    manager.dispose()


def test_session_closes_while_another_thread_takes_it_out_of_its_scope(manager):
    """As a thread does that ends the scope: between two steps of close() the entry is gone."""

    class TakenMeanwhile(dict):
        def get(self, key):
            found = super().get(key)
            self.clear()
            return found

    with manager.scope() as scope:
        session = manager.get()()
        scope.sessions = TakenMeanwhile(scope.sessions)
        session.close()
        assert not scope.sessions
