"""F30: what its user has set on a connection is taken back as it returns, also with reset="rollback", where a statement
or an answer of the server's has shown it; and what listeners and options of the user's have set up stays. F31: a
connection in autocommit is known as one, however it came to it."""

from __future__ import annotations

import pytest
from sqlalchemy import event, exc, make_url, text

from dbsession import UnsavedWork
from support.dialects import dialect_of
from support.drivers import EVERY_DRIVER
from support.halves import done, entered, sync
from support.mariadb import MariaDBServer
from support.postgresql import PostgreSQLServer

INSERT = text("INSERT INTO t (n) VALUES (:n)")
STATE = text(
    "SELECT CONVERT(CONCAT_WS('|', COALESCE(@a, 'none'), @@autocommit, @@tx_isolation, @@tx_read_only, @@sql_mode,"
    " @@time_zone, @@foreign_key_checks, @@character_set_client, @@character_set_results, @@collation_connection,"
    " @@completion_type, COALESCE(DATABASE(), 'none'), COALESCE(CURRENT_ROLE(), 'none'),"
    " COALESCE(IS_USED_LOCK('mine'), 'free')) USING utf8mb4)"
)
CHANGES = {
    "autocommit": ["SET autocommit = 1"],
    "autocommit, otherwise": ["/* mine */ set @@session.autocommit:=ON"],
    "autocommit, among others": ["SET @a = 1, SESSION autocommit = 1"],
    "autocommit, hidden": ["/*!50000 SET autocommit = 1 */"],
    "autocommit, at once": ["EXECUTE IMMEDIATE 'SET autocommit = 1'"],
    "autocommit, by a procedure": ["CALL sets_autocommit()"],
    "read only": ["SET SESSION TRANSACTION READ ONLY"],
    "lock": ["LOCK TABLES t READ"],
    "lock of all": ["FLUSH TABLES t WITH READ LOCK"],
    "isolation": ["SET SESSION TRANSACTION ISOLATION LEVEL READ UNCOMMITTED"],
    "charset": ["SET NAMES latin1"],
    "mode": ["SET sql_mode = ''", "SET foreign_key_checks = 0", "SET time_zone = '+05:00'"],
    "variable": ["SET @a = 'alice'"],
    "variable, read into": ["SELECT 'alice' INTO @a"],
    "variable, on the way": ["SELECT @a := 'alice'"],
    "named lock": ["SELECT GET_LOCK('mine', 0)"],
    "temporary table": ["CREATE TEMPORARY TABLE t (n INT PRIMARY KEY, other INT NOT NULL)"],
    "database": ["USE information_schema"],
    "role": ["SET ROLE dbs_role"],
    "chain": ["SET completion_type = 'CHAIN'"],
    "handler": ["HANDLER t OPEN"],
    "compound": ["BEGIN NOT ATOMIC SET @a = 'alice'; END"],
}
# Which no reset takes back; asyncpg's own prepared statements would be gone with the user's.
REPLACED = {"mariadb": {"role"}, "asyncpg": {"prepared"}}
POSTGRESQL_STATE = text(
    "SELECT concat_ws('|', coalesce(nullif(current_setting('app.who', true), ''), 'nobody'), current_user,"
    " current_setting('timezone'), current_setting('search_path'), current_setting('statement_timeout'),"
    " current_setting('default_transaction_isolation'), current_setting('default_transaction_read_only'),"
    " (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()),"
    " (SELECT count(*) FROM pg_listening_channels()),"
    " (SELECT count(*) FROM pg_prepared_statements WHERE name = 'mine'),"
    " (SELECT count(*) FROM pg_cursors WHERE is_holdable))"
)
POSTGRESQL_CHANGES = {
    "setting": ["SET timezone = '+05'", "SET statement_timeout = '7s'"],
    "setting, otherwise": ["/* mine */ set session timezone to '+05'"],
    "setting, by a function": ["SELECT set_config('app.who', 'alice', false)"],
    "setting, in a block": ["DO $$ BEGIN SET timezone = '+05'; END $$"],
    "path": ["SET search_path = pg_catalog"],
    "role": ["SET ROLE other"],
    "read only": ["SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY"],
    "isolation": ["SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL SERIALIZABLE"],
    "lock": ["SELECT pg_advisory_lock(1)"],
    "lock, if it is free": ["SELECT pg_try_advisory_lock(1)"],
    "temporary table": ["CREATE TEMPORARY TABLE t (n INT PRIMARY KEY, other INT NOT NULL)"],
    "temporary table, by a query": ["SELECT 1 AS n INTO TEMPORARY t"],
    "temporary table, by its schema": ["CREATE TABLE pg_temp.t (n INT, other INT NOT NULL)"],
    "notifications": ["LISTEN mine"],
    "prepared": ["PREPARE mine AS SELECT 1"],
    "cursor": ["DECLARE mine CURSOR WITH HOLD FOR SELECT 1"],
}


