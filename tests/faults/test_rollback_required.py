"""F16: what a program sees of a transaction of which the server has undone a part, whichever way it asks."""

from __future__ import annotations

import gc
import weakref

import pytest
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from dbsession import RollbackRequired

DEADLOCK = "SIGNAL SQLSTATE '40001' SET MYSQL_ERRNO = 1213, MESSAGE_TEXT = 'Deadlock found'"


@pytest.fixture
def managed(managed):
    """The same, with a table and a procedure that ends in a deadlock."""
    with managed().engine().begin() as connection:
        connection.execute(text("CREATE TABLE t (n INT) ENGINE=InnoDB"))
        connection.execute(text(f"CREATE PROCEDURE deadlock() {DEADLOCK}"))
    return managed


def insert(manager):
    manager.get().execute(text("INSERT INTO t VALUES (1)"))


def rows(manager):
    with manager.engine().connect() as connection:
        return connection.scalar(text("SELECT count(*) FROM t"))


def test_f16_refused_commit_keeps_nothing_alive_and_rolls_back(managed, mariadb):
    manager = managed()
    with manager.scope():
        insert(manager)
        with pytest.raises(OperationalError):
            manager.get().execute(text("CALL deadlock()"))
        with pytest.raises(RollbackRequired):
            manager.get().commit()
        session = weakref.ref(manager.get()())
    gc.collect()
    assert session() is None and rows(manager) == 0
    with manager.engine().connect() as connection:
        mine = connection.scalar(text("SELECT CONNECTION_ID()"))
        connection.rollback()
        insert_ = text("INSERT INTO t VALUES (1)")
        connection.execute(insert_)
        with pytest.raises(OperationalError):
            connection.execute(text("CALL deadlock()"))
        with pytest.raises(RollbackRequired):
            connection.commit()
        with mariadb.root() as cursor:
            cursor.execute("SELECT 1 FROM information_schema.innodb_trx WHERE trx_mysql_thread_id = %s", (mine,))
            assert cursor.fetchall() == ()
        connection.rollback()
        connection.execute(insert_)
        connection.commit()
    assert rows(manager) == 1


def test_f16_error_in_a_savepoint_arrives_as_it_is(managed):
    manager = managed()
    with manager.scope():
        insert(manager)
        with pytest.raises(OperationalError, match="1213"), manager.get().begin_nested():
            manager.get().execute(text("CALL deadlock()"))
        with pytest.raises(RollbackRequired):
            manager.get().execute(text("SELECT 1"))


def test_f16_every_way_to_execute_on_every_engine_of_the_dialect_is_refused(managed):
    manager = managed()
    with manager.engine().execution_options(logging_token="copy").connect() as connection:
        connection.exec_driver_sql("CREATE TABLE w (n INT)")
        with pytest.raises(OperationalError, match="1213"):
            connection.execute(text(DEADLOCK))
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


def test_f16_commit_of_a_doomed_two_phase_transaction_says_so_and_ends_it(managed):
    engine = managed().engine()
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE doomed (n INT) ENGINE=InnoDB"))
    with engine.connect() as connection:
        transaction = connection.begin_twophase()
        connection.execute(text("INSERT INTO doomed VALUES (1)"))
        with pytest.raises(OperationalError):
            connection.execute(text(DEADLOCK))
        with pytest.raises(RollbackRequired):
            transaction.commit()
    with engine.connect() as connection:
        assert connection.execute(text("XA RECOVER")).fetchall() == []
        assert connection.scalar(text("SELECT COUNT(*) FROM doomed")) == 0


def test_unit_that_committed_by_itself_is_not_run_again(managed):
    manager = managed()
    runs = []

    def work():
        runs.append(1)
        insert(manager)
        manager.get().commit()
        manager.get().execute(text("CALL deadlock()"))

    with pytest.raises(OperationalError):
        manager.run_in_transaction(work, attempts=3, backoff_s=0.001)
    assert len(runs) == 1 and rows(manager) == 1
