"""Teardown itself is bounded: a server that does not answer the ROLLBACK costs a few seconds and one connection."""

from __future__ import annotations

from support.processes import run_python, run_script
from support.proxy import Proxy


def test_f13_teardown_of_two_sessions_on_a_silent_server_ends_within_its_bound(mode, mariadb, mariadb_url):
    with Proxy(mariadb.port) as proxy:
        run_script(
            mode,
            """
            import logging, sys, time
            from sqlalchemy import text
            from dbsession.core import teardown
            from support.proxy import ProxyControl
            teardown.BOUND_S = 1.0
            url, proxy = sys.argv[1], ProxyControl(int(sys.argv[2]))
            logged = []
            handler = logging.Handler()
            handler.emit = lambda record: logged.append(record.getMessage())
            logging.getLogger("dbsession.teardown").addHandler(handler)
            dbsession.configure({name: {"url": url, "read_timeout_s": 60} for name in "ab"})
            def request():
                with dbsession.session_scope("GET /slow"):
                    for name in "ab":
                        dbsession.get_dbsession(name).execute(text("SELECT * FROM t"))
                    proxy.stall()
                    started = time.monotonic()
                return time.monotonic() - started
            with dbsession.get_engine("a").begin() as connection:
                connection.execute(text("CREATE TABLE t (n INT) ENGINE=InnoDB"))
            took, = join(spawn(request), 30)
            proxy.resume()
            # One bound for all of them under gevent; by the sockets' timeouts, one for each answer.
            assert took < (2 if MODE != "threads" else 3) + 15, took  # and not read_timeout_s
            assert [checked_out(dbsession.get_engine(name)) for name in "ab"] == [0, 0]
            assert len(logged) == 2 and all("failed to close" in line for line in logged), logged
            for name in "ab":
                assert dbsession.get_dbsession(name).scalar(text("SELECT 2")) == 2
            """,
            mariadb_url.replace(f":{mariadb.port}/", f":{proxy.port}/"),
            proxy.control_port,
        )


def test_f13_close_of_the_users_own_is_bounded_as_teardown_is(mariadb_url):
    run_python(
        """
from gevent import monkey; monkey.patch_all()
import sys, dbsession
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