class Bench:
    def __init__(self, half, url, cursor):
        self.half, self._url, self._cursor = half, url, cursor
        self.name, self.words = url.rpartition("/")[2], dialect_of(url)
        self.state_of_all = STATE if url.startswith("mysql") else POSTGRESQL_STATE
        self.manager = None

    def managed(self, **entry):
        options = {"pool_size": 1, "pool_timeout": 20, **entry.pop("options", {})}
        self.manager = self.half.verbs.SessionManager({"default": {"url": self._url, "options": options, **entry}})
        return self.manager

    def questions(self):
        self._cursor.execute("SHOW GLOBAL STATUS LIKE 'Questions'")
        return int(self._cursor.fetchone()["Value"])

    def stored(self):
        self._cursor.execute("SELECT n FROM t ORDER BY n")
        return [row["n"] for row in self._cursor.fetchall()]

    async def scope(self, work):
        async with entered(self.manager.scope()) as scope:
            session = self.manager.get()()
            await self.half.call(work, getattr(session, "sync_session", session))
        return scope

    async def state(self):
        found = []
        await self.scope(lambda s: found.extend(s.execute(text(f"SELECT {self.words.who}")).one()))
        await self.scope(lambda s: found.append(s.scalar(self.state_of_all)))
        return found

    async def leaves_nothing(self):
        """The next user's work is thrown away if it is not committed, and stored if it is."""
        scope = await self.scope(lambda s: s.execute(INSERT, {"n": 100}))
        assert (self.stored(), scope.outcome) == ([], "rolled back")
        scope = await self.scope(lambda s: (s.execute(INSERT, {"n": 200}), s.commit()))
        assert (self.stored(), scope.outcome) == ([200], "committed")
        await self.scope(lambda s: (s.execute(text("DELETE FROM t")), s.commit()))

    def run(self, main):
        async def whole():
            try:
                await main()
            finally:
                await done(self.manager.dispose())

        self.half.run(whole)


@pytest.fixture
def bench(half, drivers_server, drivers_url):
    with drivers_server.root(make_url(drivers_url).database) as cursor:
        cursor.execute(f"CREATE TABLE t (id {drivers_server.dialect.serial}, n INT)")
        if isinstance(drivers_server, PostgreSQLServer):
            cursor.execute("GRANT ALL ON t TO other")
            yield Bench(half, drivers_url, cursor)
            return
        cursor.execute("CREATE PROCEDURE sets_autocommit() SET autocommit = 1")
        cursor.execute("CREATE PROCEDURE reads_only() SET SESSION TRANSACTION READ ONLY")
        cursor.execute("CREATE OR REPLACE ROLE dbs_role")
        cursor.execute("SELECT CONCAT(\"'\", user, \"'@'\", host, \"'\") AS name FROM mysql.user WHERE user = 'app'")
        app = cursor.fetchone()["name"]
        cursor.execute(f"GRANT dbs_role TO {app}")
        cursor.execute(f"GRANT RELOAD ON *.* TO {app}")
        try:
            yield Bench(half, drivers_url, cursor)
        finally:  # the account is every test's
            cursor.execute(f"REVOKE RELOAD ON *.* FROM {app}")
            cursor.execute("DROP ROLE dbs_role")


def execute(session, statements):
    for statement in statements:
        result = session.execute(text(statement.replace(":=", r"\:=")))
        if result.returns_rows:
            result.all()


def by_raw_cursor(session, statements):
    cursor = session.connection().connection.cursor()
    for statement in statements:
        cursor.execute(statement)
    cursor.close()


@EVERY_DRIVER
@pytest.mark.parametrize("way", [execute, pytest.param(by_raw_cursor, marks=pytest.mark.slow)])
def test_f30_what_a_user_has_set_does_not_reach_the_next_one(bench, way, driver, drivers_server):
    on_mariadb = isinstance(drivers_server, MariaDBServer)
    changes = CHANGES if on_mariadb else POSTGRESQL_CHANGES
    replaced = REPLACED.get("mariadb" if on_mariadb else driver, ())

    def changed(session, statements):
        way(session, statements)
        if not on_mariadb:  # else most of it would be rolled back
            session.commit()

    async def main():
        bench.managed()
        fresh = await bench.state()
        for change, statements in changes.items():
            await bench.scope(lambda s, statements=statements: changed(s, statements))
            number, state = await bench.state()
            assert (number == fresh[0], state) == (change not in replaced, fresh[1]), change
            fresh[0] = number
            await bench.leaves_nothing()

    bench.run(main)


