"""The leak watch of greenlets and threads, in each mode; what both halves have is in core/pool."""

from __future__ import annotations

import textwrap

import pytest

from support.processes import run_python, run_script

# `heard` has (level, text) of each line; `handlers` may be added to.
START = """
    import gc, logging, os, re, sys
    from sqlalchemy import text
    from dbsession.core.pool import leaks
    from dbsession.green import holders

    leaks._LONGEST_S = 0.05  # so that the tests need not wait for the next look
    heard = []
    class Keep(logging.Handler):
        def emit(self, record):
            heard.append((record.levelname, record.getMessage()))
    logging.getLogger("dbsession.leaks").addHandler(Keep())
    logging.getLogger("dbsession.leaks").setLevel("INFO")

    def configure(name="default", **entry):
        return {name: {"url": f"sqlite:///{sys.argv[1]}/{name}.db", **entry}}
    session = dbsession.get_dbsession()

    def told(level, part, count=1):
        "The first such line, as soon as there are so many."
        found = lambda: [line for line in list(heard) if line[0] == level and part in line[1]]
        wait_until(lambda: len(found()) >= count, 20, f"{level} {part}")
        assert len(found()) == count, found()
        return found()[0][1]

    class Event:
        "One that works in each mode, between greenlets and between threads."
        def __init__(self): self.is_set = False
        def set(self): self.is_set = True
        def wait(self): wait_until(lambda: self.is_set, 20)

    def hold(end, label="the import", before=None, **scope):
        with dbsession.session_scope(label):
            session.execute(text("SELECT 'secret'"))
            if before: before()
            end.wait()
"""


@pytest.fixture
def run(mode, tmp_path):
    def run(source: str, *args: object) -> str:
        return run_script(mode, textwrap.dedent(START) + textwrap.dedent(source), tmp_path, *args).stderr

    return run


def test_leak_is_told_once_with_holder_and_stack_and_its_return(run):
    """Two connections: each is told of by itself; what comes back in time is not."""
    run(
        r"""
        dbsession.configure(configure(leak_after_s=1))
        end = Event()
        tasks = [spawn(hold, end), spawn(hold, end, "the export")]
        said = told("WARNING", "the import")
        assert "Database 'default'" in said and "leak_after_s=1 s" in said
        assert "secret" not in said and "last statement: SELECT ?" in said
        stack = said.partition(" Its stack now, innermost first:\n")[2].splitlines()
        assert any(re.fullmatch(r"    .*script.py:\d+ in hold", site) for site in stack), stack
        assert ", now at " in said and "checked out" not in said
        told("WARNING", "the export")
        # Others come and go meanwhile, and one that is held long after the first were told of.
        for _ in range(20):  # in much less than leak_after_s each, however busy the machine is
            with dbsession.session_scope("short"):
                session.execute(text("SELECT 1"))
        other = Event()
        third = spawn(hold, other, "the third")
        said = told("WARNING", "the third")
        now, _, taken = said.partition(" The stack of its checkout, innermost first:\n")
        assert re.search(r"^    .*script.py:\d+ in hold$", now, re.M), said
        assert re.search(r"^    .*script.py:\d+ in hold$", taken, re.M) and ", checked out at " in now, said
        assert len(heard) == 3, heard
        end.set()
        join(tasks)
        assert re.search(r"was returned after \d+\.\d s\.$", told("INFO", "the import"))
        told("INFO", "the export")
        other.set()
        join(third)
        told("INFO", "the third")
        assert len(heard) == 6, heard
        """,
    )


@pytest.mark.parametrize("limit", ["leak_after_s", "idle_in_transaction_s"])
def test_short_limit_is_kept_when_the_connection_is_taken_after_a_look(run, limit):
    """The pause between two looks is short then, too."""
    run(
        """
        leaks._LONGEST_S = 60
        dbsession.configure(configure(**{"leak_after_s": 0, sys.argv[2]: 0.2}))
        with dbsession.session_scope("the first"):
            session.execute(text("SELECT 1"))
        wait_until(lambda: holders._leak_watch._pause_s != 1.0, 20, "it has looked")
        end = Event()
        task = spawn(hold, end)
        told("WARNING", "the import")
        end.set()
        join([task])
        """,
        limit,
    )


