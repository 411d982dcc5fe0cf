"""Sessions that end in another way than by their scope: by the user, by SQLAlchemy, by the collector."""

from __future__ import annotations

import gc

import gevent
import greenlet
import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.orm import Session

from dbsession import SessionManager
from dbsession.core import session as sessions


class Boom(Exception):
    pass


@pytest.fixture
def manager(tmp_path):
    manager = SessionManager({"default": {"url": f"sqlite:///{tmp_path}/a.db", "options": {"pool_size": 2}}})
    with manager.scope():
        manager.get().execute(text("CREATE TABLE t (n INTEGER)"))
        manager.get().commit()
    yield manager
    manager.clear()
    manager.dispose()


def in_use(manager):
    return manager.engine().pool.checkedout()


def fail_rollback(manager, error):
    dialect = manager.engine().dialect

    def do_rollback(connection):
        del dialect.do_rollback
        raise error

    dialect.do_rollback = do_rollback


@pytest.mark.parametrize("how", ["close", "reset", "with"])
def test_users_own_close_that_fails_costs_no_slot(manager, how):
    with manager.scope():
        session = manager.get()()
        session.execute(text("SELECT 1"))
        fail_rollback(manager, Boom())
        with pytest.raises(Boom):
            if how == "with":
                with session:
                    pass
            else:
                getattr(session, how)()
        assert in_use(manager) == 0
    assert in_use(manager) == 0 and not sessions._pinned


def test_close_that_somebody_put_in_place_of_ours_costs_no_slot(manager):
    def fail():
        raise Boom

    with manager.scope():
        session = manager.get()()
        session.execute(text("SELECT 1"))
        session.close = fail
    assert in_use(manager) == 0
    with pytest.raises(InvalidRequestError):
        session.execute(text("SELECT 1"))


def test_session_whose_close_only_resets_stays_in_its_scope(tmp_path):
    manager = SessionManager({"default": {"url": f"sqlite:///{tmp_path}/a.db", "session": {"close_resets_only": True}}})
    with manager.scope():
        session = manager.get()()
        session.close()
        session.execute(text("SELECT 1"))
        assert manager.get()() is session and in_use(manager) == 1
    assert in_use(manager) == 0
    manager.dispose()


def test_registry_set_closes_what_it_replaces(manager):
    registry = manager.get().registry
    manager.get().execute(text("SELECT 1"))
    replacement = manager.get().session_factory()
    registry.set(replacement)
    assert in_use(manager) == 0 and manager.get()() is replacement


def test_foreign_session_set_in_the_registry_is_closed_like_any_other(manager):
    with manager.scope():
        manager.get().registry.set(Session(manager.engine()))
        manager.get().execute(text("SELECT 1"))
        manager.get().remove()
        manager.get().registry.set(Session(manager.engine()))
        manager.get().execute(text("SELECT 1"))
    assert in_use(manager) == 0


def test_collector_never_rolls_back_in_a_stranger(manager):
    """A raw greenlet in a reference cycle: SQLAlchemy's finalizer would come before our own."""
    gevent.sleep(0)
    rolled_back_in = []
    event.listen(manager.engine(), "checkin", lambda *_: rolled_back_in.append(gevent.getcurrent()))

    def use():
        manager.get().execute(text("SELECT 1"))

    raw = greenlet.greenlet(use)
    raw.itself = raw
    raw.switch()
    del raw
    assert in_use(manager) == 1
    gc.collect()
    assert not rolled_back_in
    gevent.sleep(0)
    gevent.sleep(0)
    assert len(rolled_back_in) == 1 and rolled_back_in[0] is not gevent.getcurrent()
    assert in_use(manager) == 0 and not sessions._pinned


def test_nothing_stays_pinned_after_commit_rollback_savepoint_or_release(manager):
    session = manager.get()
    for end in (session.commit, session.rollback, manager.release, manager.clear):
        session.execute(text("SELECT 1"))
        with session.begin_nested():
            session.execute(text("SELECT 2"))
        assert len(sessions._pinned) == 1
        end()
        assert not sessions._pinned and in_use(manager) == 0


def test_release_on_a_lost_connection_rolls_back(manager):
    session = manager.get()
    session.execute(text("SELECT 1"))
    session.connection().invalidate()
    manager.release()
    assert in_use(manager) == 0 and session.scalar(text("SELECT 1")) == 1


def test_write_under_autocommit_is_no_unsaved_work(tmp_path):
    manager = SessionManager(
        {"default": {"url": f"sqlite:///{tmp_path}/a.db", "options": {"isolation_level": "AUTOCOMMIT"}}}
    )
    with manager.scope():
        manager.get().execute(text("CREATE TABLE t (n INTEGER)"))
        manager.release()
        manager.get().execute(text("INSERT INTO t VALUES (1)"))
        manager.release()
        assert manager.get().scalar(text("SELECT COUNT(*) FROM t")) == 1
    manager.dispose()
