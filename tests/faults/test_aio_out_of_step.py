"""asyncmy, aiomysql: whatever ends a write or a read half-way, the next user of a connection gets its own answers."""

from __future__ import annotations

import asyncio
import struct

import pytest
from sqlalchemy import exc, text

from dbsession import aio
from dbsession.errors import UsedByTwo
from support.loops import in_loop
from support.waiting import wait_until

run = in_loop("asyncio")

ROWS = "SELECT {} + seq FROM seq_1_to_400"  # MariaDB's own table
FAILING = 300.0  # the decimal that the converter fails on, in the middle of the answer


@pytest.fixture(params=["asyncmy", "aiomysql"])
def driver(request):
    return request.param


@pytest.fixture
def managed(mariadb_url, driver):
    """Runs an async function with a manager that has a pool of one, and says whether the connection is another one."""

    def in_a_loop(work, conv=None, **entry):
        options = {"pool_size": 1, "pool_timeout": 5, "connect_args": {} if conv is None else {"conv": conv}}
        databases = {"default": {"url": mariadb_url.replace("pymysql", driver), "options": options, **entry}}

        async def within():
            manager = aio.SessionManager(databases)
            async with manager.running():
                await work(manager, manager.get())

        run(within)

    return in_a_loop


async def number_of(manager):
    async with manager.scope():
        return await manager.get().scalar(text("SELECT CONNECTION_ID()"))


async def answers_are_its_own(manager):
    """Each of many questions gets its own answer, and each INSERT its count."""
    for n in range(5):
        async with manager.scope():
            session = manager.get()
            assert await session.scalar(text("SELECT :n"), {"n": f"answer-{n}"}) == f"answer-{n}"
            assert (await session.execute(text("DO 1"))).rowcount == 0
            found = (await session.execute(text("SELECT seq FROM seq_1_to_3"))).scalars().all()
            assert found == [1, 2, 3]
            await session.commit()


def converters(driver, error):
    """The driver's, of which the one for decimals fails in the middle."""
    if driver == "asyncmy":
        from asyncmy.converters import conversions
    else:
        from pymysql.converters import conversions

    def convert(value):
        value = float(value)
        if value == FAILING:
            raise error
        return value

    return {**conversions, 246: convert}  # FIELD_TYPE.NEWDECIMAL


class OwnError(Exception):
    pass


class OwnKill(BaseException):
    pass


def driver_error(driver):
    module = __import__("asyncmy" if driver == "asyncmy" else "pymysql")
    return (module.errors if driver == "asyncmy" else module.err).DataError("a converter's")


ERRORS = {
    "runtime": RuntimeError("readexactly() called while another coroutine is already waiting for incoming data"),
    "attribute": AttributeError("'NoneType' object has no attribute 'x'"),
    "assertion": AssertionError("Protocol error, expecting EOF"),
    "struct": struct.error("unpack requires a buffer of 4 bytes"),
    "index": IndexError("list index out of range"),
    "memory": MemoryError(),
    "decode": UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    "encode": UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed"),
    "own": OwnError("a user's"),
    "cancelled": asyncio.CancelledError(),
    "kill": OwnKill(),
    "drivers": None,
}
QUICK = ("runtime", "drivers")


def quick(names, chosen):
    """`names`, of which the others than the chosen ones are slow."""
    return [each if each in chosen else pytest.param(each, marks=pytest.mark.slow) for each in names]


@pytest.mark.parametrize("streamed", [False, True], ids=["buffered", "streamed"])
@pytest.mark.parametrize(
    "name", [each if each in QUICK else pytest.param(each, marks=pytest.mark.slow) for each in ERRORS]
)
def test_f26_connection_is_given_up_when_an_answer_is_not_read_to_its_end(managed, driver, name, streamed):
    """Whatever the exception is: what is left of the answer would be taken for the next one's."""
    error = ERRORS[name] or driver_error(driver)

    async def work(manager, session):
        before = await number_of(manager)
        async with manager.scope():
            with pytest.raises(BaseException) as caught:
                if streamed:
                    async for _ in await session.stream(text(ROWS.format("0.0"))):
                        pass
                else:
                    await session.execute(text(ROWS.format("0.0")))
            assert error in (caught.value, getattr(caught.value, "orig", None), caught.value.__context__) or isinstance(
                getattr(caught.value.orig, "__cause__", None), AttributeError
            )
        await answers_are_its_own(manager)
        assert await number_of(manager) != before
        assert manager.engine().pool.checkedout() == 0

    managed(work, converters(driver, error))


