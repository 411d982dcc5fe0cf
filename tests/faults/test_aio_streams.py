"""Streams of asyncio that something cuts: whoever reads on is told what it was. With both drivers."""

from __future__ import annotations

import asyncio
import warnings

import pytest
from sqlalchemy import exc, select, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from dbsession import aio
from dbsession.errors import ConfigError, ResultCut

ROWS = 3000
OPTIONS = {"yield_per": 10}
DEADLINE_S = 60


class Base(DeclarativeBase):
    pass


class Number(Base):
    __tablename__ = "seq_1_to_3000"  # which the server makes as it is asked for
    seq: Mapped[int] = mapped_column(primary_key=True)


NUMBERS = select(Number.__table__)


async def parts(session):
    async for part in (await session.stream(NUMBERS, execution_options=OPTIONS)).partitions(10):
        for row in part:
            yield row


READERS = {
    "orm": lambda session: session.stream_scalars(select(Number), execution_options=OPTIONS),
    "rows": lambda session: session.stream(NUMBERS, execution_options=OPTIONS),
    "text": lambda session: session.stream(text("SELECT seq FROM seq_1_to_3000"), execution_options=OPTIONS),
    "partitions": parts,
}

CUTS = {
    "commit": (lambda manager, session: session.commit(), "its transaction was committed (commit() at"),
    "rollback": (lambda manager, session: session.rollback(), "its transaction was rolled back (rollback() at"),
    "release": (lambda manager, session: manager.release(), "its transaction was rolled back"),
    "remove": (lambda manager, session: manager.get().remove(), "its transaction was rolled back"),
    "clear": (lambda manager, session: manager.clear(), "its transaction was rolled back"),
    "close": (lambda manager, session: session.close(), "its transaction was rolled back (close() at"),
    "invalidate": (lambda manager, session: session.invalidate(), "its connection was closed"),
    "statement": (
        lambda manager, session: session.execute(text("SELECT 1")),
        "another statement was sent on its connection (execute() at",
    ),
}


@pytest.fixture(params=["asyncmy", "aiomysql"])
def url(request, mariadb_url):
    return mariadb_url.replace("pymysql", request.param)


@pytest.fixture
def run(url):
    def run(work, **entry):
        async def within():
            options = {"pool_size": 1, "pool_timeout": 5, **entry.pop("options", {})}
            manager = aio.SessionManager({"default": {"url": url, "options": options, **entry}})
            async with asyncio.timeout(DEADLINE_S):
                try:
                    await work(manager)
                finally:
                    await manager.dispose()

        asyncio.run(within())

    return run


async def rows_of(reader, session):
    found = READERS[reader](session)
    return found if hasattr(found, "__aiter__") else await found


QUICK = ("commit", "rollback", "clear", "statement")
PAIRS = [
    pytest.param(reader, cut, marks=[] if reader == "orm" and cut in QUICK else pytest.mark.slow)
    for reader in READERS
    for cut in CUTS
]


@pytest.mark.filterwarnings("ignore:Previous unbuffered result was left incomplete")
@pytest.mark.parametrize(("reader", "cut"), PAIRS)
def test_f21_cut_stream_raises_at_its_next_fetch_and_says_what_cut_it(run, reader, cut):
    how, why = CUTS[cut]

    async def work(manager):
        for at in (10, 25):  # after 10, every row that was fetched has been read
            async with manager.scope():
                session = manager.get()()
                count = 0
                with pytest.raises(ResultCut) as raised:
                    async for _ in await rows_of(reader, session):
                        count += 1
                        if count == at:
                            await how(manager, session)
                assert why in str(raised.value)
        async with manager.scope():
            assert len([row async for row in await rows_of(reader, manager.get())]) == ROWS

    run(work)


