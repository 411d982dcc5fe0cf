"""F20: COMMIT and ROLLBACK are left out by what we know, and not by a status bit, which proxies and compatible servers
do not set truly. A proxy that lies about the bits stands between, for both halves and each driver."""

from __future__ import annotations

import pytest
from sqlalchemy import text

from support.halves import done, entered
from support.proxy import Proxy

IN_TRANSACTION, AUTOCOMMIT = 1, 2
LIES = {
    "never in a transaction": {"clear": IN_TRANSACTION},
    "never in one, always autocommit": {"clear": IN_TRANSACTION, "set": AUTOCOMMIT},
    "never in one, never autocommit": {"clear": IN_TRANSACTION | AUTOCOMMIT},
    "always in one": {"set": IN_TRANSACTION},
}
SELDOM = {"never in one, never autocommit", "always in one"}
ALL_LIES = [pytest.param(each, marks=[pytest.mark.slow] if each in SELDOM else []) for each in LIES]
INSERT, ROWS = text("INSERT INTO t (n) VALUES (:n)"), text("SELECT n FROM t ORDER BY n")


@pytest.fixture
def stored(mariadb, mariadb_url):
    """What others see in the table `t`, on a connection of the server's own."""
    name = mariadb_url.rpartition("/")[2]
    with mariadb.root() as cursor:
        cursor.execute(f"USE {name}")
        cursor.execute("CREATE TABLE t (id INT AUTO_INCREMENT PRIMARY KEY, n INT) ENGINE=InnoDB")
        cursor.execute("CREATE PROCEDURE inserts(n INT) BEGIN INSERT INTO t (n) VALUES (n); SELECT 1; END")
        cursor.execute("SET autocommit = 1")

        def read():
            cursor.execute("SELECT n FROM t ORDER BY n")
            return [row["n"] for row in cursor.fetchall()]

        yield read


@pytest.fixture
def managed(half, driver, mariadb, mariadb_url):
    """Makes managers with a pool of one behind a proxy that tells `lie`."""
    managers, proxies = [], []

    def make(lie, **entry):
        proxies.append(Proxy(mariadb.port))
        proxies[-1].lie(**LIES[lie])
        url = mariadb_url.replace("pymysql", driver).replace(f":{mariadb.port}/", f":{proxies[-1].port}/")
        options = {"pool_size": 1, "pool_timeout": 20, **entry.pop("options", {})}
        managers.append(half.verbs.SessionManager({"default": {"url": url, "options": options, **entry}}))
        return managers[-1]

    yield make
    for proxy in proxies:
        proxy.close()


async def in_session(half, manager, work):
    """Run `work(session)`, written for a Session, in a scope of its own; return the scope."""
    async with entered(manager.scope()) as scope:
        session = manager.get()()
        await half.call(work, getattr(session, "sync_session", session))
    return scope


def insert_and_read(session):
    session.execute(INSERT, {"n": 1})
    session.execute(ROWS).all()


def update(session):
    session.execute(text("INSERT INTO t (n) VALUES (0)"))
    session.commit()
    session.execute(text("UPDATE t SET n = 1"))


def lock_then_write(session):
    session.execute(text("SELECT * FROM t FOR UPDATE")).all()
    session.execute(text("INSERT INTO t (n) SELECT 1"))
    session.execute(text("SELECT 1")).all()


def call(session):
    session.execute(text("CALL inserts(1)")).close()


def savepoint(session):
    with session.begin_nested():
        session.execute(INSERT, {"n": 1})
    session.execute(ROWS).all()


def raw_cursor(session):
    cursor = session.connection().connection.cursor()
    cursor.execute("INSERT INTO t (n) VALUES (1)")
    cursor.execute("SELECT 1")
    cursor.fetchall()
    cursor.close()


def stream(session):
    session.execute(INSERT, {"n": 1})
    session.execute(text("SELECT seq FROM seq_1_to_30"), execution_options={"stream_results": True}).all()


WORK = [insert_and_read, update, lock_then_write, call, savepoint, raw_cursor, stream]


@pytest.mark.parametrize("lie", ALL_LIES)
def test_f20_what_is_committed_is_stored_and_what_is_not_is_gone_whatever_the_server_says(half, managed, stored, lie):
    async def main():
        manager = managed(lie)

        for work in WORK:

            def commits(session, work=work):
                work(session)
                session.commit()

            def empties(session):
                session.execute(text("DELETE FROM t"))
                session.commit()

            scope = await in_session(half, manager, commits)
            assert (stored(), scope.outcome) == ([1], "committed"), work.__name__
            await in_session(half, manager, empties)
            scope = await in_session(half, manager, work)
            if work is not raw_cursor:
                assert scope.outcome in ("rolled back", "committed"), work.__name__
            await in_session(half, manager, lambda session: session.commit() or session.execute(ROWS).all())
            await in_session(half, manager, lambda session: (session.execute(ROWS).all(), session.commit()))
            assert stored() in ([], [0]), work.__name__
            await in_session(half, manager, empties)
        await done(manager.dispose())

    half.run(main)


BEGINS = [
    "START TRANSACTION",
    "begin",
    "/* now */ BEGIN",
    "/*! BEGIN */",
    "/*M!100100 START TRANSACTION */",
    "SET autocommit = 0",
    "SET @a = 1, SESSION autocommit = OFF",
    "CALL begins()",
    "EXECUTE IMMEDIATE 'SET autocommit = 0'",
    "BEGIN NOT ATOMIC START TRANSACTION; END",
]


@pytest.mark.parametrize(
    "lie", ["never in a transaction", pytest.param("never in one, always autocommit", marks=pytest.mark.slow)]
)
def test_f20_what_may_have_begun_a_transaction_in_autocommit_is_rolled_back(half, managed, stored, mariadb, lie):
    async def main():
        manager = managed(lie, options={"isolation_level": "AUTOCOMMIT"})
        await in_session(half, manager, lambda s: s.execute(text("CREATE PROCEDURE begins() START TRANSACTION")))
        for statement in BEGINS:

            def begins(session, statement=statement):
                session.connection().exec_driver_sql(statement)
                session.execute(INSERT, {"n": 7})
                session.execute(ROWS).all()

            await in_session(half, manager, begins)
            # A statement that commits whatever is open, by the connection's next user.
            await in_session(half, manager, lambda s: s.connection().exec_driver_sql("COMMIT"))
            assert stored() == [], statement
            await in_session(half, manager, lambda s: s.connection().exec_driver_sql("SET autocommit = 1"))
        await done(manager.dispose())

    half.run(main)


@pytest.mark.parametrize("lie", ["never in one, always autocommit", "never in one, never autocommit"])
def test_f20_autocommit_mode_is_set_whatever_the_server_says_of_it(half, managed, stored, lie):
    def aside(session):
        with session.get_bind().connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(INSERT, {"n": 1})
            assert stored() == [1]

    async def main():
        manager = managed(lie)
        await in_session(half, manager, aside)
        scope = await in_session(half, manager, insert_and_read)
        assert (stored(), scope.outcome) == ([1], "rolled back")
        await done(manager.dispose())

    half.run(main)
