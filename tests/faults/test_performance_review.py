"""What an independent reading of the faster paths found; each test was seen to fail on the code before its fix."""

from __future__ import annotations

import socket
import ssl
import struct
import threading

import pymysql
import pytest
from pymysql.constants import CR
from sqlalchemy import Integer, TypeDecorator, literal, select, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import OperationalError, StatementError

from dbsession import RollbackRequired
from dbsession.green.mysql.connection import Connection
from support.processes import run_python

DEADLOCK = text("SIGNAL SQLSTATE '40001' SET MYSQL_ERRNO = 1213, MESSAGE_TEXT = 'deadlock'")


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
    login = {"host": "127.0.0.1", "port": listener.getsockname()[1], "user": "u", "password": "p"}
    with pytest.raises(pymysql.OperationalError) as caught:
        Connection(**login, connect_timeout=5, ssl=ssl._create_unverified_context())
    server.join()
    listener.close()
    # It is taken for a part of the handshake, of which it is none.
    assert "WRONG_VERSION_NUMBER" in str(caught.value), caught.value


STALLED = """
from gevent import monkey; monkey.patch_all()
import sys, time, gevent
from dbsession.green import hub
def stall(seconds):
    "Work that never waits, and so holds up the loop."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass
"""


def test_an_answer_that_came_while_the_hub_stood_still_is_not_a_timeout(mariadb_url):
    run_python(
        STALLED
        + """
from sqlalchemy.engine import make_url
from dbsession.green.mysql.connection import Connection
url = make_url(sys.argv[1])
connection = Connection(host=url.host, port=url.port, user=url.username, password=url.password, read_timeout=0.3)
def ask():
    with connection.cursor() as cursor:
        cursor.execute("SELECT SLEEP(0.1)")
        return cursor.fetchone()
asked = gevent.spawn(ask)
gevent.sleep(0)
stall(0.8)
from gevent.monkey import get_original
assert get_original("select", "select")([connection._sock.fileno()], [], [], 20)[0]  # the server may be late, too
assert asked.get(timeout=10) == (0,)
""",
        mariadb_url,
    )


@pytest.mark.parametrize(
    "wait",
    [
        "with hub.Bound(0.5): gevent.spawn(b.send, b'y'); a.recv(1)",
        "waiter = hub.Waiter(); gevent.spawn(lambda: (a.recv(1), waiter.wake())); gevent.spawn(b.send, b'y')\n"
        "assert waiter.wait(0.5)",
    ],
)
def test_time_begins_with_the_wait_and_not_with_the_last_pass_of_the_loop(wait):
    # Woken by a socket: the loop's other timers would be as early as the one in question.
    start = """
import socket
a, b = socket.socketpair()
gevent.spawn(b.send, b"x")
a.recv(1)
stall(0.7)
"""
    run_python(STALLED + start + wait)


def test_goodbye_that_came_with_the_last_answer_is_seen_by_the_next_look(mariadb_url):
    parts = make_url(mariadb_url)
    login = {"host": "127.0.0.1", "port": parts.port, "user": parts.username, "password": parts.password}
    goodbye = packet(0, b"\xff" + struct.pack("<H", 1053) + b"#08S01shutdown")
    for use in (lambda c: c.ping(reconnect=False), lambda c: c.query("SELECT 1")):
        connection = Connection(**login, ping_idle_s=60)
        connection.query("SELECT 1")
        connection._ahead, connection._at = goodbye, 0  # what one read has brought with the answer
        with pytest.raises(pymysql.OperationalError) as caught:
            use(connection)
        assert caught.value.args[0] in (CR.CR_SERVER_GONE_ERROR, CR.CR_SERVER_LOST) and not connection.open


class Picky(TypeDecorator):
    impl = Integer
    cache_ok = True

    def process_bind_param(self, value, dialect):
        raise ValueError("not a number")