UNSENDABLE = {
    "surrogate": lambda connection: connection.execute(text("SELECT :a"), {"a": "\ud800"}),
    "nan": lambda connection: connection.execute(text("SELECT :a"), {"a": float("nan")}),
    "too_few": lambda connection: connection.exec_driver_sql("SELECT %s, %s", (1,)),
    "many": lambda connection: connection.execute(text("DO :a"), [{"a": "\ud800"}, {"a": "1"}]),
}


@pytest.mark.parametrize("name", list(UNSENDABLE))
def test_f26_connection_and_transaction_stay_when_a_statement_cannot_be_sent(managed, name):
    """A parameter that a client has made up costs no connection, and takes nothing from the transaction."""

    async def work(manager, session):
        before = await number_of(manager)
        async with manager.scope():
            connection = await session.connection()
            await session.execute(text("SET @a = 1"))
            with pytest.raises(Exception):  # noqa: B017  # each driver has its own
                await UNSENDABLE[name](connection)
            assert await session.scalar(text("SELECT @a")) == 1
            await session.commit()
        await answers_are_its_own(manager)
        assert await number_of(manager) == before

    managed(work)


@pytest.mark.parametrize("end", quick(["commit", "rollback", "execute", "release"], ["commit"]))
def test_f26_connection_is_given_up_when_somebody_reads_from_it_behind_our_back(managed, end):
    """By the driver's own methods, in another task: aiomysql raises RuntimeError out of the second read, asyncmy lets
    the first wait. Whoever asks in between gets an error in time, and no later one another's answer."""

    async def work(manager, session):
        async with manager.scope():
            await session.scalar(text("SELECT 1"))
            raw = (await (await session.connection()).get_raw_connection()).driver_connection
            sleeping = asyncio.ensure_future(raw.query("SELECT SLEEP(0.2)"))
            await asyncio.sleep(0.05)
            methods = {"commit": session.commit, "rollback": session.rollback}
            methods |= {"execute": lambda: session.execute(text("SELECT 2")), "release": manager.release}
            async with asyncio.timeout(20):
                await asyncio.gather(methods[end](), return_exceptions=True)
        sleeping.cancel()  # asyncmy's, overtaken, would wait for ever
        await asyncio.gather(sleeping, return_exceptions=True)
        await answers_are_its_own(manager)
        assert manager.engine().pool.checkedout() == 0

    managed(work, read_timeout_s=3)


@pytest.mark.parametrize("end", quick(["commit", "rollback", "clear", "execute"], ["commit", "clear"]))
def test_f26_nothing_is_sent_in_the_middle_of_another_tasks_statement(managed, mariadb, end):
    """Refused; after a rollback or the end of the scope the statement gets the error of a lost connection, and is
    killed at the server. asyncmy let the overtaken one wait past `read_timeout_s`."""

    async def work(manager, session):
        async with manager.scope():
            await session.scalar(text("SELECT 1"))
            slow = asyncio.create_task(session.scalar(text("SELECT SLEEP(30) + 12345")))
            await asyncio.to_thread(wait_until, lambda: "12345" in str(mariadb.processlist()), 10, "it runs")
            if end == "clear":
                await manager.clear()
            else:
                methods = {"commit": session.commit, "rollback": session.rollback}
                methods["execute"] = lambda: session.execute(text("SELECT 2"))
                with pytest.raises(UsedByTwo):
                    await methods[end]()
        with pytest.raises(exc.OperationalError, match="2013"):
            await slow
        await asyncio.to_thread(wait_until, lambda: "12345" not in str(mariadb.processlist()), 10, "it is killed")
        await answers_are_its_own(manager)
        assert manager.engine().pool.checkedout() == 0

    managed(work)
