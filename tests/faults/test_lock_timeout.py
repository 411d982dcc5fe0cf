"""F23: a lock wait timeout (1205), which is MariaDB's NOWAIT, too, undoes its statement only, so that a transaction in
which it was caught goes on; unless the server runs with innodb_rollback_on_timeout=ON. On PostgreSQL (55P03) one goes
on whose savepoint is rolled back to."""

from __future__ import annotations

import contextlib
import re
from functools import partial

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, OperationalError

from dbsession import CommitOutcomeUnknown, RollbackRequired
from dbsession.core.backends.mysql import MySQL
from support.dialects import dialect_of
from support.drivers import EVERY_DRIVER, every_driver
from support.halves import done, entered
from support.mariadb import MariaDBServer
from support.proxy import Proxy

QUESTION = b"innodb_rollback_on_timeout"


@pytest.fixture(scope="module")
def undoing():
    server = MariaDBServer("--innodb-rollback-on-timeout=1")
    yield server
    server.close()


class Bench:
    """A table whose row 1 somebody else has locked, and a manager with a pool of one behind a proxy."""

    def __init__(self, server, half, driver, proxy, cursor):
        self.half, self.proxy, self._cursor = half, proxy, cursor
        self.words = server.dialect
        url = server.url("jobs", port=proxy.port, driver=driver)
        options = {"pool_size": 1, "pool_timeout": 20}
        self.manager = half.verbs.SessionManager({"default": {"url": url, "read_timeout_s": 10, "options": options}})

    def stored(self):
        self._cursor.execute("SELECT n FROM jobs WHERE id > 2 ORDER BY id")
        return [row["n"] for row in self._cursor.fetchall()]

    async def scope(self, work):
        async with entered(self.manager.scope()) as scope:
            session = self.manager.get()()
            await self.half.call(work, getattr(session, "sync_session", session))
        return scope

    def asked(self):
        numbers = range(len(self.proxy.connections()))
        return sum(len(re.findall(QUESTION, self.proxy.sent(number))) for number in numbers)

    def run(self, main):
        async def whole():
            await main()
            await done(self.manager.dispose())

        self.half.run(whole)


@contextlib.contextmanager
def bench_on(server, half, driver):
    server.create_database("jobs")
    with Proxy(server.port) as proxy, server.root("jobs") as cursor, server.root("jobs") as other:
        cursor.execute("CREATE TABLE jobs (id INT PRIMARY KEY, n INT)")
        cursor.execute("INSERT INTO jobs VALUES (1, 1), (2, 2)")
        other.execute("BEGIN")
        other.execute("SELECT * FROM jobs WHERE id = 1 FOR UPDATE")
        yield Bench(server, half, driver, proxy, cursor)
    server.drop_database("jobs")


@pytest.fixture
def bench(drivers_server, half, driver):
    drivers_server.ensure_running()
    with bench_on(drivers_server, half, driver) as bench:
        yield bench


@contextlib.contextmanager
def finds_it_locked(session):
    """The block fails since somebody else has the lock."""
    words = dialect_of(session.get_bind().dialect.name)
    with pytest.raises(DBAPIError) as raised:
        yield
    assert words.code(raised.value) in (words.LOCKED, 3572)


def insert(session, number):
    session.execute(text("INSERT INTO jobs VALUES (:n, :n)"), {"n": number})


def nowait(session):
    session.execute(text("SELECT * FROM jobs WHERE id = 1 FOR UPDATE NOWAIT"))


def wait_a_moment(session):
    is_mysql = session.get_bind().dialect.name == "mysql"
    setting = "SESSION innodb_lock_wait_timeout = 0" if is_mysql else "LOCAL lock_timeout = 1"
    session.execute(text(f"SET {setting}"))
    session.execute(text("UPDATE jobs SET n = 0"))


def another_drivers_nowait(session):
    """MySQL 8 has a number of its own for it."""
    session.execute(text("SIGNAL SQLSTATE 'HY000' SET MYSQL_ERRNO = 3572, MESSAGE_TEXT = 'NOWAIT is set'"))


def fails(session, fail, nested):
    insert(session, 3)
    with finds_it_locked(session):
        if nested:
            with session.begin_nested():
                insert(session, 4)
                fail(session)
        else:
            fail(session)
    insert(session, 5)


@EVERY_DRIVER
def test_f23_transaction_goes_on_and_commits_when_a_lock_timeout_was_caught(bench, drivers_server):
    on_mariadb = isinstance(drivers_server, MariaDBServer)

    async def main():
        for fail in [nowait, wait_a_moment] + [another_drivers_nowait] * on_mariadb:
            for nested in [True] + [False] * on_mariadb:

                def work(session, fail=fail, nested=nested):
                    fails(session, fail, nested)
                    session.commit()

                def empty(session):
                    session.execute(text("DELETE FROM jobs WHERE id > 2"))
                    session.commit()

                scope = await bench.scope(work)
                assert (bench.stored(), scope.outcome) == ([3, 5], "committed"), (fail, nested)
                await bench.scope(empty)

    bench.run(main)


