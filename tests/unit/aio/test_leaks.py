"""The leak watch of asyncio: from a thread, whatever the loops do; what both halves have is in core/pool."""

from __future__ import annotations

import asyncio
import logging
import textwrap
import threading

import pytest
from sqlalchemy import text

from dbsession import aio
from dbsession.aio import holders
from dbsession.core.pool import leaks
from support.loops import LOOPS, in_loop
from support.processes import run_python
from support.waiting import wait_until

DEADLINE_S = 30


@pytest.fixture(params=LOOPS)
def run(request):
    return in_loop(request.param)


class Heard(logging.Handler):
    """What the leak watch said: `lines` has (level, text)."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append((record.levelname, record.getMessage()))

    def found(self, level, part):
        return [said for heard, said in list(self.lines) if heard == level and part in said]

    def wait(self, level, part):
        """The one such line, as soon as it is there. Blocks the thread, and with it its loop."""
        wait_until(lambda: self.found(level, part), DEADLINE_S, f"{level} {part}")
        (said,) = self.found(level, part)
        return said

    async def told(self, level, part):
        """The same, and the loop goes on meanwhile."""
        while not self.found(level, part):
            await asyncio.sleep(0.001)
        (said,) = self.found(level, part)
        return said


@pytest.fixture
def heard(monkeypatch):
    monkeypatch.setattr(leaks, "_LONGEST_S", 0.05)
    logger, handler = logging.getLogger("dbsession.leaks"), Heard()
    logger.addHandler(handler)
    logger.setLevel("INFO")
    yield handler
    logger.setLevel(logging.NOTSET)
    logger.removeHandler(handler)


@pytest.fixture
def managed(tmp_path):
    """Makes a manager of one SQLite database; `managed(**entry)`."""
    return lambda **entry: aio.SessionManager({"default": {"url": f"sqlite:///{tmp_path}/a.db", **entry}})


def test_leak_is_told_while_the_loop_is_blocked(run, managed, heard):
    """Which is a reason for it."""
    manager = managed(leak_after_s=0.1)

    async def main():
        async with manager.scope("blocks"):
            await manager.get().execute(text("SELECT 1"))
            heard.wait("WARNING", "blocks")
        await heard.told("INFO", "blocks")

    run(main)


def test_connection_that_is_cut_off_at_the_loops_end_is_said_to_be_back(managed, heard):
    manager = managed(leak_after_s=0.1)
    kept = []

    async def main():
        kept.append(await manager.engine().connect())
        kept.append(manager.database("default"))
        await heard.told("WARNING", "main in Task-")

    asyncio.run(main())
    heard.wait("INFO", "main in Task-")
    assert not kept[1].held.notes()


def test_several_loops_in_threads_have_one_watcher(managed, heard):
    def job(name):
        manager = managed(leak_after_s=0.1)

        async def main():
            async with manager.scope(name):
                await manager.get().execute(text("SELECT 1"))
                await heard.told("WARNING", name)
            await heard.told("INFO", name)

        asyncio.run(main())

    threads = [threading.Thread(target=job, args=(f"job {n}",)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert len(heard.lines) == 6 and len(holders._leak_watch._started) == 1, heard.lines


def test_handler_that_waits_or_fails_costs_no_other_report_and_holds_no_loop_up(run, managed, heard, capfd):
    manager = managed(leak_after_s=0.1)
    stuck = threading.Event()

    class Fails(logging.Handler):
        def emit(self, record):
            if "one" in record.getMessage():
                raise RuntimeError("this handler fails")

    class Waits(logging.Handler):
        def handle(self, record):  # without the handler's lock, with which logging lets nobody else log
            if "two" in record.getMessage():
                assert stuck.wait(DEADLINE_S)

    logger = logging.getLogger("dbsession.leaks")
    added = [Fails(), Waits()]

    async def main():
        for label in ("one", "two", "three"):
            async with manager.scope(label):
                await manager.get().execute(text("SELECT 1"))
                await heard.told("WARNING", label)
        await heard.told("INFO", "three")

    for handler in added:
        logger.addHandler(handler)
    try:
        run(main)
        assert not stuck.is_set()
    finally:
        stuck.set()
        for handler in added:
            logger.removeHandler(handler)
    wait_until(lambda: "this handler fails" in capfd.readouterr().err, DEADLINE_S)


START = """
    import asyncio, logging, os, sys
    from sqlalchemy import text
    from dbsession import aio
    from dbsession.core.pool import leaks
    from dbsession.aio import holders
    from support.waiting import wait_until
    leaks._LONGEST_S = 0.05
    heard = []
    class Keep(logging.Handler):
        def emit(self, record):
            heard.append((record.levelname, record.getMessage()))
    logging.getLogger("dbsession.leaks").addHandler(Keep())
    logging.getLogger("dbsession.leaks").setLevel("INFO")
    def told(level, part):
        wait_until(lambda: [1 for each in list(heard) if each[0] == level and part in each[1]], 20, part)
