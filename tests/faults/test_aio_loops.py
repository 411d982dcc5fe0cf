"""Event loops that end, however they do: nothing is left of their connections, here or at the server, nothing is said,
and the next loop in the same process works. And a fork in the middle of one."""

from __future__ import annotations

from itertools import product

import pytest

from support.processes import run_python

DRIVERS = ["asyncmy", "aiomysql", "aiosqlite", "psycopg", "asyncpg"]
LOOPS = ["asyncio", "uvloop"]
ENDINGS = ["well", "running", "pending", "statement", "error", "interrupt", "exit", "closed", "closed_transaction"]
QUICK = {("asyncmy", "uvloop", "pending"), ("asyncmy", "asyncio", "fork"), ("aiomysql", "uvloop", "closed_transaction")}
QUICK |= {("asyncmy", "asyncio", "well"), ("asyncmy", "asyncio", "interrupt"), ("aiosqlite", "asyncio", "statement")}
QUICK |= {("psycopg", "uvloop", "fork"), ("asyncpg", "asyncio", "statement")}


def cases(endings):
    found = product(DRIVERS, LOOPS, endings)
    return [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in found]


SCRIPT = """
    import asyncio, gc, os, sys, threading
    import psycopg, pymysql, uvloop
    from sqlalchemy import text
    from dbsession import aio
    from support.waiting import wait_until

    url, socket, kind, ending = sys.argv[1:5]
    aio.configure({"default": {"url": url, "options": {"pool_size": 3, "pool_timeout": 5}}})
    session = aio.get_dbsession()
    new_loop = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}[kind]

    def connections():
        if "sqlite" in url:
            return [each for each in threading.enumerate() if each is not threading.main_thread()]
        if "postgresql" in url:
            folder, _, port = socket.rpartition(":")
            database = url.rpartition("/")[2]
            with psycopg.connect(host=folder, port=port, user="postgres", autocommit=True) as root:
                return root.execute("SELECT pid FROM pg_stat_activity WHERE datname = %s", (database,)).fetchall()
        root = pymysql.connect(unix_socket=socket, user="root")
        try:
            with root.cursor() as cursor:
                cursor.execute(
                    "SELECT id FROM information_schema.processlist WHERE db = %s", (url.rpartition("/")[2],)
                )
                return cursor.fetchall()
        finally:
            root.close()

    async def use(n):
        assert await session.scalar(text("SELECT :token"), {"token": f"token-{n}"}) == f"token-{n}"

    def be_patient():
        asyncio.get_running_loop().slow_callback_duration = 60  # of the debug mode; the machine may be busy

    async def use_all():
        be_patient()
        await asyncio.gather(*map(use, range(9)))

    async def hold(held):
        await use("held")
        held.set()
        await asyncio.Event().wait()

    async def hold_one():
        held = asyncio.Event()
        keep.append(asyncio.create_task(hold(held)))
        await held.wait()

    keep = []
"""


def end_of_loop(where, loop, ending, source):
    body = "\n".join(line[4:] for line in (SCRIPT + source).splitlines())
    done = run_python(body, *where, loop, ending, env={"PYTHONDEVMODE": "1"})
    assert not done.stderr
    assert done.stdout == "done\n"


@pytest.fixture
def where(driver, request, tmp_path):
    """The URL of a database, and how to ask its server with all rights."""
    if driver == "aiosqlite":
        return f"sqlite+aiosqlite:///{tmp_path}/a.db", ""
    if driver in ("psycopg", "asyncpg"):
        server = request.getfixturevalue("postgresql")
        url = request.getfixturevalue("postgresql_url").replace("psycopg", driver)
        return url, f"{server.folder}:{server.port}"
    url = request.getfixturevalue("mariadb_url").replace("pymysql", driver)
    return url, request.getfixturevalue("mariadb").socket


@pytest.mark.parametrize(("driver", "loop", "ending"), cases(ENDINGS))
def test_loop_leaves_nothing_behind_when_it_ends(driver, where, loop, ending):
    """Twice in one process: with every connection idle, or in a transaction of a task that is pending then, or in the
    middle of a statement; because main returned, failed, or a task was interrupted; and by nothing but close()."""
    end_of_loop(
        where,
        loop,
        ending,
        """
    async def main():
        await use_all()
        if ending == "running":
            async with aio.running():
                await use("running")
                await asyncio.create_task(use_all())
            # They are closed; the server, or a thread in its last line, may need a moment more. The loop stands still.
            wait_until(lambda: not connections(), 20, "no connection is left")
        elif ending == "closed_transaction":
            await use("main")
        elif ending not in ("well", "closed"):
            await hold_one()
            await use("main")
        if ending == "statement":
            slow = {"m": "SELECT SLEEP(2)", "p": "SELECT pg_sleep(2)", "s": "SELECT 1"}[url[0]]
            async def execute():
                await session.execute(text(slow))
            keep.append(asyncio.create_task(execute()))
            await asyncio.sleep(0.05)  # sent by then, as a rule; nothing left behind is asked in any case
        elif ending == "error":
            raise LookupError("of main")
        elif ending in ("interrupt", "exit"):
            async def die():
                await use("dying")
                raise KeyboardInterrupt if ending == "interrupt" else SystemExit(3)
            dying = asyncio.create_task(die())
            try:
                await asyncio.Event().wait()
            finally:
                dying.exception()

    def run():
        if ending.startswith("closed"):
            loop = new_loop()
            try:
                loop.run_until_complete(main())
            finally:
                loop.close()
        else:
            with asyncio.Runner(loop_factory=new_loop) as runner:
                runner.run(main())

    expected = {"error": LookupError, "interrupt": KeyboardInterrupt, "exit": SystemExit}.get(ending)
    for _ in range(2):
        try:
            run()
        except BaseException as error:
            assert type(error) is expected, repr(error)
        else:
            assert expected is None
        keep.clear()
        wait_until(lambda: not connections(), 20, "no connection is left")
        gc.collect()
    print("done")
    """,
    )


@pytest.mark.parametrize(("driver", "loop", "ending"), cases(["fork"]))
def test_fork_in_a_task_leaves_the_parents_connections_alone(driver, where, loop, ending):
    """In the middle of a transaction; the child uses sessions in a loop of its own, and ends."""
    end_of_loop(
        where,
        loop,
        ending,
        """
    async def main():
        await use_all()
        await hold_one()
        me = text({"m": "SELECT CONNECTION_ID()", "p": "SELECT pg_backend_pid()", "s": "SELECT 1"}[url[0]])
        await session.execute(text("CREATE TABLE t (n INT)"))
        await session.execute(text("INSERT INTO t VALUES (1)"))
        mine = await session.scalar(me)
        pid = os.fork()
        if pid == 0:
            in_child(mine, me)
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert await session.scalar(me) == mine
        await session.commit()
        async with aio.session_scope():
            assert await session.scalar(text("SELECT COUNT(*) FROM t")) == 1
        await use_all()

    def in_child(mine, me):
        status = 1
        try:
            async def child():
                be_patient()
                found = await session.scalar(me)
                assert "sqlite" in url or found != mine
                await use_all()
            with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
                runner.run(child())
            gc.collect()
            status = 0
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            os._exit(status)

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(main())
    wait_until(lambda: not connections(), 20, "no connection is left")
    keep.clear()
    gc.collect()
    print("done")
    """,
    )
