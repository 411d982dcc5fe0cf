"""F18: a COMMIT whose answer never comes is neither a success nor a failure. Here it was carried out each time: the
proxy lets COMMIT through to the server, and holds the answer back."""

from __future__ import annotations

import contextlib

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError, OperationalError

from dbsession import CommitOutcomeUnknown, SessionManager
from dbsession.core.connection_info import COMMITTING
from support.processes import run_script
from support.proxy import Proxy
from support.waiting import wait_until

SCRIPT = """
    import sys, time
    import sqlalchemy.exc
    from sqlalchemy import text
    from support.proxy import ProxyControl
    from support.dialects import dialect_of
    db = dialect_of(sys.argv[1])
    url, proxy, direct = sys.argv[1], ProxyControl(int(sys.argv[2])), sys.argv[3]
    dbsession.configure({"default": {"url": url, "read_timeout_s": 2}, "direct": direct})
    session, engine = dbsession.get_dbsession(), dbsession.get_engine()
    with dbsession.get_engine("direct").begin() as connection:
        connection.execute(text("CREATE TABLE t (n INT)"))
    runs = []
    def unit(n, hold=True):
        runs.append(n)
        session.execute(text("INSERT INTO t VALUES (:n)"), {"n": n})
        if hold:
            proxy.stall("to_client")
    def rows():
        with dbsession.session_scope():
            return dbsession.get_dbsession("direct").scalars(text("SELECT n FROM t ORDER BY n")).all()
    def told(work):
        with dbsession.session_scope("GET /pay") as scope:
            try:
                work()
            except BaseException as error:
                return error, scope
            finally:
                wait_until(lambda: rows() == runs, 20, "the server to carry out COMMIT")
                proxy.resume()
"""


def run(mode, server, server_url, source):
    with Proxy(server.port) as proxy:
        through = server_url.replace(f":{server.port}/", f":{proxy.port}/")
        script = "\n".join(line[4:] for line in SCRIPT.splitlines()) + "\n" + source
        run_script(mode, script, through, proxy.control_port, server_url)


def test_f18_driver_error_at_commit_is_an_outcome_unknown_and_an_operational_error(mode, server, server_url):
    run(
        mode,
        server,
        server_url,
        """
def work():
    unit(1)
    session.commit()
error, scope = told(work)
assert isinstance(error, dbsession.CommitOutcomeUnknown), error
assert isinstance(error, sqlalchemy.exc.OperationalError) and db.is_lost(error), error
assert "may have been committed" in str(error) and str(error).endswith("[DBS-COMMIT-UNKNOWN]"), error
assert scope.outcome == "unknown" and scope.outcomes == {"default": "unknown"}
assert engine.pool.checkedout() == 0
assert session.scalar(text("SELECT count(*) FROM t")) == 1
""",
    )


@pytest.mark.slow
def test_f18_it_is_told_the_same_way_by_a_begin_block_and_by_core(server, server_url):
    run(
        "patched",
        server,
        server_url,
        """
def block():
    with session.begin():
        unit(1)
def core():
    with engine.begin() as connection:
        runs.append(2)
        connection.execute(text("INSERT INTO t VALUES (2)"))
        proxy.stall("to_client")
for work in (block, core):
    error, scope = told(work)
    assert isinstance(error, dbsession.CommitOutcomeUnknown), error
assert engine.pool.checkedout() == 0
""",
    )


def test_f18_unit_of_work_is_not_run_again_after_an_unknown_outcome(server, server_url):
    run(
        "patched",
        server,
        server_url,
        """
error, _ = told(lambda: dbsession.run_in_transaction(lambda: unit(1), attempts=5))
assert isinstance(error, dbsession.CommitOutcomeUnknown) and runs == [1], (error, runs)
""",
    )


@pytest.mark.parametrize("kill", ["gevent.GreenletExit()", "gevent.Timeout(1)", "Boom('mine')", "TimeoutError()"])
def test_f18_kill_at_commit_stays_what_it_is_with_a_note(server, server_url, kill):
    run(
        "patched",
        server,
        server_url,
        """
import gevent
class Boom(Exception): pass
kill = KILL
def work():
    unit(1)
    victim = gevent.getcurrent()
    def when_carried_out():
        wait_until(lambda: rows() == [1], 10)
        gevent.get_hub().loop.run_callback(victim.throw, kill)
    gevent.spawn(when_carried_out)
    session.commit()
dbsession.configure({"default": {"url": url, "read_timeout_s": 30}, "direct": direct})
engine = dbsession.get_engine()
error, scope = told(work)
assert error is kill, repr(error)
assert any("may have been committed" in note for note in error.__notes__), error.__notes__
assert scope.outcome == "unknown" and engine.pool.checkedout() == 0
""".replace("KILL", kill, 1),
    )


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_f18_definite_failure_at_commit_is_not_in_doubt(database, request, tmp_path):
    """A deferred constraint fails at COMMIT, and everybody knows that it was not done."""
    url = f"sqlite:///{tmp_path}/a.db" if database == "sqlite" else request.getfixturevalue("postgresql_url")
    manager = SessionManager({"default": url})
    with manager.engine().begin() as connection:
        connection.execute(text("CREATE TABLE p (id INTEGER PRIMARY KEY)"))
        connection.execute(text("CREATE TABLE c (p INTEGER REFERENCES p(id) DEFERRABLE INITIALLY DEFERRED)"))
    with manager.scope() as scope:
        session = manager.get()
        if database == "sqlite":
            session.execute(text("PRAGMA foreign_keys = ON"))
            session.commit()
        session.execute(text("INSERT INTO c VALUES (1)"))
        with pytest.raises(IntegrityError):
            session.commit()
    assert scope.outcome == "rolled back"
    manager.dispose()


@pytest.mark.slow
def test_f18_two_phase_commit_without_an_answer_is_an_outcome_unknown(server, server_url):
    direct = SessionManager({"default": server_url})
    with direct.engine().begin() as connection:
        connection.execute(text("CREATE TABLE t (n INT)"))
    with Proxy(server.port) as proxy:
        url = server_url.replace(f":{server.port}/", f":{proxy.port}/")
        manager = SessionManager({"default": {"url": url, "session": {"twophase": True}, "read_timeout_s": 3}})
        with manager.scope() as scope:
            manager.get().execute(text("INSERT INTO t VALUES (1)"))
            manager.get()().prepare()
            proxy.stall("to_client")
            with pytest.raises(CommitOutcomeUnknown):
                manager.get().commit()
            proxy.resume()
        assert scope.outcome == "unknown"
        manager.dispose()

    def stored():
        with direct.engine().connect() as connection:
            return connection.scalar(text("SELECT COUNT(*) FROM t")) == 1

    wait_until(stored, 20)
    direct.dispose()


@pytest.mark.parametrize("answer", ["DO 0", "SIGNAL SQLSTATE '45000'"])
def test_f18_commit_is_under_way_until_its_answer_is_judged_and_no_longer(managed, monkeypatch, answer):
    """Else an error in the next transaction on that Connection, of a fetch say, would leave a commit in doubt."""
    with managed().engine().connect() as connection:
        connection.execute(text("SELECT 1"))
        driver = connection.connection.dbapi_connection
        monkeypatch.setattr(driver, "commit", lambda: driver.query(answer))
        with contextlib.suppress(OperationalError):
            connection.commit()
        assert connection.info and COMMITTING not in connection.info
