"""Rows of a server-side cursor that nobody reads on: the connection goes on or is closed, never read to the end; and
whoever reads on is told what has cut them off."""

from __future__ import annotations

import time
import warnings

import pymysql
import pytest
from pymysql.constants import FIELD_TYPE
from sqlalchemy import exc, select, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from dbsession.errors import ConfigError, ResultCut
from support.proxy import Proxy
from support.readers import BY_BOTH
from support.waiting import wait_until

pytestmark = BY_BOTH

ROWS = 3000
STREAM = {"stream_results": True, "max_row_buffer": 10}


class Base(DeclarativeBase):
    pass


class Number(Base):
    __tablename__ = "seq_1_to_3000"  # which the server makes as it is asked for
    seq: Mapped[int] = mapped_column(primary_key=True)


class Made(Base):
    __tablename__ = "made"
    id: Mapped[int] = mapped_column(primary_key=True)


NUMBERS = select(Number.__table__)

READERS = {
    "orm": lambda session: session.scalars(select(Number).execution_options(yield_per=10)),
    "query": lambda session: session.query(Number).yield_per(10),
    "yield_per": lambda session: session.execute(NUMBERS, execution_options={"yield_per": 10}),
    "rows": lambda session: session.execute(NUMBERS, execution_options=STREAM),
    "scalars": lambda session: session.scalars(NUMBERS, execution_options=STREAM),
    "mappings": lambda session: session.execute(NUMBERS, execution_options=STREAM).mappings(),
    "text": lambda session: session.execute(text("SELECT seq FROM seq_1_to_3000"), execution_options=STREAM),
    "partitions": lambda session: (
        row for part in session.execute(NUMBERS, execution_options=STREAM).partitions(10) for row in part
    ),
}

CUTS = {
    "commit": (lambda manager, session: session.commit(), "its transaction was committed (commit() at"),
    "rollback": (lambda manager, session: session.rollback(), "its transaction was rolled back (rollback() at"),
    "release": (lambda manager, session: manager.release(), "its transaction was rolled back (release() at"),
    "remove": (lambda manager, session: manager.get().remove(), "its transaction was rolled back (remove() at"),
    "clear": (lambda manager, session: manager.clear(), "its transaction was rolled back (clear() at"),
    "close": (lambda manager, session: session.close(), "its transaction was rolled back (close() at"),
    "invalidate": (lambda manager, session: session.invalidate(), "its connection was closed (invalidate() at"),
    "statement": (
        lambda manager, session: session.execute(text("SELECT 1")),
        "another statement was sent on its connection (execute() at",
    ),
    "flush": (
        lambda manager, session: (session.add(Made()), session.flush()),
        "another statement was sent on its connection (flush() at",
    ),
}


def counted(rows, at, cut):
    """Read `rows`, and call `cut` after so many of them."""
    count = 0
    for _ in rows:
        count += 1
        if count == at:
            cut()
    return count


QUICK = ("commit", "rollback", "invalidate", "statement")
PAIRS = [
    pytest.param(reader, cut, marks=[] if (reader == "orm" and cut in QUICK) or cut == "commit" else pytest.mark.slow)
    for reader in READERS
    for cut in CUTS
]


@pytest.mark.filterwarnings("ignore:Previous unbuffered result was left incomplete")
@pytest.mark.parametrize(("reader", "cut"), PAIRS)
def test_f21_cut_result_raises_at_its_next_fetch_and_says_what_cut_it(managed, reader, cut):
    manager = managed()
    how, why = CUTS[cut]
    Made.__table__.create(manager.engine())
    for at in (10, 25):  # after 10, every row that was fetched has been read
        with manager.scope():
            session = manager.get()()
            with pytest.raises(ResultCut) as raised:
                counted(READERS[reader](session), at, lambda session=session: how(manager, session))
            assert why in str(raised.value) and "[DBS-RESULT-CUT]" in str(raised.value)
            assert isinstance(raised.value, exc.ResourceClosedError)
    with manager.scope():
        assert counted(READERS[reader](manager.get()), 1, lambda: None) == ROWS


