"""F16: what a program sees of a transaction of which the server has undone a part, whichever way it asks."""

from __future__ import annotations

import gc
import weakref

import pytest
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from dbsession import RollbackRequired, SessionManager
from support.servers import on


@pytest.fixture
def manager(server_url):
    """Has a pool of one, and a table."""
    options = {"pool_size": 1, "pool_timeout": 5}
    manager = SessionManager({"default": {"url": server_url, "options": options}})
    with manager.engine().begin() as connection:
        connection.execute(text("CREATE TABLE t (n INT)"))
    yield manager
    manager.clear()
    manager.dispose()


@pytest.fixture
def deadlock(server):
    """A statement that fails as the victim of a deadlock does."""
    return text(server.dialect.fail_as_deadlock)


def insert(manager):
    manager.get().execute(text("INSERT INTO t VALUES (1)"))


def rows(manager):
    with manager.engine().connect() as connection:
        return connection.scalar(text("SELECT count(*) FROM t"))


def test_f16_refused_commit_keeps_nothing_alive_and_rolls_back(manager, deadlock, server):
    with manager.scope():
        insert(manager)
        with pytest.raises(OperationalError):
            manager.get().execute(deadlock)
        with pytest.raises(RollbackRequired):
            manager.get().commit()
        session = weakref.ref(manager.get()())
    gc.collect()
    assert session() is None and rows(manager) == 0
    with manager.engine().connect() as connection:
        insert_ = text("INSERT INTO t VALUES (1)")
        connection.execute(insert_)
        with pytest.raises(OperationalError):
            connection.execute(deadlock)
        with pytest.raises(RollbackRequired):
            connection.commit()
        assert server.open_transactions() == 0
        connection.rollback()
        connection.execute(insert_)
        connection.commit()
    assert rows(manager) == 1


@on("mariadb")  # PostgreSQL goes on where the savepoint is rolled back to
def test_f16_error_in_a_savepoint_arrives_as_it_is(manager, deadlock):
    with manager.scope():
        insert(manager)
        with pytest.raises(OperationalError), manager.get().begin_nested():
            manager.get().execute(deadlock)
        with pytest.raises(RollbackRequired):
            manager.get().execute(text("SELECT 1"))


def test_f16_every_way_to_execute_on_every_engine_of_the_dialect_is_refused(manager, deadlock):
    with manager.engine().execution_options(logging_token="copy").connect() as connection:
        connection.exec_driver_sql("CREATE TABLE w (n INT)")
        connection.commit()
        with pytest.raises(OperationalError):
            connection.execute(deadlock)
        plain = connection.execution_options(no_parameters=True)
        for refused in (
            lambda: connection.execute(text("SELECT 1")),
            lambda: connection.execute(text("INSERT INTO w VALUES (:n)"), [{"n": 1}, {"n": 2}]),
            lambda: plain.exec_driver_sql("SELECT '%'"),
            connection.commit,
        ):
            with pytest.raises(RollbackRequired):
                refused()
        connection.rollback()
        assert connection.scalar(text("SELECT COUNT(*) FROM w")) == 0
        connection.exec_driver_sql("INSERT INTO w VALUES (1)")
        connection.commit()


def test_f16_commit_of_a_doomed_two_phase_transaction_says_so_and_ends_it(manager, deadlock, server):
    engine = manager.engine()
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE doomed (n INT)"))
    with engine.connect() as connection:
        transaction = connection.begin_twophase()
        connection.execute(text("INSERT INTO doomed VALUES (1)"))
        with pytest.raises(OperationalError):
            connection.execute(deadlock)
        with pytest.raises(RollbackRequired):
            transaction.commit()
    with engine.connect() as connection:
        assert connection.execute(text(server.dialect.prepared)).fetchall() == []
        assert connection.scalar(text("SELECT COUNT(*) FROM doomed")) == 0


def test_unit_that_committed_by_itself_is_not_run_again(manager, deadlock):
    runs = []

    def work():
        runs.append(1)
        insert(manager)
        manager.get().commit()
        manager.get().execute(deadlock)

    with pytest.raises(OperationalError):
        manager.run_in_transaction(work, attempts=3, backoff_s=0.001)
    assert len(runs) == 1 and rows(manager) == 1
