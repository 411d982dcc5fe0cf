"""What the user of a PostgreSQL connection by psycopg has changed on it, in its session or on the driver's own object,
reaches nobody who gets it next."""

from __future__ import annotations

import psycopg
import pytest
from psycopg.rows import dict_row
from sqlalchemy import event, exc, text
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


def by_cursor_class(kind):
    def use(session, statement):
        kind(raw(session)).execute(statement)
        session.commit()

    return use


def by_stream(session, statement):
    list(raw(session).cursor().stream(statement))
    session.commit()


def by_copy(session, statement):
    with raw(session).cursor().copy(f"COPY ({statement}) TO STDOUT") as copy:
        list(copy)
    session.commit()


def by_named_cursor(session, statement):
    cursor = raw(session).cursor("mine", withhold=True)
    cursor.execute(statement)
    session.commit()


SET_TIMEZONE = "SELECT set_config('timezone', 'Asia/Tokyo', false)"


@on_gevent
@pytest.mark.parametrize(
    "way",
    [by_cursor_class(psycopg.ClientCursor), by_stream, by_copy, by_named_cursor],
    ids=["stock", "stream", "copy", "named"],
)
def test_what_another_kind_of_cursor_has_set_is_taken_back(bench, way):
    async def main():
        bench.managed()
        fresh = "SELECT concat(current_setting('timezone'), (SELECT count(*) FROM pg_cursors WHERE is_holdable))"
        before = await bench.ask(fresh)
        await bench.scope(lambda s: way(s, SET_TIMEZONE))
        assert await bench.ask(fresh) == before

    bench.run(main)


@pytest.mark.parametrize("of", ["psycopg", "nobody we know"])
@on_gevent
def test_what_is_set_by_the_users_own_cursors_is_taken_back(bench, of):
    """A class of cursors for all of an engine is ours, too; of a function's we know nothing, so they are costly."""
    factory = psycopg.ClientCursor if of == "psycopg" else lambda *args, **more: psycopg.ClientCursor(*args, **more)

    async def main():
        bench.managed(options={"connect_args": {"cursor_factory": factory}})
        before = await bench.ask("SHOW timezone")
        number = await bench.ask("SELECT pg_backend_pid()")
        await bench.scope(lambda s: (s.execute(text(SET_TIMEZONE)), s.commit()))
        assert await bench.ask("SHOW timezone") == before
        if of == "psycopg":
            assert await bench.ask("SELECT pg_backend_pid()") == number
        await bench.leaves_nothing()

    bench.run(main)


@pytest.mark.parametrize("level", ["READ COMMITTED", "AUTOCOMMIT"])
def test_prepared_statement_fails_once_when_its_table_was_altered(bench, level, postgresql, postgresql_url):
    """And not whenever that connection has its turn. Later statements find the server's side as it should be."""

    async def main():
        bench.managed(options={"isolation_level": level})
        await bench.scope(lambda s: (s.execute(text("INSERT INTO t VALUES (1)")), s.commit()))
        for _ in range(8):
            assert await bench.ask("SELECT * FROM t") == 1
            assert await bench.ask("SELECT n FROM t") == 1
        bench._cursor.execute("ALTER TABLE t ALTER n TYPE bigint")
        for statement in ("SELECT * FROM t", "SELECT n FROM t"):
            try:
                await bench.ask(statement)
            except exc.NotSupportedError as error:
                assert error.orig.sqlstate == "0A000"
            for _ in range(8):
                assert await bench.ask(statement) == 1

    bench.run(main)


@on_gevent
def test_copy_by_execute_is_refused_as_psycopg_does(bench):
    """Not in the pipeline that takes a BEGIN along, out of which it would not come."""

    async def main():
        bench.managed()
        for statement in ("COPY t TO STDOUT", "/* why */ COPY t FROM STDIN", "-- why\n(COPY t TO STDOUT"):
            with pytest.raises(exc.ProgrammingError, match=r"use copy|syntax error"):
                await bench.ask(statement)
            assert await bench.ask("SELECT 1") == 1

    bench.run(main)


@on_gevent
def test_commit_in_a_pipeline_is_answered_before_it_returns(bench):
    def use(session):
        connection = raw(session)
        with connection.pipeline():
            connection.execute("INSERT INTO t VALUES (1)")
            connection.commit()
            return bench.stored()

    async def main():
        bench.managed()
        assert await bench.scope(use) == [1]

    bench.run(main)


@on_gevent
def test_connection_that_a_listener_has_set_up_unseen_is_replaced_where_it_is_changed(bench):
    """What was set by a cursor of psycopg's own cannot be set again."""

    def set_up(connection, _):
        psycopg.ClientCursor(connection).execute("SET TIME ZONE 'Asia/Tokyo'")
        connection.commit()

    async def main():
        bench.managed()
        event.listen(bench.manager.engine(), "connect", set_up)
        for _ in range(3):
            assert await bench.ask("SHOW timezone") == "Asia/Tokyo"
            await bench.scope(lambda s: (s.execute(text("SET TIME ZONE 'Europe/Paris'")), s.commit()))

    bench.run(main)