async def release(bench):
    await done(bench.manager.release())


@pytest.mark.parametrize("how", ["SET autocommit = 1", "CALL sets_autocommit()"])
def test_f30_outcome_and_release_know_of_autocommit_in_the_same_scope(bench, how):
    async def main():
        manager = bench.managed()
        async with entered(manager.scope()) as scope:
            session = manager.get()
            await done(session.execute(INSERT, {"n": 1}))
            with pytest.raises(UnsavedWork):
                await release(bench)
            await done(session.execute(text(how)))
            await done(session.execute(INSERT, {"n": 2}))
            if how.startswith("SET"):
                await release(bench)
            else:
                await done(session.rollback())
        assert (bench.stored(), scope.outcome) == ([1, 2], None)
        async with entered(manager.scope()) as scope:
            session = manager.get()
            for statement in (how, "SET autocommit = 0"):
                await done(session.execute(text(statement)))
            await done(session.execute(INSERT, {"n": 3}))
            with pytest.raises(UnsavedWork):
                await release(bench)
        assert bench.stored() == [1, 2]
        async with entered(manager.scope()) as scope:
            session = manager.get()
            await done(session.execute(INSERT, {"n": 4}))
            for statement in (how, "SET autocommit = 0"):
                await done(session.execute(text(statement)))
        assert bench.stored() == [1, 2, 4] and (scope.outcome is None or not how.startswith("SET"))
        await bench.scope(lambda s: (s.execute(text("DELETE FROM t")), s.commit()))
        await bench.leaves_nothing()

    bench.run(main)


def test_f30_what_a_statement_has_committed_is_not_called_rolled_back(bench):
    async def main():
        bench.managed()
        stored = []
        for first in ("BEGIN", "CREATE TABLE other (n INT)", "LOCK TABLES t WRITE", "COMMIT"):
            stored.append(len(stored))
            values = {"n": stored[-1]}
            scope = await bench.scope(lambda s, v=values, f=first: (s.execute(INSERT, v), s.execute(text(f))))
            assert (bench.stored(), scope.outcome) == (stored, None), first

    bench.run(main)


@pytest.mark.parametrize("reset", ["rollback", "connection"])
def test_f30_what_listeners_and_options_have_set_stays(bench, driver, reset):
    if reset == "connection" and driver != "pymysql":
        pytest.skip("reset is PyMySQL's")
    calls = []

    def connected(connection, record):
        cursor = connection.cursor()
        cursor.execute("SET time_zone = '+03:00', lock_wait_timeout = 77")
        cursor.execute("SET @here = 'connect'")
        cursor.close()

    def checked_out(connection, record, proxy):
        calls.append(1)
        cursor = connection.cursor()
        cursor.execute(f"SET @mine = '{len(calls)}'")
        cursor.execute("SET SESSION max_statement_time = 33")
        cursor.close()

    def only_once(connection, record, proxy):
        if "once" not in record.info:
            record.info["once"] = True
            cursor = connection.cursor()
            cursor.execute("SET sql_mode = 'ANSI'")
            cursor.close()

    state = text(
        "SELECT CONCAT_WS('|', @@time_zone, @@lock_wait_timeout, @here, @mine, @@max_statement_time, @@sql_mode,"
        " @@group_concat_max_len, @@autocommit, CONNECTION_ID())"
    )

    async def main():
        more = {"reset": reset} if driver == "pymysql" else {}
        connect_args = {"init_command": "SET group_concat_max_len = 99"}
        manager = bench.managed(options={"connect_args": connect_args}, **more)
        engine = sync(manager.engine())
        for name, listener in {"connect": connected, "checkout": checked_out}.items():
            event.listen(engine, name, listener)
        event.listen(engine, "checkout", only_once)
        found = []
        changes = ["SELECT 1", "SET time_zone = '+09:00'", "SET @here = 'x'", "SET autocommit = 1", "SET NAMES latin1"]
        for dirt in changes:
            await bench.scope(lambda s: found.append(s.scalar(state)))
            await bench.scope(lambda s, dirt=dirt: s.execute(text(dirt)))
        await bench.scope(lambda s: found.append(s.scalar(state)))
        rest = {tuple(each.split("|")[:3] + each.split("|")[4:]) for each in found}
        assert len(rest) == 1, found
        assert [each.split("|")[3] for each in found] == ["1", "3", "5", "7", "9", "11"]
        same = rest.pop()
        assert same[:3] == ("+03:00", "77", "connect") and "99" in same and "ANSI" in found[0]

    bench.run(main)


