"""An error in a later result of one statement, of a CALL or of a text with several: it is the statement's, in both
halves, whoever executes it and however its rows are read."""

from __future__ import annotations

import pymysql
import pytest
from pymysql.constants import CLIENT
from sqlalchemy import event, exc, text

from dbsession.core.backends import mysql_errors
from dbsession.errors import UnsavedWork
from support.halves import done, entered, on_both_halves, sync
from support.readers import BY_BOTH

pytestmark = BY_BOTH

DEADLOCK = "SIGNAL SQLSTATE '40001' SET MYSQL_ERRNO = 1213, MESSAGE_TEXT = 'a deadlock'"
FAILING = {
    1205: "SIGNAL SQLSTATE 'HY000' SET MYSQL_ERRNO = 1205, MESSAGE_TEXT = 'a lock wait timeout'",
    1062: "INSERT INTO t VALUES (0)",
    1644: "SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'no'",
    1213: DEADLOCK,
    1317: "KILL QUERY CONNECTION_ID()",
}
STREAM = {"stream_results": True}


@pytest.fixture
def manager(half, driver, mariadb_url, mariadb):
    """A manager with a table that has one row, 0, and a procedure for each of FAILING, which SELECTs and then fails."""
    name = mariadb_url.rpartition("/")[2]
    with mariadb.root() as cursor:
        cursor.execute(f"CREATE TABLE {name}.t (n INT PRIMARY KEY) ENGINE=InnoDB")
        cursor.execute(f"INSERT INTO {name}.t VALUES (0)")
        for number, failing in FAILING.items():
            body = f"BEGIN SELECT 1 AS a; SELECT seq FROM seq_1_to_3; {failing}; SELECT 2; END"
            cursor.execute(f"CREATE PROCEDURE {name}.p{number}() {body}")
        cursor.execute(
            f"CREATE PROCEDURE {name}.two() BEGIN SELECT 1 AS a; SELECT 2 AS b; INSERT INTO t VALUES (9); END"
        )
        cursor.execute(f"CREATE PROCEDURE {name}.gone() BEGIN SELECT 1; KILL CONNECTION_ID(); END")
    url = mariadb_url.replace("pymysql", driver)
    options = {"pool_size": 1, "connect_args": {"client_flag": CLIENT.MULTI_STATEMENTS}}
    manager = half.verbs.SessionManager({"default": {"url": url, "options": options}})
    yield manager

    async def dispose():
        await done(manager.dispose())

    half.run(dispose)


async def rows(manager):
    async with entered(manager.scope()):
        return (await done(manager.get().scalars(text("SELECT n FROM t ORDER BY n")))).all()


def number(raised):
    return mysql_errors.number(raised.value)


CALLED = [
    pytest.param(each, several, marks=[] if (each, several) in ((1062, False), (1213, True)) else pytest.mark.slow)
    for each in FAILING
    for several in (False, True)
]


@pytest.mark.parametrize(("code", "several"), CALLED)
@on_both_halves
async def test_f22_error_in_a_later_result_is_raised_by_its_statement_and_nothing_is_committed(
    half, manager, code, several
):
    statement = f"SELECT 1; {FAILING[code]}; SELECT 3" if several else f"CALL p{code}()"
    attempts = []

    async def work(session):
        attempts.append(1)
        await done(session.execute(text("INSERT INTO t VALUES (1)")))
        await done(session.execute(text(statement)))
        raise AssertionError("the statement has not failed")

    with pytest.raises(exc.DBAPIError) as raised:
        if half.name == "aio":
            await manager.run_in_transaction(work)
        else:
            manager.run_in_transaction(lambda session: step(work(session)))
    assert number(raised) == code
    assert statement in str(raised.value)
    assert len(attempts) == (3 if code in (1205, 1213) else 1)
    assert await rows(manager) == [0]


def step(coroutine):
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value


@on_both_halves
async def test_f22_savepoint_that_a_later_result_fails_in_is_rolled_back_alone(half, manager):
    async with entered(manager.scope()):
        session = manager.get()
        await done(session.execute(text("INSERT INTO t VALUES (1)")))
        with pytest.raises(exc.IntegrityError, match="1062"):
            async with entered(session.begin_nested()):
                await done(session.execute(text("INSERT INTO t VALUES (2)")))
                await done(session.execute(text("CALL p1062()")))
        await done(session.commit())
    assert await rows(manager) == [0, 1]


@on_both_halves
async def test_f22_deadlock_in_a_later_result_that_was_caught_refuses_the_commit(half, manager):
    async with entered(manager.scope()) as scope:
        session = manager.get()
        await done(session.execute(text("INSERT INTO t VALUES (1)")))
        with pytest.raises(exc.OperationalError, match="1213"):
            await done(session.execute(text("CALL p1213()")))
        with pytest.raises(exc.PendingRollbackError):
            await done(session.commit())
        await done(session.rollback())
        assert scope.outcome == "rolled back"
    assert await rows(manager) == [0]


@on_both_halves
async def test_f22_statement_executed_for_many_fails_with_the_last_ones_later_result(half, manager):
    async with entered(manager.scope()):
        with pytest.raises(exc.IntegrityError, match="1062"):
            await done(manager.get().execute(text("CALL p1062() -- :n"), [{"n": 1}]))