"""


def script(source):
    return textwrap.dedent(START) + textwrap.dedent(source)


def test_child_of_a_fork_watches_its_own_connections_and_never_the_parents(tmp_path):
    run_python(
        script(
            f"""
            aio.configure({{"default": {{"url": "sqlite:///{tmp_path}/a.db", "leak_after_s": 0.3}}}})
            async def hold(label):
                async with aio.session_scope(label):
                    await aio.get_dbsession().execute(text("SELECT 1"))
                    told("WARNING", label + " (")
                told("INFO", label + " was")
            async def main():
                async with aio.session_scope("the parent's"):
                    await aio.get_dbsession().execute(text("SELECT 1"))
                    pid = os.fork()
                    if pid == 0:
                        os._exit(child())
                    told("WARNING", "the parent's")
                    assert os.waitpid(pid, 0)[1] == 0
                told("INFO", "the parent's")
                assert len(heard) == 2, heard
            def child():
                try:
                    asyncio.events._set_running_loop(None)
                    heard.clear()
                    asyncio.run(hold("the child's"))
                    assert len(heard) == 2 and len(holders._leak_watch._started) == 2, heard
                    return 0
                except BaseException:
                    import traceback; traceback.print_exc()
                    return 1
            asyncio.run(main())
            assert "gevent" not in sys.modules
            """
        ),
        timeout=60,
    )


@pytest.mark.parametrize("ends", ["pass", "raise SystemExit", "held.append(asyncio.new_event_loop())"])
def test_process_ends_in_silence_while_the_watch_runs(ends, tmp_path):
    """Many looks a second, with a connection in use that was reported, and one that is not back."""
    for _ in range(3):
        ended = run_python(
            script(
                f"""
                leaks._SHORTEST_S = leaks._LONGEST_S = 0.00001
                aio.configure({{"default": {{"url": "sqlite:///{tmp_path}/a.db", "leak_after_s": 0.05}}}})
                held = []
                async def main():
                    held.append(await aio.get_engine().connect())
                    told("WARNING", "main")
                asyncio.run(main())
                {ends}
                """
            ),
            timeout=30,
        )
        assert ended.stderr == "" == ended.stdout


def test_leak_is_told_in_a_process_that_gevent_has_patched_while_the_loop_blocks_the_hub(tmp_path):
    run_python(
        "from gevent import monkey; monkey.patch_all()\n"
        + script(
            f"""
            from time import monotonic
            from gevent.monkey import get_original
            sleep = get_original("time", "sleep")
            aio.configure({{"default": {{"url": "sqlite:///{tmp_path}/a.db", "leak_after_s": 0.1}}}})
            async def main():
                async with aio.session_scope("blocks"):
                    await aio.get_dbsession().execute(text("SELECT 1"))
                    end = monotonic() + 20
                    while not heard:
                        assert monotonic() < end, "not while the hub is blocked"
                        sleep(0.005)
                told("INFO", "blocks")
            asyncio.run(main())
            """
        ),
        timeout=60,
    )


def test_leak_is_told_after_the_gevent_thread_of_the_first_loop_has_ended(tmp_path):
    run_python(
        "from gevent import monkey; monkey.patch_all()\n"
        + script(
            f"""
            from gevent.threadpool import ThreadPool
            aio.configure({{"default": {{"url": "sqlite:///{tmp_path}/a.db", "leak_after_s": 0.1}}}})
            async def hold(label):
                async with aio.session_scope(label):
                    await aio.get_dbsession().execute(text("SELECT 1"))
                    told("WARNING", label)
            for label in ("first", "second"):
                pool = ThreadPool(1)
                pool.apply(asyncio.run, (hold(label),))
                pool.kill()
            """
        ),
        timeout=60,
    )


@pytest.mark.parametrize("half", ["asyncio", "gevent"])
def test_watch_begins_with_the_next_connection_when_no_thread_could_be_started(half, tmp_path):
    run_python(
        script(
            f"""
            import dbsession
            from dbsession.green import hub
            module, verbs = (holders, aio) if "{half}" == "asyncio" else (hub, dbsession)
            start = module._start_thread
            def refuse(*_):
                module._start_thread = start
                raise RuntimeError("can't start new thread")
            module._start_thread = refuse
            verbs.configure({{"default": {{"url": "sqlite:///{tmp_path}/a.db", "leak_after_s": 0.1}}}})
            async def done(value):
                return await value if verbs is aio else value
            async def main():
                first = await done(verbs.get_engine().connect())
                assert module._start_thread is start, "it was not asked for"
                second = await done(verbs.get_engine().connect())
                told("WARNING", "held")
                await done(first.close())
                await done(second.close())
            asyncio.run(main())
            """
        ),
        timeout=60,
    )