def test_f30_connection_that_nobody_has_changed_costs_nothing_more(bench):
    """Nor one whose isolation level SQLAlchemy takes back itself, nor one whose `checkout` listener sets something."""

    def level(session):
        session.connection(execution_options={"isolation_level": "READ COMMITTED"})
        session.execute(text("SELECT 1"))

    async def questions(work, times=5):
        await bench.scope(work)
        before = bench.questions()
        for _ in range(times):
            await bench.scope(work)
        return (bench.questions() - before - 1) / times

    async def main():
        manager = bench.managed()
        assert await questions(lambda s: s.execute(text("SELECT n FROM t"))) == 2
        assert await questions(lambda s: (s.execute(INSERT, {"n": 1}), s.commit())) == 2
        assert await questions(level) <= 6
        assert await questions(lambda s: s.execute(text("SET @a = 1"))) > 2

        def checked_out(connection, record, proxy):
            cursor = connection.cursor()
            cursor.execute("SET @mine = 1")
            cursor.close()

        event.listen(sync(manager.engine()), "checkout", checked_out)
        assert await questions(lambda s: s.execute(text("SELECT n FROM t"))) == 3

    bench.run(main)


def set_by_listener(connection, record):
    cursor = connection.cursor()
    cursor.execute("SET autocommit = 1")
    cursor.close()


AUTOCOMMIT = {
    "argument": {"connect_args": {"autocommit": True}},
    "level": {"isolation_level": "AUTOCOMMIT"},
    "server's": {"connect_args": {"autocommit": None}},
    "init_command": {"connect_args": {"autocommit": None, "init_command": "SET SESSION autocommit = ON"}},
    "listener": {},
    "level of the session": {},
}


def test_f31_connection_in_autocommit_is_known_as_one_however_it_came_to_it(bench):
    async def main():
        for way, options in AUTOCOMMIT.items():
            manager = bench.managed(options=options)
            if way == "listener":
                event.listen(sync(manager.engine()), "connect", set_by_listener)
            async with entered(manager.scope()) as scope:
                session = manager.get()
                if way.endswith("session"):
                    await done(session.connection(execution_options={"isolation_level": "AUTOCOMMIT"}))
                await done(session.execute(INSERT, {"n": 1}))
                await release(bench)
                assert bench.stored() == [1], way
                await done(session.execute(text("DELETE FROM t")))
                if way.endswith("session"):
                    await done(session.commit())
            assert scope.outcome is None or way.endswith("session"), way
            assert bench.stored() == [], way
            await done(manager.dispose())

    bench.run(main)


def test_f30_session_that_a_procedure_has_made_read_only_refuses_one_write_only(bench):
    async def main():
        bench.managed()
        await bench.state()
        await bench.scope(lambda s: s.execute(text("CALL reads_only()")))
        with pytest.raises(exc.OperationalError, match="1792"):
            await bench.scope(lambda s: s.execute(INSERT, {"n": 1}))
        await bench.leaves_nothing()

    bench.run(main)


@pytest.mark.parametrize("way", ["text", "command"])
def test_f30_database_that_a_checkout_listener_has_chosen_is_chosen_again_once(bench, driver, way):
    if way == "command" and driver != "pymysql":
        pytest.skip("PyMySQL's select_db() is no coroutine")
    chosen = []

    def choose(connection, *_):
        if way == "command":
            connection.select_db(chosen[-1])
        else:
            cursor = connection.cursor()
            cursor.execute(f"USE {chosen[-1]}")
            cursor.close()

    async def main():
        bench.managed()
        event.listen(sync(bench.manager.engine()), "checkout", choose)
        costs, threads, found = [], set(), []
        for name in ("information_schema", bench.name) * 3:
            chosen.append(name)
            await bench.scope(lambda s: threads.add(s.scalar(text("SELECT CONNECTION_ID()"))))
            before = bench.questions()
            await bench.scope(lambda s: s.execute(text("SET @a = 1")))
            await bench.scope(lambda s: found.append(s.execute(text("SELECT DATABASE(), @a IS NULL")).one()))
            assert found.pop() == (name, 1)
            costs.append(bench.questions() - before)
        assert len(threads) == 1 and len(set(costs[1:])) == 1

    bench.run(main)