@on_both_halves
async def test_f22_connection_lost_after_the_first_result_is_a_disconnect(half, manager):
    async with entered(manager.scope()):
        with pytest.raises(exc.DBAPIError) as raised:
            await done(manager.get().execute(text("CALL gone()")))
        assert raised.value.connection_invalidated
    assert await rows(manager) == [0]


@on_both_halves
async def test_f22_first_result_is_what_it_was_when_others_follow(half, manager):
    async with entered(manager.scope()):
        session = manager.get()
        result = await done(session.execute(text("CALL two()")))
        assert list(result.keys()) == ["a"] and result.all() == [(1,)]
        result = await done(session.execute(text("UPDATE t SET n = n + 100 WHERE n IN (0, 9); DO 1; SELECT 3")))
        assert result.rowcount == 2
        await done(session.commit())
    assert await rows(manager) == [100, 109]


@pytest.mark.parametrize("code", [1213, 1205, pytest.param(1062, marks=pytest.mark.slow)])
@on_both_halves
async def test_f22_error_after_a_stream_keeps_its_transaction_from_being_committed(half, manager, code):
    attempts = []

    def read(session):
        attempts.append(1)
        session.execute(text("INSERT INTO t VALUES (1)"))
        assert session.execute(text(f"CALL p{code}()"), execution_options=STREAM).all() == [(1,)]

    with pytest.raises((exc.DBAPIError, exc.PendingRollbackError)) as raised:
        if half.name == "aio":

            async def work(session):
                await session().run_sync(read)

            await manager.run_in_transaction(work)
        else:
            manager.run_in_transaction(read)
    assert str(code) in str(raised.value)
    assert len(attempts) == (1 if code == 1062 else 3)
    assert await rows(manager) == [0]


@on_both_halves
async def test_f22_statement_that_a_listener_executes_in_the_dialects_place_fails_as_any(half, manager):
    def execute(cursor, statement, parameters, context):
        cursor.execute(statement, parameters)
        return True

    event.listen(sync(manager.engine()), "do_execute", execute)
    async with entered(manager.scope()):
        with pytest.raises(exc.IntegrityError, match="1062"):
            await done(manager.get().execute(text("CALL p1062()")))


# PyMySQL alone: its cursors' nextset() stays.


@pytest.fixture
def green(manager):
    return manager


only_green = pytest.mark.parametrize("driver", ["pymysql"], indirect=True)


@only_green
@pytest.mark.parametrize("cursorclass", [pymysql.cursors.Cursor, pymysql.cursors.SSCursor])
def test_f22_raw_cursor_meets_the_error_where_it_asks_for_the_next_result(green, cursorclass):
    raw = green.engine().raw_connection()
    cursor = raw.cursor(cursorclass)
    cursor.execute("CALL p1062()")
    assert list(cursor.fetchall()) == [(1,)]
    assert cursor.nextset() and list(cursor.fetchall()) == [(1,), (2,), (3,)]
    with pytest.raises(pymysql.IntegrityError):
        cursor.nextset()
    raw.close()


@only_green
@pytest.mark.parametrize("stream", [False, True], ids=["at once", "stream"])
def test_f22_later_results_are_there_for_whoever_asks_the_cursor_of_a_result(green, stream):
    with green.engine().connect() as connection:
        result = connection.execution_options(stream_results=stream).exec_driver_sql(
            "SELECT 1; SELECT 2 UNION SELECT 3; SELECT 4"
        )
        cursor = result.cursor
        found = [list(cursor.fetchall())]
        while cursor.nextset():
            found.append(list(cursor.fetchall()))
        assert found[1:] == [[(2,), (3,)], [(4,)]]
        assert connection.scalar(text("SELECT 5")) == 5


@only_green
def test_f22_error_after_a_stream_is_logged_when_only_a_rollback_meets_it(green, caplog):
    with green.engine().connect() as connection:
        assert connection.execution_options(stream_results=True).exec_driver_sql("CALL p1062()").all() == [(1,)]
        assert not caplog.records
        connection.rollback()
        assert connection.scalar(text("SELECT 5")) == 5
    (record,) = [each for each in caplog.records if each.name == "dbsession.mysql"]
    assert "'default'" in record.getMessage() and "IntegrityError (1062)" in record.getMessage()


@only_green
def test_f38_rollback_works_when_a_listener_reads_a_stream_in_the_dialects_place(green):
    def as_stream(cursor, statement, parameters, context):
        if "seq_1_to" not in statement:
            return False
        stream = cursor.connection.cursor(pymysql.cursors.SSCursor)
        stream.execute(statement)
        stream.fetchone()
        return True

    event.listen(green.engine(), "do_execute", as_stream)
    with green.engine().connect() as connection:
        connection.execute(text("SELECT seq FROM seq_1_to_1000000"))
        connection.rollback()
        assert connection.scalar(text("SELECT 1")) == 1


@on_both_halves
async def test_write_after_a_reading_statement_of_one_text_is_unsaved_work(half, manager):
    async with entered(manager.scope()):
        await done(manager.get().execute(text("SELECT 1; INSERT INTO t VALUES (5)")))
        with pytest.raises(UnsavedWork):
            await done(manager.release())
        await done(manager.get().rollback())
        await done(manager.get().execute(text("SELECT ';'")))
        await done(manager.release())
