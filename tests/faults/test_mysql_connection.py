"""dbsession.mysql.Connection: what a connection keeps, and what of one unit of work does not reach the next."""

from __future__ import annotations

import logging

import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import QueuePool

from dbsession import SessionManager
from dbsession.green.mysql.connection import Connection
from support.waiting import wait_until


@pytest.fixture
def questions(counter):
    """How many statements the server has had, without those that ask for it."""

    def cost(work):
        before = counter("Questions")
        work()
        return counter("Questions") - before - 1

    return cost


def table(manager):
    with manager.engine().begin() as connection:
        connection.execute(text("CREATE TABLE t (id INT PRIMARY KEY, n INT) ENGINE=InnoDB"))
        connection.execute(text("INSERT INTO t VALUES (1, 1), (2, 2), (3, 3)"))


def driver(manager):
    return manager.get().connection().connection.dbapi_connection


def test_every_pymysql_engine_uses_it_and_mariadb_urls_too(managed, mariadb_url):
    for url in (mariadb_url, mariadb_url.replace("mysql+", "mariadb+")):
        manager = SessionManager({"default": url})
        with manager.scope():
            assert isinstance(driver(manager), Connection)
        manager.dispose()


def test_select_and_insert_cost_two_round_trips_each(managed, questions):
    manager = managed()
    table(manager)

    def select():
        with manager.scope():
            manager.get().execute(text("SELECT * FROM t")).all()

    def insert():
        with manager.scope():
            manager.get().execute(text("UPDATE t SET n = n + 1"))
            manager.get().commit()

    def nothing_transactional():
        with manager.scope():
            manager.get().execute(text("SELECT 1")).all()

    select()
    assert (questions(select), questions(insert), questions(nothing_transactional)) == (2, 2, 2)


@pytest.mark.parametrize("reset", ["rollback", "connection"])
def test_read_only_database_costs_one_round_trip_and_refuses_writes(managed, questions, reset):
    table(managed())
    manager = managed(readonly=True, reset=reset)

    def select():
        with manager.scope():
            manager.get().execute(text("SELECT * FROM t")).all()

    select()
    if reset == "rollback":
        assert questions(select) == 1
    pool = manager.engine().pool
    for _ in range(2):  # refused again after a reset, and the pool is not thrown away for it
        with manager.scope(), pytest.raises(OperationalError) as refused:
            manager.get().execute(text("UPDATE t SET n = 0"))
        assert refused.value.orig.args[0] == 1792 and not refused.value.connection_invalidated
        wait_until(lambda: pool.checkedin() == 1, 5)


def test_busy_connection_is_not_pinged_and_an_idle_one_is(managed, counter):
    pings = "Com_admin_commands"  # COM_PINGs: they are no questions
    for ping_idle_s, expected in ((60, 0), (0, 5)):
        manager = managed(ping_idle_s=ping_idle_s)
        with manager.scope():
            manager.get().scalar(text("SELECT 1"))
        before = counter(pings)
        for _ in range(5):
            with manager.scope():
                manager.get().scalar(text("SELECT 1"))
        assert counter(pings) - before == expected


def test_connection_killed_at_the_server_a_moment_ago_never_fails_the_next_request(managed, mariadb):
    manager = managed(ping_idle_s=3600)
    for _ in range(20):
        with manager.scope():
            thread_id = manager.get().scalar(text("SELECT CONNECTION_ID()"))
        with mariadb.root() as cursor:
            cursor.execute(f"KILL {thread_id}")
        wait_until(lambda gone=thread_id: gone not in [row["id"] for row in mariadb.processlist()], 20)
        with manager.scope():
            assert manager.get().scalar(text("SELECT CONNECTION_ID()")) != thread_id


@pytest.mark.parametrize("leave", ["SELECT * FROM t", "INSERT INTO t VALUES (1, 1)", "BEGIN", "SAVEPOINT a"])
def test_rollback_is_sent_whenever_a_transaction_may_be_open(managed, mariadb, leave):
    """A failed INSERT as the first statement holds a row lock, and the last status the server sent says nothing."""
    manager = managed()
    table(manager)
    with manager.scope():
        mine = manager.get().scalar(text("SELECT CONNECTION_ID()"))
    with manager.scope():
        try:
            manager.get().execute(text(leave))
        except Exception as error:
            assert "1062" in str(error)
    with mariadb.root() as cursor:
        # Of this connection: the one of another test may still be rolled back.
        cursor.execute("SELECT 1 FROM information_schema.innodb_trx WHERE trx_mysql_thread_id = %s", (mine,))
        assert cursor.fetchall() == ()


def test_raw_connection_left_in_a_transaction_is_rolled_back_before_the_next_user(managed):
    manager = managed()
    table(manager)
    raw = manager.engine().raw_connection()
    raw.cursor().execute("UPDATE t SET n = 99")
    raw.close()
    with manager.scope():
        assert manager.get().scalars(text("SELECT n FROM t ORDER BY n")).all() == [1, 2, 3]


def test_listener_of_do_connect_may_change_the_arguments(managed):
    """The recipe for passwords that rotate."""
    manager = managed()

    @event.listens_for(manager.engine(), "do_connect")
    def changed(dialect, record, args, arguments):
        arguments["init_command"] = "SET @w = 7"

    with manager.scope():
        assert manager.get().scalar(text("SELECT @w")) == 7


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_set_transaction_does_not_reach_the_next_user(managed, end):
    manager = managed()
    table(manager)
    with manager.scope():
        manager.get().execute(text("SET TRANSACTION READ ONLY"))
        getattr(manager.get(), end)()
    with manager.scope():
        manager.get().execute(text("UPDATE t SET n = 9"))
        manager.get().commit()


@pytest.mark.slow
def test_scopes_read_timeout_is_for_its_own_sessions_only(managed):
    manager = managed(read_timeout_s=1.5)
    with manager.scope("report", read_timeout_s=30):
        assert manager.get().scalar(text("SELECT SLEEP(2)")) == 0
        manager.get().commit()
        assert manager.get().scalar(text("SELECT SLEEP(2)")) == 0
        first = driver(manager)
    with manager.scope():
        assert driver(manager) is first
        with pytest.raises(OperationalError) as lost:
            manager.get().scalar(text("SELECT SLEEP(30)"))
        assert lost.value.orig.args[0] == 2013
    assert manager.engine().pool.checkedout() == 0


def test_read_timeout_of_a_scope_leaves_the_users_own_connection_as_it_was(managed):
    manager = managed()
    with manager.engine().connect() as connection, manager.scope(read_timeout_s=300):
        session = manager.get()()
        session.bind = connection
        for _ in range(2):
            session.execute(text("SELECT 1"))
            session.commit()
        driver = connection.connection.dbapi_connection
        session.close()
        assert driver._read_timeout == 60


def test_creator_is_warned_about_when_the_engine_is_built(caplog, mariadb_url):
    SessionManager({"default": {"url": mariadb_url, "options": {"creator": lambda: None}}})
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "`creator` opens stock connections" in caplog.text


def test_pool_class_of_the_user_gets_the_same_connections(managed):
    for reset in ("rollback", "connection"):
        manager = managed(options={"poolclass": QueuePool}, reset=reset)
        with manager.scope():
            assert isinstance(driver(manager), Connection)
            manager.get().execute(text("SET @who = 'alice'"))
        with manager.scope():
            assert manager.get().scalar(text("SELECT @who")) is None