def test_watcher_goes_on_when_a_log_handler_fails_or_does_not_return(run):
    errors = run(
        """
        stuck, end = Event(), Event()
        class Fails(logging.Handler):
            def emit(self, record):
                if "one" in record.getMessage():
                    raise RuntimeError("this handler fails")
        class NoLock:
            def acquire(self): pass
            release = __enter__ = acquire
            def __exit__(self, *_): pass
        class Waits(logging.Handler):
            def createLock(self):
                self.lock = NoLock()  # or logging itself lets nobody else log
            def emit(self, record):
                if "two" in record.getMessage():
                    stuck.wait()
        passed = []
        class Last(logging.Handler):
            def emit(self, record):
                passed.append(record.getMessage())
        logger = logging.getLogger("dbsession.leaks")
        dbsession.configure(configure(leak_after_s=0.1))
        for handler in (Fails(), Waits(), Last()):
            logger.addHandler(handler)
        tasks = []
        for label in ("one", "two", "three"):
            tasks.append(spawn(hold, end, label))
            told("WARNING", label)  # the first handler hears it
        end.set()
        join(tasks)
        told("INFO", "three")
        stuck.set()
        # Or a thread that is still logging meets the interpreter's end.
        wait_until(lambda: sum("two" in each for each in passed) == 2 == sum("three" in each for each in passed), 20)
        """,
    )
    assert "this handler fails" in errors


@pytest.mark.parametrize("how", ["os._exit", "sys.exit"])
def test_child_of_a_fork_watches_its_own_connections_and_never_the_parents(run, how):
    run(
        """
        dbsession.configure(configure(leak_after_s=0.3))
        end = Event()
        task = spawn(hold, end, "the parent's")
        sleep(0)
        # Its statement is over: SQLite's own mutex, held by another thread at the fork, stays held in the child.
        wait_until(lambda: [each.state for each in dbsession.snapshot().holders] == ["idle in transaction"], 10)
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                heard.clear()
                assert not dbsession.snapshot().holders
                for label in ("the child's", "the child's second"):
                    with dbsession.session_scope(label):
                        session.execute(text("SELECT 1"))
                        told("WARNING", label + " (")
                    told("INFO", label + " was")
                assert len(heard) == 4, heard
                status = 0
            except BaseException:
                import traceback; traceback.print_exc()
            finally:
                sys.stderr.flush()
                if status or sys.argv[2] == "os._exit":
                    os._exit(status)
                sys.exit(0)
        told("WARNING", "the parent's")
        def reaped():
            found, status = os.waitpid(pid, os.WNOHANG)
            assert not status, status
            return found
        wait_until(reaped, 30)
        end.set()
        join(task)
        told("INFO", "the parent's")
        assert len(heard) == 2, heard
        """,
        how,
    )


@pytest.mark.parametrize(
    "ends", ["gevent.wait()", "gevent.get_hub().join()", "pass", "hold()", "hold(True)", "raise SystemExit"]
)
@pytest.mark.parametrize("patched", [True, False])
def test_process_ends_in_silence_while_the_watch_runs(patched, ends, tmp_path):
    """gevent.wait() waits for every greenlet and what else keeps the loop running. `hold()`: with one in use, `True`:
    which was reported."""
    ended = run_python(
        f"""
        {"from gevent import monkey; monkey.patch_all()" if patched else ""}
        import atexit, gevent, dbsession, logging
        from sqlalchemy import text
        from dbsession.core.pool import leaks
        from dbsession.green import holders
        from support.waiting import wait_until
        logging.getLogger("dbsession").addHandler(logging.NullHandler())
        atexit.register(dbsession.dispose)  # or Python says of a file that it is still open
        dbsession.configure({{"default": {{"url": "sqlite:///{tmp_path}/a.db", "leak_after_s": 0.05}}}})
        session = dbsession.get_dbsession()
        gevent.sleep(0)
        gevent.spawn(session.execute, text("SELECT 1")).join()
        def hold(reported=False):
            global held
            held = dbsession.get_engine().connect()
            held.execute(text("SELECT 1"))
            atexit.register(held.connection.dbapi_connection.close)
            wait_until(lambda: not reported or held.connection.record_info["dbsession.checkout"].reported)
        assert holders._leak_watch._started
        {ends}
        """,
    )
    assert ended.stderr == "" == ended.stdout


def test_watch_does_not_stop_a_process_from_ending_in_a_thread_of_ours(tmp_path):
    """Many looks a second, and the interpreter ends at whichever line of them."""
    for _ in range(5):
        ended = run_python(
            f"""
            import atexit, dbsession
            from dbsession.core.pool import leaks
            from dbsession.green import holders
            leaks._SHORTEST_S = leaks._LONGEST_S = 0.00001
            dbsession.configure({{"default": {{"url": "sqlite:///{tmp_path}/a.db", "leak_after_s": 1000}}}})
            held = dbsession.get_engine().connect()
            atexit.register(held.connection.dbapi_connection.close)
            """,
        )
        assert ended.stderr == "" == ended.stdout


def test_watcher_is_one_for_all_engines_and_goes_on_after_them(run):
    run(
        """
        for n in range(3):
            manager = dbsession.SessionManager(configure(f"db{n}", leak_after_s=0.1))
            with manager.scope("job"):
                manager.get(f"db{n}").execute(text("SELECT 1"))
                told("WARNING", f"'db{n}'")
            manager.dispose()
            del manager
            gc.collect()
        assert len(holders._leak_watch._started) == 1
        wait_until(lambda: gc.collect() >= 0 and not holders.leak_watches, 10)
        """,
    )
