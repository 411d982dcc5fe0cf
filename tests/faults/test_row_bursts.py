"""F9, F14, F18 in the middle of many rows, of which a piece is read at once: kills, silence, errors, a lost server; and
what else may come between rows. With asyncmy's parser and without."""

from __future__ import annotations

import gc

import pymysql
import pytest
from pymysql.constants import CLIENT
from pymysql.cursors import Cursor, SSCursor
from sqlalchemy import text

from dbsession import SessionManager
from dbsession.green.mysql.connection import Connection
from support.mariadb import connected
from support.processes import run_script
from support.proxy import Proxy
from support.readers import BY_BOTH

pytestmark = BY_BOTH

# The server sends rows as its buffer of 16 KiB is full: nearly all before the one at which something happens.
MANY = "SELECT seq, REPEAT('x', 100), NOW(), {} FROM seq_1_to_3000"
SLEEPS = MANY.format("IF(seq = 2000, SLEEP(20), 0)")
FAILS = MANY.format("IF(seq = 2000, (SELECT s.seq FROM seq_1_to_2 s WHERE s.seq > 0 * seq_1_to_3000.seq), 0)")
LATE = "SET STATEMENT max_statement_time = 0.3 FOR " + SLEEPS


def read(connection, statement, cursorclass):
    """The rows of each result, then the error's text; how many rows a stream gave before it."""
    got = []
    cursor = connection.cursor(cursorclass)
    try:
        cursor.execute(statement)
        while True:
            got.append([])
            while (row := cursor.fetchone()) is not None:
                got[-1].append(row[0])
            got[-1] = len(got[-1]), got[-1][-1:], cursor.rowcount, cursor.warning_count
            if not cursor.nextset():
                break
    except pymysql.MySQLError as error:
        got.append(str(error))
    cursor.connection = None  # nothing is read at its end
    return got


@pytest.mark.parametrize("cursorclass", [Cursor, SSCursor])
@pytest.mark.parametrize("statement", [FAILS, LATE], ids=["fails", "late"])
def test_error_in_the_middle_of_rows_is_that_of_stock_pymysql_and_the_connection_goes_on(
    mariadb_url, statement, cursorclass
):
    with connected(pymysql.connect, mariadb_url) as stock, connected(Connection, mariadb_url) as ours:
        for _ in range(2):
            got = read(ours, statement, cursorclass)
            assert got == read(stock, statement, cursorclass)
            assert isinstance(got[-1], str)
            if cursorclass is SSCursor:
                assert len(got[0]) > 1000  # what came before it has been fetched
            assert read(ours, "SELECT 7", Cursor) == [(1, [7], 1, 0)]
        ours.rollback()
        assert ours.settled


@pytest.mark.parametrize("cursorclass", [Cursor, SSCursor])
@pytest.mark.parametrize("how", ["silence", "cut", "killed"])
def test_connection_is_closed_when_it_is_lost_in_the_middle_of_rows(mariadb, mariadb_url, how, cursorclass):
    with (
        Proxy(mariadb.port) as proxy,
        connected(Connection, mariadb_url, port=proxy.port, read_timeout=0.5 if how == "silence" else 15) as ours,
    ):
        if how == "silence":
            got = read(ours, SLEEPS, cursorclass)
        else:
            cursor = ours.cursor(SSCursor)
            cursor.execute(SLEEPS)
            got = [[row[0] for row in cursor.fetchmany(5)]]
            if how == "cut":
                proxy.cut()
            else:
                with mariadb.root() as root:
                    root.execute(f"KILL {ours.thread_id()}")
            with pytest.raises(pymysql.OperationalError) as caught:
                while True:
                    got[0] += [row[0] for row in cursor.fetchmany(5)]
            got.append(str(caught.value))
            cursor.connection = None
        assert "Lost connection" in got[-1] or "killed" in got[-1]
        assert got[0] == list(range(1, len(got[0]) + 1)) or cursorclass is Cursor
        assert not ours.open or how == "killed"
        if how != "killed":
            with pytest.raises(pymysql.InterfaceError):
                ours.query("SELECT 1")


@pytest.mark.parametrize("cursorclass", [Cursor, SSCursor])
def test_results_of_several_statements_are_those_of_stock_pymysql(mariadb_url, cursorclass):
    several = [
        "SELECT seq FROM seq_1_to_2000; SELECT seq, 'a' FROM seq_1_to_2000; DO 1; SELECT 1/0; SELECT NULL",
        "SELECT seq FROM seq_1_to_2000; SELECT * FROM nothing; SELECT 1",
        f"SELECT 1; {FAILS}",
    ]
    more = {"client_flag": CLIENT.MULTI_STATEMENTS}
    with (
        connected(pymysql.connect, mariadb_url, **more) as stock,
        connected(Connection, mariadb_url, **more) as ours,
    ):
        for statement in several * 2:
            assert read(ours, statement, cursorclass) == read(stock, statement, cursorclass)