@pytest.mark.parametrize("reader", ["orm", "rows", "partitions"])
def test_f21_reader_that_leaves_its_loop_hears_nothing(managed, reader, caplog):
    manager = managed()

    def rows(session):
        yield from READERS[reader](session)

    with manager.scope(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for row in READERS[reader](manager.get()):
            assert row
            break
        generator = rows(manager.get())
        warnings.simplefilter("ignore")  # of the stream before, whose cursor the collector may not have closed yet
        next(generator)
        generator.close()
        del generator
        manager.get().rollback()
    assert not caplog.records


@pytest.mark.filterwarnings("ignore:Previous unbuffered result was left incomplete")
@pytest.mark.parametrize("size", [1, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "cut",
    [pytest.param(each, marks=[] if each in QUICK else pytest.mark.slow) for each in CUTS if each != "invalidate"],
)
def test_f21_result_of_which_every_row_was_fetched_is_complete_whatever_happens_then(managed, cut, size):
    manager = managed()
    Made.__table__.create(manager.engine())
    with manager.scope():
        session = manager.get()()
        rows = session.execute(text(f"SELECT seq FROM seq_1_to_{size}"), execution_options={"yield_per": size})
        assert len(rows.fetchmany(size)) == size  # the packet of its end is unread
        CUTS[cut][0](manager, session)
        assert rows.fetchmany(size) == []


def test_f21_buffered_result_is_read_to_its_end_after_a_commit(managed):
    manager = managed()
    with manager.scope():
        session = manager.get()()
        assert counted(session.execute(NUMBERS), 10, session.commit) == ROWS


def test_f21_stream_of_another_scope_is_not_cut(managed):
    manager = managed(options={"pool_size": 2})

    def other():
        with manager.scope():
            manager.get().execute(text("SELECT 1"))
            manager.get().commit()

    with manager.scope():
        assert counted(READERS["orm"](manager.get()), 25, other) == ROWS


def test_f21_stream_read_on_after_its_wait_has_timed_out(managed):
    manager = managed(read_timeout_s=0.5)
    with manager.scope():
        slow = text("SELECT seq, REPEAT('x', 20000), IF(seq > 5, SLEEP(60), 0) FROM seq_1_to_100")
        rows = manager.get().execute(slow, execution_options={"stream_results": True, "max_row_buffer": 1})
        rows.fetchone()
        with pytest.raises(exc.OperationalError, match="2013"):
            rows.fetchall()
        with pytest.raises(ResultCut, match="TimeoutError ended the wait for its rows"):
            rows.fetchall()


def test_f21_stream_read_on_after_a_kill_or_after_somebody_else_has_closed_its_session(with_server, mode):
    with_server(
        """
        import gevent
        from dbsession.errors import ResultCut

        configure()
        slow = f"SELECT seq, REPEAT('x', 20000), CASE WHEN seq > 5 THEN {db.sleep(60)} END FROM {db.numbers(100)}"

        def read(end):
            with dbsession.session_scope():
                own = session()
                rows = own.execute(text(slow), execution_options={"stream_results": True, "max_row_buffer": 1})
                rows.fetchone()
                try:
                    end(own, rows)
                except BaseException as error:
                    ended_by.append(error)
                try:
                    rows.fetchall()
                except ResultCut as error:
                    return str(error)

        def in_time(own, rows):
            with gevent.Timeout(0.2):
                rows.fetchall()

        def closed(own, rows):
            def close():
                running("SELECT seq, REPEAT" if db.sends_streams else "FETCH")
                own.close()
            spawn(close)
            rows.fetchall()

        ended_by = []
        if gevent.socket.socket is __import__("socket").socket:
            said = read(in_time)
            assert isinstance(ended_by.pop(), gevent.Timeout) and "Timeout ended the wait for its rows" in said, said
        said = read(closed)
        # PostgreSQL's reader may still hear that its statement was cancelled.
        assert db.is_lost(ended_by[-1]) or db.code(ended_by[-1]) == "57014", ended_by
        assert "[DBS-RESULT-CUT]" in said, said
        nothing_in_use()
        """,
        mode=mode,
    )


def test_f21_stream_that_the_server_has_ended_with_an_error_is_not_at_its_end(managed):
    manager = managed()
    with manager.scope():
        failing = text("SELECT seq, REPEAT('x', 20000), IF(seq > 50, (SELECT 1 UNION SELECT 2), 0) FROM seq_1_to_100")
        rows = manager.get().execute(failing, execution_options={"stream_results": True, "max_row_buffer": 1})
        with pytest.raises(exc.OperationalError, match="1242"):
            rows.fetchall()
        with pytest.raises(ResultCut, match=r"the server ended it with OperationalError \(1242\)"):
            rows.fetchall()


@pytest.mark.parametrize("size", [1, 10])
def test_f21_converter_that_raises_stop_iteration_does_not_end_a_stream(managed, size):
    def stops(value):
        if value == "25":
            raise StopIteration
        return int(value)

    conversions = pymysql.converters.conversions | {FIELD_TYPE.LONG: stops, FIELD_TYPE.LONGLONG: stops}
    manager = managed(options={"connect_args": {"conv": conversions}})
    with manager.scope(), pytest.raises(RuntimeError, match="StopIteration"):
        rows = manager.get().execute(NUMBERS, execution_options={"stream_results": True, "max_row_buffer": size})
        list(iter(rows.fetchone, None) if size == 1 else rows)
    with manager.scope(), pytest.raises(RuntimeError, match="StopIteration"):
        cursor = manager.get().connection().connection.cursor(pymysql.cursors.SSCursor)
        cursor.execute("SELECT seq FROM seq_1_to_3000")
        list(cursor)


@pytest.mark.filterwarnings("ignore:Previous unbuffered result was left incomplete")
@pytest.mark.parametrize("cursorclass", [pymysql.cursors.SSCursor, pymysql.cursors.SSDictCursor])
@pytest.mark.parametrize("fetch", ["fetchone", "fetchmany", "fetchall"])
def test_f21_raw_stream_raises_after_another_cursors_statement(managed, cursorclass, fetch):
    raw = managed().engine().raw_connection()
    stream = raw.cursor(cursorclass)
    stream.execute("SELECT seq FROM seq_1_to_3000")
    assert stream.fetchone()
    with raw.cursor() as other:
        other.execute("SELECT 1")
    for _ in range(2):
        with pytest.raises(ResultCut):
            getattr(stream, fetch)()
    raw.close()


# One row, of which only the packet of its end is unread.

ONE_ROW = {
    "scalar": lambda session, wide: session.scalar(wide, execution_options=STREAM),
    "first": lambda session, wide: session.execute(wide, execution_options=STREAM).first(),
    "one": lambda session, wide: session.scalars(wide, execution_options=STREAM).one(),
    "fetchone": lambda session, wide: session.execute(wide, execution_options=STREAM).fetchone(),
}


@pytest.mark.parametrize("way", ONE_ROW)
@pytest.mark.parametrize("bytes_", [1, pytest.param(20_000, marks=pytest.mark.slow), 3_000_000])
def test_f38_one_row_of_a_stream_does_not_cost_its_connection(managed, mariadb, mariadb_url, way, bytes_):
    with Proxy(mariadb.port) as proxy:
        manager = managed(url=mariadb_url.replace(f":{mariadb.port}/", f":{proxy.port}/"))
        with manager.scope():
            session = manager.get()
            before = session.scalar(text("SELECT CONNECTION_ID()"))
            session.commit()
            if bytes_ == 1:
                proxy.dribble(2)  # the packets of the row and of the end come in pieces
            kept = ONE_ROW[way](session, text(f"SELECT REPEAT('x', {bytes_})"))
            assert kept
            session.rollback()
            proxy.resume()
            assert session.scalar(text("SELECT CONNECTION_ID()")) == before


def test_f38_rows_that_have_not_come_are_not_waited_for(managed):
    manager = managed(read_timeout_s=60)
    with manager.scope():
        session = manager.get()
        before = session.scalar(text("SELECT CONNECTION_ID()"))
        slow = text("SELECT seq, REPEAT('x', 20000), IF(seq > 5, SLEEP(60), 0) FROM seq_1_to_100")
        session.execute(slow, execution_options={"stream_results": True, "max_row_buffer": 1}).fetchone()
        began = time.monotonic()
        session.rollback()
        assert time.monotonic() - began < 30
        assert session.scalar(text("SELECT CONNECTION_ID()")) != before


@pytest.mark.filterwarnings("ignore:The create_engine.server_side_cursors parameter is deprecated")
@pytest.mark.parametrize(
    "options",
    [{"connect_args": {"cursorclass": pymysql.cursors.SSCursor}}, {"server_side_cursors": True}],
    ids=["cursorclass", "server_side_cursors"],
)
@pytest.mark.parametrize("reset", ["rollback", pytest.param("connection", marks=pytest.mark.slow)])
def test_f38_every_statement_works_with_server_side_cursors_as_the_default(managed, options, reset):
    manager = managed(options=options, reset=reset, ping_idle_s=0, connect_timeout_s=3)
    with manager.scope():
        session = manager.get()
        assert session.scalar(text("SELECT 7")) == 7
        first = session.scalar(text("SELECT CONNECTION_ID()"))
        session.execute(text("CREATE TABLE t (n INT) ENGINE=InnoDB"))
        session.execute(text("INSERT INTO t VALUES (1), (2)"))
        session.commit()
        assert session.scalars(text("SELECT n FROM t")).all() == [1, 2]
        session.rollback()
    with manager.scope():
        assert manager.get().scalar(text("SELECT CONNECTION_ID()")) == first
    with manager.scope(read_timeout_s=0.3), pytest.raises(exc.OperationalError, match="2013"):
        manager.get().execute(text("SELECT SLEEP(60)")).fetchall()  # which a side connection ends
    wait_until(lambda: not running(manager), 20)


def running(manager):
    with manager.scope():
        return (
            manager.get()
            .scalars(text("SELECT ID FROM information_schema.PROCESSLIST WHERE INFO LIKE 'SELECT SLEEP%'"))
            .all()
        )


@pytest.mark.parametrize("cursorclass", [pymysql.cursors.DictCursor, pymysql.cursors.SSDictCursor])
def test_f38_cursor_class_whose_rows_are_dicts_is_refused(managed, cursorclass):
    with pytest.raises(ConfigError, match=f"`cursorclass` in `connect_args` is {cursorclass.__name__}"):
        managed(options={"connect_args": {"cursorclass": cursorclass}}).engine()


@pytest.mark.parametrize("cursorclass", [pymysql.cursors.SSCursor, pymysql.cursors.SSDictCursor])
def test_stream_closed_early_keeps_the_transaction_when_it_goes_on(managed, cursorclass):
    manager = managed()
    with manager.engine().begin() as connection:
        connection.execute(text("CREATE TABLE t (n INT) ENGINE=InnoDB"))
    with manager.scope():
        session = manager.get()
        session.execute(text("INSERT INTO t VALUES (4)"))
        cursor = session.connection().connection.dbapi_connection.cursor(cursorclass)
        cursor.execute("SELECT seq FROM seq_1_to_5000")
        assert cursor.fetchone()
        cursor.close()
        assert session.scalar(text("SELECT count(*) FROM t")) == 1
        result = session.execute(text("SELECT seq FROM seq_1_to_5000"), execution_options={"stream_results": True})
        assert result.fetchone() == (1,)
        result.close()
        session.commit()
    with manager.scope():
        assert manager.get().scalar(text("SELECT count(*) FROM t")) == 1


def test_raw_connection_with_an_unread_stream_is_not_kept(managed):
    manager = managed(options={"pool_pre_ping": False})
    raw = manager.engine().raw_connection()
    cursor = raw.cursor(pymysql.cursors.SSCursor)
    cursor.execute("SELECT seq FROM seq_1_to_1000000")
    assert cursor.fetchone() == (1,)
    raw.close()
    wait_until(lambda: manager.engine().pool.checkedin() + manager.engine().pool._open == 0, 5)
    with manager.scope():
        assert manager.get().scalar(text("SELECT 7")) == 7


def test_stream_that_another_statement_cuts_short_is_warned_about(managed):
    manager = managed()
    with manager.scope():
        stream = manager.get().execute(
            text("SELECT seq FROM seq_1_to_5000"), execution_options={"stream_results": True, "max_row_buffer": 1}
        )
        stream.fetchone()
        with pytest.warns(UserWarning, match="left incomplete"):
            manager.get().execute(text("SELECT 1"))
    with manager.scope(), warnings.catch_warnings():
        warnings.simplefilter("error")
        stream = manager.get().execute(text("SELECT seq FROM seq_1_to_9"), execution_options={"stream_results": True})
        stream.close()
        manager.get().execute(text("SELECT 1"))


@pytest.mark.parametrize("detached", [False, True], ids=["pooled", "detached"])
def test_core_connection_goes_on_after_the_rollback_of_an_unread_stream(managed, detached):
    manager = managed()
    with manager.engine().connect() as connection:
        if detached:
            connection.detach()
        stream = connection.execution_options(stream_results=True).execute(text("SELECT seq FROM seq_1_to_1000000"))
        stream.fetchone()
        connection.rollback()
        assert connection.scalar(text("SELECT 7")) == 7


class OwnStream(pymysql.cursors.SSCursor):
    pass


def test_connection_goes_on_after_a_rollback_over_a_stream_of_the_users_own_cursor_class(managed):
    manager = managed(options={"connect_args": {"cursorclass": OwnStream}})
    with manager.engine().connect() as connection:
        result = connection.execute(text("SELECT seq FROM seq_1_to_100000"))
        assert result.fetchone() == (1,)
        connection.rollback()
        assert connection.execute(text("SELECT 'after'")).fetchall() == [("after",)]


def test_f38_connection_whose_stream_had_little_left_is_reset_all_the_same(managed):
    manager = managed(reset="connection")
    raw = manager.engine().raw_connection()
    thread = raw.dbapi_connection.thread_id()
    with raw.cursor() as cursor:
        cursor.execute("SET @mark = 7")
    stream = raw.cursor(pymysql.cursors.SSCursor)
    stream.execute("SELECT 1")
    assert stream.fetchone() == (1,)
    raw.close()
    with manager.scope():
        assert manager.get().execute(text("SELECT CONNECTION_ID(), @mark")).all() == [(thread, None)]
