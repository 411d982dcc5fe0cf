"""A hub that stood still for longer than a timeout: the time of its work is not counted as time of waiting."""

from __future__ import annotations

import pytest

from support.processes import run_python

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
        "hub.call_within(0.5, lambda: (gevent.spawn(b.send, b'y'), a.recv(1)))",
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
