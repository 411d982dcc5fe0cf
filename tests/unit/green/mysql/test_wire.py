"""dbsession.mysql.wire: what it reads and sends is what stock PyMySQL does, however the bytes come; and its timers."""

from __future__ import annotations

import socket
import ssl
import struct
import threading

import pymysql
import pytest
from pymysql.constants import CLIENT, CR

from dbsession.green.mysql.connection import Connection
from support.mariadb import connected, login
from support.processes import run_python
from support.proxy import Proxy
from support.readers import by_both

STATEMENTS = [
    "SELECT 1",
    "SELECT 1 AS n, 'text' AS s, NULL AS nothing, x'00ff' AS b, 1.5 AS d, CAST('2026-01-02' AS DATE) AS day, '' AS e",
    "SELECT seq, REPEAT('x', seq) FROM seq_1_to_20",
    "SELECT seq FROM seq_1_to_3 WHERE seq > 3",
    "SET @a = 1",
    "DO 0",
]
# Round what is read at once: 8 KiB, 64 KiB, 256 KiB, and the protocol's own limit of a packet.
LENGTHS = [
    *range(2**16 - 6, 2**16 + 2),
    8187,
    8188,
    8189,
    8192,
    8193,
    2**18 - 5,
    2**18,
    2**18 + 1,
    2**24 - 6,
    2**24 - 5,
    2**24 - 4,
    2**24,
]


def answer(connection, statement):
    with connection.cursor() as cursor:
        count = cursor.execute(statement)
        return count, cursor.description, cursor.fetchall(), cursor.rowcount


@by_both
@pytest.mark.parametrize("size", [None, 2, 50])
def test_answers_are_those_of_stock_pymysql_in_whatever_pieces_they_come(mariadb, mariadb_url, parser, size):
    with (
        Proxy(mariadb.port) as proxy,
        connected(pymysql.connect, mariadb_url) as stock,
        connected(Connection, mariadb_url, port=proxy.port) as ours,
    ):
        if size:
            proxy.dribble(size)
        for statement in STATEMENTS * 2:  # the second time the columns are known
            assert answer(ours, statement) == answer(stock, statement)
        with pytest.raises(pymysql.ProgrammingError):
            answer(ours, "SELECT * FROM nothing")
        assert answer(ours, "SELECT 2")[2] == ((2,),)
        ours.rollback()
        assert ours.settled


def test_error_that_comes_with_an_answer_is_raised(mariadb_url):
    with connected(Connection, mariadb_url, client_flag=CLIENT.MULTI_STATEMENTS) as connection:
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1; SELECT * FROM nothing")
            assert cursor.fetchall() == ((1,),)
            with pytest.raises(pymysql.ProgrammingError):
                cursor.nextset()
        assert answer(connection, "SELECT 2")[2] == ((2,),)


@by_both
@pytest.mark.parametrize("cursorclass", [pymysql.cursors.Cursor, pymysql.cursors.SSCursor])
def test_rows_of_any_length_are_read_whole(mariadb, mariadb_url, parser, cursorclass):
    with mariadb.root() as cursor:
        cursor.execute("SELECT @@global.max_allowed_packet AS bytes")
        before = cursor.fetchone()["bytes"]
        cursor.execute("SET GLOBAL max_allowed_packet = 64 * 1024 * 1024")
    try:
        with connected(Connection, mariadb_url, cursorclass=cursorclass, max_allowed_packet=2**26) as connection:
            for length in LENGTHS:
                with connection.cursor() as cursor:
                    cursor.execute(f"SELECT REPEAT('x', {length}), 'end' UNION ALL SELECT 'next', 'row'")
                    (first, end), second = cursor.fetchall()
                    assert (len(first), set(first), end, second) == (length, {"x"}, "end", ("next", "row"))
            sent = "y" * (2**24 + 10)
            with connection.cursor() as cursor:
                cursor.execute("SELECT LENGTH(%s), 1", (sent,))
                assert list(cursor.fetchall()) == [(len(sent), 1)]
    finally:
        with mariadb.root() as cursor:
            cursor.execute("SET GLOBAL max_allowed_packet = %s", (before,))


def test_a_columns_description_follows_its_table(mariadb_url):
    # autocommit: a transaction that has read the table would keep the ALTER waiting
    with (
        connected(Connection, mariadb_url, autocommit=True) as ours,
        connected(pymysql.connect, mariadb_url, autocommit=True) as stock,
    ):
        answer(ours, "CREATE TABLE t (c INT)")
        for change in ("TEXT", "BLOB", "DATETIME NOT NULL", "DECIMAL(9, 3)"):
            answer(ours, f"ALTER TABLE t MODIFY c {change}")
            assert answer(ours, "SELECT c, c AS d FROM t") == answer(stock, "SELECT c, c AS d FROM t")


def test_nothing_of_an_old_answer_is_left_when_it_connects_again(mariadb_url):
    with connected(Connection, mariadb_url, cursorclass=pymysql.cursors.SSCursor) as connection:
        cursor = connection.cursor()
        cursor.execute("SELECT seq FROM seq_1_to_5000")
        assert cursor.fetchone() == (1,)
        connection.close()
        connection.connect()
        with connection.cursor() as again:
            again.execute("SELECT 'new'")
            assert list(again.fetchall()) == [("new",)]