def test_f23_commit_right_after_a_lock_timeout_that_was_caught_stores_the_rest(bench):
    def work(session):
        insert(session, 3)
        with pytest.raises(OperationalError, match="1205"):
            nowait(session)
        session.commit()  # which asks the server first

    async def main():
        scope = await bench.scope(work)
        assert (bench.stored(), scope.outcome) == ([3], "committed")

    bench.run(main)


def test_f23_server_is_asked_once_for_a_connection_and_not_when_the_error_is_not_caught(bench):
    def twice(session):
        for _ in range(2):
            with pytest.raises(OperationalError, match="1205"), session.begin_nested():
                nowait(session)
        session.commit()

    async def main():
        for _ in range(2):
            with pytest.raises(OperationalError, match="1205"):
                await bench.scope(nowait)
        assert bench.asked() == 0
        for _ in range(2):
            await bench.scope(twice)
        assert bench.asked() == 1

    bench.run(main)


@EVERY_DRIVER
def test_f23_uncaught_lock_timeout_runs_the_unit_again(bench):
    runs = []

    def sync_work(session):
        runs.append(1)
        insert(session, 3)
        if len(runs) < 3:
            nowait(session)

    async def main():
        async def work():
            session = bench.manager.get()()
            await bench.half.call(sync_work, getattr(session, "sync_session", session))

        def plain():
            sync_work(bench.manager.get())

        unit = work if bench.half.name == "aio" else plain
        await done(bench.manager.run_in_transaction(unit, attempts=3, backoff_s=0.001))
        assert len(runs) == 3 and bench.stored() == [3] and bench.asked() == 0

    bench.run(main)


def refused(bench, nested):
    code = str(bench.words.LOCKED)

    def work(session):
        insert(session, 3)
        with finds_it_locked(session):
            if nested:
                with session.begin_nested():
                    insert(session, 4)
                    nowait(session)
            else:
                nowait(session)
        with pytest.raises(RollbackRequired, match=code):
            insert(session, 5)
        with pytest.raises(RollbackRequired, match=code):
            session.commit()
        session.rollback()
        insert(session, 6)
        session.commit()

    async def main():
        await bench.scope(work)
        assert bench.stored() == [6]

    bench.run(main)


@every_driver("postgresql")
def test_f23_transaction_is_refused_when_nothing_but_a_savepoint_would_let_it_go_on(bench):
    refused(bench, nested=False)


@pytest.mark.slow
@pytest.mark.parametrize("nested", [True, False])
def test_f23_transaction_is_refused_when_the_server_rolls_all_of_it_back(undoing, half, driver, nested):
    with bench_on(undoing, half, driver) as bench:
        refused(bench, nested)


@pytest.mark.parametrize("question", ["SELECT 1", "SELECT @@no_such_variable"], ids=["on", "unknown"])
def test_f23_transaction_is_refused_when_the_server_says_so_or_does_not_tell(bench, question, monkeypatch):
    ask = MySQL._ask
    monkeypatch.setattr(MySQL, "_ask", lambda self, connection, _: ask(self, connection, question))
    refused(bench, nested=True)


@pytest.mark.slow
def test_f23_silence_while_the_server_is_asked_leaves_nothing_in_doubt(bench):
    def work(session):
        insert(session, 3)
        with pytest.raises(OperationalError, match="1205"):
            nowait(session)
        bench.proxy.stall("to_client")
        with pytest.raises(OperationalError) as raised:
            session.commit()
        assert not isinstance(raised.value, CommitOutcomeUnknown) and raised.value.connection_invalidated
        bench.proxy.resume()

    async def main():
        scope = await bench.scope(work)
        assert (bench.stored(), scope.outcome) == ([], "rolled back")
        assert bench.manager.engine().pool.checkedout() == 0

    bench.run(main)


def test_f23_error_that_undoes_the_whole_transaction_is_never_asked_about(bench):
    def work(session, code):
        insert(session, 3)
        with pytest.raises(OperationalError, match=str(code)):
            session.execute(text(f"SIGNAL SQLSTATE '40001' SET MYSQL_ERRNO = {code}, MESSAGE_TEXT = 'gone'"))
        with pytest.raises(RollbackRequired, match=str(code)):
            session.commit()

    async def main():
        for code in (1206, 1213, 1020):
            await bench.scope(partial(work, code=code))
        assert bench.stored() == [] and bench.asked() == 0

    bench.run(main)
