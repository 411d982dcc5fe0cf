"""F11: a fork while a connection to PostgreSQL is being opened. The child has a copy of the greenlet that waits for the
server's greeting, and must not read it: it is the parent's."""

from __future__ import annotations

import pytest

from support.processes import run_script
from support.proxy import Proxy


@pytest.mark.parametrize("fork", ["os", pytest.param("C", marks=pytest.mark.slow)])
@pytest.mark.parametrize("driver", ["psycopg", pytest.param("psycopg2", marks=pytest.mark.slow)])
def test_f11_child_reads_nothing_of_a_connection_that_the_parent_opens(postgresql, postgresql_url, driver, fork):
    url = postgresql_url.replace("psycopg", driver, 1)
    with Proxy(postgresql.port) as proxy:
        run_script(
            "patched",
            """
import ctypes, os, sys
import gevent
from sqlalchemy import text
import dbsession
from support.proxy import ProxyControl
from support.waiting import wait_until

proxy = ProxyControl(int(sys.argv[2]))
proxy.stall("to_client")
dbsession.configure({"default": {"url": sys.argv[1], "connect_timeout_s": 60}})
session = dbsession.get_dbsession()

def use():
    with dbsession.session_scope():
        return session.scalar(text("SELECT 7"))

user = gevent.spawn(use)
wait_until(lambda: proxy.bytes_sent() and proxy.bytes_sent()[0], 20, "it has begun")
told, tell = os.pipe()
child = os.fork() if sys.argv[3] == "os" else ctypes.PyDLL(None).fork()
if child == 0:
    os.close(tell)
    user.join(20)            # it is over as the greeting comes
    os._exit(0 if user.ready() and not user.successful() else 1)
proxy.resume()
os.close(told)
assert os.waitpid(child, 0)[1] == 0       # the parent's hub stands still meanwhile
assert user.get(timeout=20) == 7
""",
            url.replace(f":{postgresql.port}/", f":{proxy.port}/"),
            proxy.control_port,
            fork,
        )