@pytest.mark.slow
def test_timers_end_what_waits_too_long_and_nothing_else(mariadb_url):
    """In a patched process the sockets have no timeout of their own."""
    run_python(
        """
        from gevent import monkey; monkey.patch_all()
        import sys, gevent, pymysql
        from dbsession.green.mysql.connection import Connection
        from support.mariadb import login
        def connect():
            return Connection(**login(sys.argv[1], read_timeout=1.5, write_timeout=1.5))
        def one(connection, statement):
            with connection.cursor() as cursor:
                cursor.execute(statement)
                return cursor.fetchone()[0]
        connection = connect()
        assert one(connection, "SELECT LENGTH('" + "x" * 15_000_000 + "')") == 15_000_000  # more than one send takes
        for _ in range(4):                        # longer together than one may take
            assert one(connection, "SELECT SLEEP(0.5)") == 0
        try:
            gevent.sleep(2)                       # no timer is left that would fire in here
            one(connection, "SELECT SLEEP(30)")
        except pymysql.OperationalError as error:
            assert error.args[0] == 2013 and "timed out" in error.args[1], error
            assert isinstance(error.__cause__, TimeoutError)
        else:
            raise AssertionError("waited for ever")
        assert connection.gave_up and not connection.open
        connection = connect()
        for level in (0.05, 30):                  # as a scope sets it, and back
            before = connection.read_within(level)
            try:
                one(connection, "SELECT SLEEP(2)")
                assert level == 30
            except pymysql.OperationalError:
                assert level == 0.05
                connection = connect()
        connection = connect()
        with gevent.Timeout(0.05, TimeoutError):  # somebody's own timeout goes on as it is
            try:
                one(connection, "SELECT SLEEP(20)")
                raise AssertionError("not ended")
            except TimeoutError as error:
                assert not isinstance(error, pymysql.Error)
        """,
        mariadb_url,
    )


def test_a_statement_makes_no_timer_and_looks_for_its_answer_once(mariadb_url):
    run_python(
        """
        from gevent import monkey; monkey.patch_all()
        import sys, gevent, gevent.socket
        from dbsession.green.mysql.connection import Connection
        from support.mariadb import login
        connection = Connection(**login(sys.argv[1]))
        other = Connection(**login(sys.argv[1], read_timeout=5))
        def one(connection):
            with connection.cursor() as cursor:
                cursor.execute("SELECT SLEEP(0.01)")
                return list((connection._timers or {}).values())
        assert one(connection) == [] and connection._read_timeout is None      # waits as long as it takes
        one(other)
        kept = one(other)
        assert len(kept) == 1 and not kept[0].active
        assert [one(other) for _ in range(3)] == [kept] * 3 and not kept[0].active
        for other._read_timeout in (4, 3, 5):
            one(other)
        assert len(other._timers) == 3 and other._timers[5] is kept[0]
        for other._read_timeout in range(20, 40):
            one(other)
        assert len(other._timers) < 8
        other._read_timeout = 21
        one(other)
        kept, waiting = other._timers[21], gevent.spawn(one, other)
        while not kept.active:
            gevent.sleep(0)
        other._force_close()                      # by somebody else than whoever waits
        waiting.join()
        assert waiting.exception is not None and not kept.active and other._timers is None
        other = Connection(**login(sys.argv[1], read_timeout=5))
        one(other)
        other.close()
        assert other._timers is None
        # The look that finds nothing, and its exception, are left out.
        looks, failed = [], []
        class Raw:
            def __init__(self, raw):
                self.raw = raw
            def recv_into(self, *arguments):
                looks.append(1)
                try:
                    return self.raw.recv_into(*arguments)
                except BlockingIOError:
                    failed.append(1)
                    raise
            def __getattr__(self, name):
                return getattr(self.raw, name)
        connection._sock._sock = Raw(connection._sock._sock)
        for _ in range(5):
            one(connection)
        assert looks and not failed, failed
        """,
        mariadb_url,
    )


def test_write_that_nobody_takes_is_ended(mariadb, mariadb_url):
    run_python(
        """
        from gevent import monkey; monkey.patch_all()
        import sys, gevent, pymysql
        from dbsession.green.mysql.connection import Connection
        from support.proxy import Proxy
        from support.mariadb import login
        with Proxy(login(sys.argv[1])["port"]) as proxy:
            connection = Connection(**login(sys.argv[1], port=proxy.port, read_timeout=30, write_timeout=0.5))
            proxy.stall("to_server")
            try:
                connection.query("SELECT '" + "x" * 15_000_000 + "'")
            except pymysql.OperationalError as error:
                assert error.args[0] == 2006 and "timed out" in error.args[1], error
            else:
                raise AssertionError("sent to nobody")
            assert not connection.open and connection.gave_up
        """,
        mariadb_url,
    )


def packet(number, body):
    return struct.pack("<I", len(body))[:3] + bytes([number]) + body