@pytest.mark.filterwarnings("ignore:Previous unbuffered result was left incomplete")
@pytest.mark.parametrize(
    "cut",
    [pytest.param(each, marks=[] if each in QUICK else pytest.mark.slow) for each in CUTS if each != "invalidate"],
)
def test_f21_stream_of_which_every_row_was_fetched_is_complete_whatever_happens_then(run, cut):
    async def work(manager):
        async with manager.scope():
            session = manager.get()()
            before = await session.scalar(text("SELECT CONNECTION_ID()"))
            rows = await session.stream(text("SELECT seq FROM seq_1_to_20"), execution_options={"yield_per": 20})
            assert len(await rows.fetchmany(20)) == 20  # the packet of its end is unread
            await CUTS[cut][0](manager, session)
            assert await rows.fetchmany(20) == []
        async with manager.scope():  # (fault 38)
            assert await manager.get().scalar(text("SELECT CONNECTION_ID()")) == before

    run(work)


def test_f21_task_that_leaves_its_loop_hears_nothing(run, caplog):
    async def work(manager):
        async with manager.scope():
            async for row in await rows_of("orm", manager.get()):
                assert row
                break
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                await manager.get().rollback()

    run(work)
    assert not caplog.records


def test_f21_stream_read_on_after_a_cancellation_in_the_middle_of_its_wait(run):
    async def work(manager):
        async with manager.scope():
            slow = text("SELECT seq, REPEAT('x', 20000), IF(seq > 5, SLEEP(60), 0) FROM seq_1_to_100")
            rows = await manager.get().stream(slow, execution_options={"yield_per": 1})
            await rows.fetchone()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await rows.fetchall()
            with pytest.raises(ResultCut, match="CancelledError ended a wait on its connection"):
                await rows.fetchall()

    run(work)


def test_f21_stream_that_the_server_has_ended_with_an_error_is_not_at_its_end(run):
    async def work(manager):
        async with manager.scope():
            failing = "SELECT seq, REPEAT('x', 20000), IF(seq > 50, (SELECT 1 UNION SELECT 2), 0) FROM seq_1_to_100"
            rows = await manager.get().stream(text(failing), execution_options={"yield_per": 1})
            with pytest.raises(exc.OperationalError, match="1242"):
                await rows.fetchall()
            with pytest.raises(ResultCut, match=r"OperationalError \(1242\)"):
                await rows.fetchall()

    run(work)


def test_f38_rows_of_a_stream_that_have_not_come_are_not_waited_for(run):
    async def work(manager):
        async with manager.scope():
            session = manager.get()
            before = await session.scalar(text("SELECT CONNECTION_ID()"))
            slow = text("SELECT seq, REPEAT('x', 20000), IF(seq > 5, SLEEP(60), 0) FROM seq_1_to_100")
            rows = await session.stream(slow, execution_options={"yield_per": 1})
            await rows.fetchone()
            async with asyncio.timeout(30):
                await session.rollback()
            assert await session.scalar(text("SELECT CONNECTION_ID()")) != before

    run(work)


def driver_cursors(url):
    if "asyncmy" in url:
        from asyncmy import cursors

        return "cursor_cls", cursors
    from aiomysql import cursors

    return "cursorclass", cursors


@pytest.mark.parametrize("dicts", ["DictCursor", "SSDictCursor"])
def test_f38_cursor_class_of_the_driver_whose_rows_are_dicts_is_refused(url, dicts):
    key, cursors = driver_cursors(url)
    if not hasattr(cursors, dicts):
        return
    with pytest.raises(ConfigError, match=f"`{key}` in `connect_args` is {dicts}"):
        aio.SessionManager({"default": {"url": url, "options": {"connect_args": {key: getattr(cursors, dicts)}}}})


def test_f38_every_statement_works_with_server_side_cursors_of_the_driver_as_the_default(run, url):
    async def work(manager):
        async with manager.scope():
            session = manager.get()
            assert await session.scalar(text("SELECT 7")) == 7
            await session.execute(text("CREATE TABLE t (n INT) ENGINE=InnoDB"))
            await session.execute(text("INSERT INTO t VALUES (1), (2)"))
            await session.commit()
            assert (await session.scalars(text("SELECT n FROM t"))).all() == [1, 2]
            await session.rollback()

    key, cursors = driver_cursors(url)
    run(work, options={"connect_args": {key: cursors.SSCursor}})