def test_local_file_is_loaded_between_rows(mariadb_url, tmp_path):
    (tmp_path / "rows").write_text("".join(f"{n}\ttext {n}\n" for n in range(5000)))
    with connected(Connection, mariadb_url, local_infile=True, autocommit=True) as ours:
        read(ours, "CREATE TABLE loaded (n INT, s TEXT)", Cursor)
        for cursorclass in (Cursor, SSCursor):
            with ours.cursor(cursorclass) as cursor:
                assert cursor.execute(f"LOAD DATA LOCAL INFILE '{tmp_path}/rows' INTO TABLE loaded") == 5000
        assert read(ours, "SELECT n FROM loaded ORDER BY n", SSCursor)[0][:2] == (10000, [4999])
        got = read(ours, f"LOAD DATA LOCAL INFILE '{tmp_path}/none' INTO TABLE loaded", Cursor)
        assert "No such file" in got[0] and read(ours, "SELECT 7", Cursor) == [(1, [7], 1, 0)]


def test_f09_connection_of_a_request_killed_in_the_middle_of_rows_gives_nobody_the_rest(mariadb_url):
    """By a converter of the user's that lets others run. The error is what was thrown, and the next request reads
    its own rows."""
    run_script(
        "patched",
        """
        import sys

        import gevent
        import pymysql
        from pymysql.constants import FIELD_TYPE
        from sqlalchemy import text

        class Boom(Exception):
            pass

        def number(digits):
            seen.append(int(digits))
            if victim is gevent.getcurrent() and len(seen) == 700:
                gevent.get_hub().loop.run_callback(victim.throw, thrown)
                gevent.sleep(10)
            return int(digits)

        def request(options):
            with manager.scope():
                for row in manager.get().execute(text("SELECT seq, 'x' FROM seq_1_to_3000"), execution_options=options):
                    read.append(row[0])

        conv = {**pymysql.converters.conversions, FIELD_TYPE.LONGLONG: number}
        entry = {"url": sys.argv[1], "options": {"pool_size": 1, "pool_timeout": 5, "connect_args": {"conv": conv}}}
        manager = dbsession.SessionManager({"default": entry})
        seen, victim = [], None
        gevent.get_hub().exception_stream = None
        for thrown in (gevent.GreenletExit, Boom, ValueError):
            for options in ({}, {"yield_per": 100}):
                with manager.scope():
                    first = manager.get().scalar(text("SELECT CONNECTION_ID()"))
                read, seen[:] = [], []
                victim = gevent.spawn(request, options)
                victim.join()
                ended = victim.value if thrown is gevent.GreenletExit else victim.exception
                assert isinstance(ended, thrown), (victim, ended)
                assert len(seen) == 700 and read == list(range(1, len(read) + 1)), (len(seen), len(read))
                assert (500 < len(read) < 700) if options else not read, len(read)
                with manager.scope():
                    same = manager.get().scalar(text("SELECT CONNECTION_ID()")) == first
                # Of a stream what is left is at hand, and read away before a rollback.
                assert not same or (options and thrown is not gevent.GreenletExit)
                read = []
                request(options)
                assert read == list(range(1, 3001))
        assert manager.engine("default").pool.checkedout() == 0
        manager.dispose()
        """,
        mariadb_url,
    )


@pytest.mark.parametrize("stream", [False, True], ids=["buffered", "streamed"])
@pytest.mark.parametrize("readonly", [False, True], ids=["", "readonly"])
def test_idle_connection_keeps_no_rows(mariadb_url, stream, readonly):
    entry = {"url": mariadb_url, "readonly": readonly}
    manager = SessionManager({"default": entry})
    try:
        with manager.scope():
            session = manager.get()
            options = {"yield_per": 100} if stream else {}
            session.execute(text("SELECT seq FROM seq_1_to_5000"), execution_options=options).all()
            driver = session.connection().connection.dbapi_connection
            if readonly:
                session.execute(text("SELECT seq FROM seq_1_to_5000")).all()
        assert driver.open and manager.engine("default").pool.checkedin() == 1
        gc.collect()
        kept = driver._result
        assert kept is None or not kept.rows
        assert len(driver._ahead) < 100  # the answer to a ROLLBACK
        with manager.scope():
            assert len(manager.get().execute(text("SELECT seq FROM seq_1_to_50")).all()) == 50
    finally:
        manager.dispose()