def test_nothing_that_came_before_the_tls_handshake_is_taken_for_what_came_through_it():
    """Whoever stands between may add packets to the greeting, which is not encrypted yet."""
    flags = 0xFFFFFFFF & ~0x01000020  # neither compression nor DEPRECATE_EOF
    greeting = b"\x0a5.7.0\0" + struct.pack("<I", 7) + b"12345678\0" + struct.pack("<HBH", flags & 0xFFFF, 45, 2)
    greeting += struct.pack("<HB", flags >> 16, 21) + bytes(10) + b"123456789012\0mysql_native_password\0"
    added = packet(3, b"\0\0\0\x02\0\0\0") + packet(1, b"\0\0\0\x02\0\0\0")
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(10)

    def serve():
        client, _ = listener.accept()
        with client:
            client.settimeout(10)
            client.sendall(packet(0, greeting) + added)
            client.recv(36)  # "TLS, please"
            client.recv(4096)

    server = threading.Thread(target=serve)
    server.start()
    account = {"host": "127.0.0.1", "port": listener.getsockname()[1], "user": "u", "password": "p"}
    with pytest.raises(pymysql.OperationalError) as caught:
        Connection(**account, connect_timeout=5, ssl=ssl._create_unverified_context())
    server.join()
    listener.close()
    # It is taken for a part of the handshake, of which it is none.
    assert "WRONG_VERSION_NUMBER" in str(caught.value), caught.value


def test_goodbye_that_came_with_the_last_answer_is_seen_by_the_next_look(mariadb_url):
    goodbye = packet(0, b"\xff" + struct.pack("<H", 1053) + b"#08S01shutdown")
    for use in (lambda c: c.ping(reconnect=False), lambda c: c.query("SELECT 1")):
        connection = Connection(**login(mariadb_url, ping_idle_s=60))
        connection.query("SELECT 1")
        connection._ahead, connection._at = goodbye, 0  # what one read has brought with the answer
        with pytest.raises(pymysql.OperationalError) as caught:
            use(connection)
        assert caught.value.args[0] in (CR.CR_SERVER_GONE_ERROR, CR.CR_SERVER_LOST) and not connection.open


@pytest.mark.parametrize(
    "use", [lambda c: c.query("SELECT 1"), Connection.ping, Connection.rollback, Connection.commit]
)
def test_answer_that_nobody_has_begun_to_read_is_nobody_elses(mariadb_url, use):
    """As after the handler of a signal, a time limit's say, that has raised between a question and its answer."""

    def interrupted(**_):
        raise KeyboardInterrupt

    with connected(Connection, mariadb_url) as connection:
        connection._read_query_result = interrupted
        with pytest.raises(KeyboardInterrupt):
            connection.query("SELECT 'somebody else''s'")
        del connection._read_query_result
        with pytest.raises(pymysql.OperationalError) as caught:
            use(connection)
        assert caught.value.args[0] == CR.CR_SERVER_LOST
        assert not connection.open and connection.gave_up and not connection.commit_sent


def test_timer_whose_start_was_interrupted_runs_no_more(mariadb_url):
    """As by the handler of a signal that raises; left alone, it would throw its TimeoutError again and again."""
    run_python(
        """
        from gevent import monkey; monkey.patch_all()
        import sys, gevent
        from types import SimpleNamespace
        from dbsession.green import hub
        from dbsession.green.mysql.connection import Connection
        from support.mariadb import login
        connection = Connection(**login(sys.argv[1]))
        made = []
        class Timer:
            def __init__(self, raw):
                self.raw = raw
            def again(self, *arguments, **more):
                self.raw.again(*arguments, **more)
                raise KeyboardInterrupt
            def __getattr__(self, name):
                return getattr(self.raw, name)
        def timer(*arguments, **more):
            made.append(Timer(loop.timer(*arguments, **more)))
            return made[0]
        loop = gevent.get_hub().loop
        here, hub.here = hub.here, lambda: SimpleNamespace(loop=SimpleNamespace(timer=timer))
        try:
            connection._in_time(30, int)
        except KeyboardInterrupt:
            pass
        hub.here = here
        assert made and not made[0].raw.active
        connection.close()
        """,
        mariadb_url,
    )


def test_closed_by_another_greenlet_is_a_lost_connection(mariadb, mariadb_url):
    run_python(
        """
        from gevent import monkey; monkey.patch_all()
        import sys, gevent, pymysql
        from dbsession.green.mysql.connection import Connection
        from support.proxy import Proxy
        from support.mariadb import login
        with Proxy(login(sys.argv[1])["port"]) as proxy:
            for statement, number in (("SELECT SLEEP(60)", 2013), ("SELECT '" + "x" * 15_000_000 + "'", 2006)):
                proxy.resume()
                connection = Connection(**login(sys.argv[1], port=proxy.port))
                proxy.stall("to_server")
                gevent.spawn_later(0.2, connection.close)
                try:
                    connection.query(statement)
                except pymysql.OperationalError as error:
                    assert error.args[0] == number, error
                else:
                    raise AssertionError("it was closed")
        """,
        mariadb_url,
    )
