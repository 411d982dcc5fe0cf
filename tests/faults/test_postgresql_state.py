"""What the user of a PostgreSQL connection by psycopg has changed on it, in its session or on the driver's own object,
reaches nobody who gets it next."""

from __future__ import annotations

import psycopg
import pytest
from psycopg.rows import dict_row
from sqlalchemy import text
from sqlalchemy.pool import QueuePool

from support.halves import HALVES, done, entered


class Bench:
    def __init__(self, half, url, cursor):
        self.half, self._url, self._cursor = half, url, cursor
        self.manager = None

    def managed(self, **entry):
        options = {"pool_size": 1, "pool_timeout": 20, **entry.pop("options", {})}
        self.manager = self.half.verbs.SessionManager({"default": {"url": self._url, "options": options, **entry}})

    async def scope(self, work):
        """What `work` returns, given the session of a scope."""
        found = []
        async with entered(self.manager.scope()):
            session = self.manager.get()()
            await self.half.call(lambda s: found.append(work(s)), getattr(session, "sync_session", session))
        return found[0]

    async def ask(self, statement):
        return await self.scope(lambda s: s.scalar(text(statement)))

    def stored(self):
        return [row["n"] for row in self._cursor.execute("SELECT n FROM t ORDER BY n").fetchall()]

    async def leaves_nothing(self):
        """The next user's work is thrown away if it is not committed, and stored if it is."""
        await self.scope(lambda s: s.execute(text("INSERT INTO t VALUES (100)")))
        assert self.stored() == []
        await self.scope(lambda s: (s.execute(text("INSERT INTO t VALUES (200)")), s.commit()))
        assert self.stored() == [200]
        await self.scope(lambda s: (s.execute(text("DELETE FROM t")), s.commit()))

    def run(self, main):
        async def whole():
            try:
                await main()
            finally:
                await done(self.manager.dispose())

        self.half.run(whole)


@pytest.fixture(params=["gevent", "aio"])
def half(request):
    return HALVES[request.param]


@pytest.fixture
def bench(half, postgresql, postgresql_url):
    with postgresql.root(postgresql_url.rpartition("/")[2]) as cursor:
        cursor.execute("CREATE TABLE t (n INT)")
        cursor.execute("GRANT ALL ON t TO app")
        yield Bench(half, postgresql_url, cursor)


def raw(session):
    return session.connection().connection.driver_connection


on_gevent = pytest.mark.parametrize("half", ["gevent"], indirect=True)  # on asyncio the driver's calls are awaited


READ_ONLY = pytest.param({"postgresql_readonly": True}, id="read only", marks=pytest.mark.slow)


@pytest.mark.parametrize("reset", ["rollback", "connection"])
@pytest.mark.parametrize("option", [pytest.param({"isolation_level": "AUTOCOMMIT"}, id="autocommit"), READ_ONLY])
def test_option_of_one_checkout_is_not_the_next_users(bench, option, reset):
    """Also where the session is reset as well."""

    async def main():
        bench.managed(reset=reset)
        before = await bench.ask("SHOW timezone")

        def use(session):
            session.connection(execution_options=option)
            if reset != "connection":
                session.execute(text("SET TIME ZONE 'Asia/Tokyo'"))

        await bench.scope(use)
        await bench.leaves_nothing()
        assert await bench.ask("SHOW timezone") == before

    bench.run(main)


@on_gevent
@pytest.mark.parametrize("pool", ["ours", pytest.param("stock", marks=pytest.mark.slow)])
def test_what_is_set_on_the_drivers_connection_is_taken_back(bench, pool):
    notices = []

    def use(session):
        connection = raw(session)
        connection.rollback()
        connection.read_only, connection.isolation_level = True, psycopg.IsolationLevel.SERIALIZABLE
        connection.row_factory, connection.cursor_factory = dict_row, psycopg.ClientCursor
        connection.add_notice_handler(notices.append)

    async def main():
        options = {} if pool == "ours" else {"poolclass": QueuePool}
        bench.managed(options=options)
        number = await bench.ask("SELECT pg_backend_pid()")
        await bench.scope(use)
        await bench.leaves_nothing()
        assert await bench.ask("SHOW transaction_isolation") == "read committed"
        await bench.scope(lambda s: s.execute(text("DO $$ BEGIN RAISE NOTICE 'mine'; END $$")))
        assert notices == []
        assert await bench.ask("SELECT pg_backend_pid()") == number

    bench.run(main)