@pytest.fixture
def stock(managed, mariadb_url):
    """A manager whose connections are PyMySQL's own."""
    parts = make_url(mariadb_url)
    login = {"host": "127.0.0.1", "port": parts.port, "user": parts.username, "password": parts.password}
    return managed(options={"creator": lambda: pymysql.connect(database=parts.database, **login)})


def test_f3_errors_on_a_driver_that_is_not_ours_arrive_as_they_are(stock):
    with stock.engine().connect() as connection, pytest.raises(StatementError, match="not a number"):
        connection.execute(select(literal(1, Picky)))
    with stock.engine().connect() as connection:
        with pytest.raises(OperationalError):
            connection.execute(DEADLOCK)
        with pytest.raises(RollbackRequired):
            connection.execute(text("SELECT 1"))
        assert not connection.invalidated
        connection.rollback()
        assert connection.scalar(text("SELECT 1")) == 1


def test_f3_a_timeout_thrown_into_a_driver_that_is_not_ours_discards_its_connection(mariadb_url):
    run_python(
        STALLED
        + """
import dbsession, pymysql
from sqlalchemy import text
from sqlalchemy.engine import make_url
class Mine(Exception): pass
url = make_url(sys.argv[1])
login = dict(host=url.host, port=url.port, user=url.username, password=url.password)
dbsession.configure({"default": {"url": url, "options": {"creator": lambda: pymysql.connect(**login), "pool_size": 1}}})
engine = dbsession.get_engine()
with engine.connect() as connection:
    try:
        with gevent.Timeout(0.2, Mine):
            connection.execute(text("SELECT SLEEP(30)"))
    except Mine:
        assert connection.invalidated
    else:
        raise AssertionError("not ended")
with engine.connect() as connection:
    assert connection.scalar(text("SELECT 'own'")) == "own"
""",
        mariadb_url,
    )


class OwnStream(pymysql.cursors.SSCursor):
    pass


def test_connection_goes_on_after_a_rollback_over_a_stream_of_the_users_own_cursor_class(managed):
    manager = managed(options={"connect_args": {"cursorclass": OwnStream}})
    with manager.engine().connect() as connection:
        result = connection.execute(text("SELECT seq FROM seq_1_to_100000"))
        assert result.fetchone() == (1,)
        connection.rollback()
        assert connection.execute(text("SELECT 'after'")).fetchall() == [("after",)]


def test_close_of_the_users_own_is_bounded_as_teardown_is(mariadb_url):
    run_python(
        STALLED
        + """
import dbsession
from dbsession.core import teardown
from dbsession.green.mysql.connection import Connection
from sqlalchemy import text
dbsession.configure({"default": {"url": sys.argv[1], "read_timeout_s": 60, "options": {"pool_size": 1}}})
dbsession.get_engine().connect().close()  # SQLAlchemy's own first questions have their own rollbacks
seen, rollback = [], Connection.rollback
Connection.rollback = lambda self: (seen.append(self._read_timeout), rollback(self))
for end in ("close", "reset", "invalidate"):
    with dbsession.session_scope():
        session = dbsession.get_dbsession()()
        session.execute(text("SELECT * FROM seq_1_to_2"))
        getattr(session, end)()
        assert dbsession.get_dbsession().connection().connection.dbapi_connection._read_timeout == 60
assert set(seen) == {teardown.BOUND_S}, seen
""",
        mariadb_url,
    )


def test_commit_of_a_doomed_two_phase_transaction_says_so_and_ends_it(managed):
    engine = managed().engine()
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE doomed (n INT) ENGINE=InnoDB"))
    with engine.connect() as connection:
        transaction = connection.begin_twophase()
        connection.execute(text("INSERT INTO doomed VALUES (1)"))
        with pytest.raises(OperationalError):
            connection.execute(DEADLOCK)
        with pytest.raises(RollbackRequired):
            transaction.commit()
    with engine.connect() as connection:
        assert connection.execute(text("XA RECOVER")).fetchall() == []
        assert connection.scalar(text("SELECT COUNT(*) FROM doomed")) == 0
