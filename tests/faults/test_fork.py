"""F11: after a fork the child abandons everything inherited; not a byte of its reaches the parent's connections."""

from __future__ import annotations

import os

import pytest
from sqlalchemy import event, text
from sqlalchemy.pool import StaticPool

from dbsession import SessionManager
from support.processes import run_python
from support.proxy import Proxy

PRELUDE = """
import sys
if sys.argv[2] == "patched":
    from gevent import monkey; monkey.patch_all()
import gc, os, time, traceback
import gevent, gevent.event, dbsession
from sqlalchemy import text
from gevent.monkey import get_original

from support.dialects import dialect_of

own = text(f"SELECT {dialect_of(sys.argv[1]).who}")
dbsession.configure({"default": {"url": sys.argv[1], "options": {"pool_size": 4}}})
session = dbsession.get_dbsession()

def in_child(work):
    "The exit status of a forked child that ran work(); 0 if it returned."
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            if status == 0 and "exit" in sys.argv:
                sys.exit(0)                       # with atexit, finalizers and all
            os._exit(status)
    return pid

def reap(pids):
    deadline = time.monotonic() + 60
    for pid in pids:
        while True:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                assert status == 0, status
                break
            assert time.monotonic() < deadline, "a child hangs"
            get_original("time", "sleep")(0.005) if sys.argv[2] != "patched" else gevent.sleep(0.005)
"""


@pytest.fixture
def manager(tmp_path):
    manager = SessionManager({"default": {"url": f"sqlite:///{tmp_path}/a.db", "options": {"pool_size": 2}}})
    with manager.scope():
        manager.get().execute(text("CREATE TABLE t (n INTEGER)"))
        manager.get().commit()
    yield manager
    manager.clear()
    manager.dispose()


def in_child(check):
    """Run check() in a forked child; whether it returned a true value."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            status = 0 if check() else 1
        finally:
            os._exit(status)
    return os.waitpid(pid, 0)[1] == 0


GEVENT = pytest.mark.parametrize("gevent_mode", ["patched", pytest.param("plain", marks=pytest.mark.slow)])


@GEVENT
@pytest.mark.parametrize("how", ["_exit", pytest.param("exit", marks=pytest.mark.slow)])
def test_f11_child_abandons_what_is_checked_out_and_the_parent_commits(server_url, gevent_mode, how):
    """The parent is in a transaction; the child uses the same scope, collects garbage, and ends in either way."""
    run_python(
        PRELUDE
        + """
engine = dbsession.get_engine()
session.execute(text("CREATE TABLE t (n INTEGER)"))
session.commit()
for n in range(10):
    session.execute(text("INSERT INTO t VALUES (:n)"), {"n": n})
    mine = session()
    parents_thread = session.scalar(own)
    def child():
        assert session() is not mine
        assert session.scalar(own) != parents_thread
        assert session.scalar(text("SELECT COUNT(*) FROM t")) == n, "the parent's uncommitted row, or a lost one"
        dbsession.clear_dbsession()
        global engine_of_child
        assert dbsession.get_engine() is engine and engine.pool.checkedout() == 0
        try:
            mine.execute(text("SELECT 1"))
        except Exception:
            pass
        else:
            raise AssertionError("an inherited session still works")
        gc.collect()
    reap([in_child(child) for _ in range(3)])
    assert session.scalar(own) == parents_thread
    session.commit()
assert session.scalar(text("SELECT COUNT(*) FROM t")) == 10
""",
        server_url,
        gevent_mode,
        how,
    )


@GEVENT
def test_f11_children_and_parent_read_their_own_rows_repeatedly(server_url, gevent_mode):
    run_python(
        PRELUDE
        + """
def use(tag):
    for k in range(20):
        with dbsession.session_scope():
            token = f"{tag}-{k}"
            assert session.scalar(text("SELECT :t"), {"t": token}) == token
with dbsession.session_scope():
    session.execute(text("SELECT 1"))             # an idle pooled connection to inherit
for round in range(25):
    pids = [in_child(lambda: use(f"child{c}")) for c in range(2)]
    use("parent")
    reap(pids)
""",
        server_url,
        gevent_mode,
        timeout=300,
    )


@GEVENT
def test_f11_not_a_byte_from_the_child_on_an_inherited_connection(server, server_url, gevent_mode):
    """Counted by a proxy: while the parent is idle, its two connections carry nothing."""
    with Proxy(server.port) as proxy:
        run_python(
            PRELUDE
            + """
from support.proxy import ProxyControl
proxy = ProxyControl(int(sys.argv[3]))
with dbsession.session_scope():
    session.execute(text("SELECT 1"))
    inner = session()
    with dbsession.session_scope():
        session.execute(text("SELECT 1"))         # one connection goes back to the pool
    before = proxy.bytes_sent()
    def child():
        held = [inner]
        for use in (lambda: inner.rollback(), lambda: inner.execute(text("SELECT 1")), inner.close):
            try: use()
            except Exception: pass                    # each may refuse: what it has sent counts
        session.remove()
        dbsession.clear_dbsession()
        dbsession.dispose()
        held.clear(); gc.collect()
    reap([in_child(child)])
    after = proxy.bytes_sent()
    assert len(before) == 2 and after[:2] == before, (before, after)  # a third one is the child's own
    assert session.scalar(text("SELECT 7")) == 7
""",
            server_url.replace(f":{server.port}/", f":{proxy.port}/"),
            gevent_mode,
            proxy.control_port,
            "exit",
        )


@GEVENT
def test_f11_sqlite_idle_connections_are_not_inherited(tmp_path, gevent_mode):
    """Parent and children write to the same file by turns; with an idle connection open at each fork."""
    run_python(
        PRELUDE
        + """
session.execute(text("CREATE TABLE t (n INTEGER)"))
session.commit()
dbsession.clear_dbsession()
def write(times):
    for _ in range(times):
        with dbsession.session_scope():
            session.execute(text("INSERT INTO t VALUES (1)"))
            session.commit()
for round in range(10):
    write(1)
    pids = [in_child(lambda: write(10)) for _ in range(3)]
    write(10)
    reap(pids)
assert session.scalar(text("SELECT COUNT(*) FROM t")) == 10 * (1 + 30 + 10)
assert session.scalar(text("PRAGMA integrity_check")) == "ok"
""",
        f"sqlite:///{tmp_path}/a.db",
        gevent_mode,
        timeout=300,
    )


@GEVENT
def test_f11_sqlite_child_reads_and_the_parents_transaction_commits(tmp_path, gevent_mode):
    run_python(
        PRELUDE
        + """
session.execute(text("CREATE TABLE t (n INTEGER)"))
session.commit()
session.execute(text("INSERT INTO t VALUES (1)"))
mine = session()
def child():
    assert session() is not mine
    assert session.scalar(text("SELECT COUNT(*) FROM t")) == 0
    for use in (lambda: mine.execute(text("SELECT 1")), lambda: mine.commit()):
        try:
            use()
        except Exception as error:
            assert "fork" in str(error), error
        else:
            raise AssertionError("an inherited SQLite connection still works")
    mine.rollback()
    gc.collect()
reap([in_child(child)])
session.commit()
assert session.scalar(text("SELECT COUNT(*) FROM t")) == 1
""",
        f"sqlite:///{tmp_path}/a.db",
        gevent_mode,
        "exit",
    )


def test_f11_engine_kept_by_the_user_keeps_its_listeners_in_the_child(tmp_path):
    run_python(
        PRELUDE
        + """
from sqlalchemy import event
engine, seen = dbsession.get_engine(), []
event.listen(engine, "connect", lambda *_: seen.append(os.getpid()))
session.execute(text("SELECT 1"))
def child():
    assert engine is dbsession.get_engine()
    session.execute(text("SELECT 1"))
    assert seen[-1] == os.getpid()
reap([in_child(child)])
""",
        f"sqlite:///{tmp_path}/a.db",
        "plain",
    )


def test_f11_build_under_way_in_another_greenlet_does_not_stop_the_child(tmp_path):
    run_python(
        PRELUDE
        + """
started = gevent.event.Event()
def find(name):
    started.set()
    gevent.sleep(30 if os.getpid() == parent else 0)
    return sys.argv[1]
parent = os.getpid()
dbsession.configure(find)
builder = gevent.spawn(dbsession.get_engine)
started.wait(5)
reap([in_child(lambda: dbsession.get_dbsession().execute(text("SELECT 1")))])
builder.kill()
""".replace("import gevent", "import gevent.event"),
        f"sqlite:///{tmp_path}/a.db",
        "patched",
    )


def test_f11_fork_after_configure_leaves_the_old_engines_transaction_alone(server_url):
    run_python(
        """
        import os, sys
        import dbsession
        from sqlalchemy import text
        dbsession.configure({"default": sys.argv[1]})
        session = dbsession.get_dbsession()
        session.execute(text("CREATE TABLE t (n INTEGER)"))
        session.commit()
        session.execute(text("INSERT INTO t VALUES (1)"))
        dbsession.configure({"default": sys.argv[1]})
        pid = os.fork()
        if pid == 0:
            dbsession.clear_dbsession()
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        session.commit()
        assert session.scalar(text("SELECT COUNT(*) FROM t")) == 1
        """,
        server_url,
    )


def test_f11_session_listeners_and_settings_survive_a_fork(manager):
    seen = []
    event.listen(manager.get(), "after_begin", lambda *_: seen.append(1))
    manager.get().configure(info={"set": "before"})

    def check():
        with manager.scope():
            manager.get().execute(text("SELECT 1"))
            return seen and manager.get().info == {"set": "before"}

    assert in_child(check)


def test_f11_fork_leaves_an_in_memory_database_of_the_parent_alone():
    manager = SessionManager({"default": {"url": "sqlite://", "options": {"poolclass": StaticPool}}})
    with manager.scope():
        manager.get().execute(text("CREATE TABLE t (n INTEGER)"))
        manager.get().commit()
    assert in_child(lambda: True)
    with manager.scope():
        assert manager.get().scalar(text("SELECT COUNT(*) FROM t")) == 0
    manager.dispose()


def test_f11_fork_without_a_free_descriptor_still_abandons(server_url):
    run_python(
        """
        import os, resource, sys
        import dbsession
        from sqlalchemy import text
        from support.dialects import dialect_of
        dbsession.configure({"default": sys.argv[1]})
        session, own = dbsession.get_dbsession(), text(f"SELECT {dialect_of(sys.argv[1]).who}")
        thread = session.scalar(own)
        opened = []
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        while True:
            try:
                opened.append(os.open("/dev/null", os.O_RDONLY))
            except OSError:
                break
        pid = os.fork()
        if pid == 0:
            for descriptor in opened:
                os.close(descriptor)
            os._exit(0 if session.scalar(own) != thread else 1)
        assert os.waitpid(pid, 0)[1] == 0
        assert session.scalar(own) == thread
        """,
        server_url,
    )


def test_f11_writer_that_waits_for_sqlites_lock_does_not_write_in_a_child(tmp_path):
    run_python(
        """
        from gevent import monkey; monkey.patch_all()
        import os, sqlite3, sys
        import gevent, dbsession
        from sqlalchemy import text
        path = f"{sys.argv[1]}/a.db"
        dbsession.configure({"default": {"url": f"sqlite:///{path}", "busy_timeout_s": 60}})
        session = dbsession.get_dbsession()
        with dbsession.session_scope():
            session.execute(text("CREATE TABLE t (n INTEGER)"))
            session.commit()
        holder = sqlite3.connect(path)
        holder.execute("BEGIN IMMEDIATE")
        failures = []
        def write():
            with dbsession.session_scope():
                try:
                    session.execute(text("INSERT INTO t VALUES (1)"))
                    session.commit()
                except BaseException as error:
                    failures.append(error)
                    raise
        job = gevent.spawn(write)
        gevent.sleep(0.01)
        pid = os.fork()
        if pid == 0:
            job.join(20)
            os._exit(0 if failures and "fork" in str(failures[0]) else 1)
        assert os.waitpid(pid, 0)[1] == 0
        holder.rollback()
        job.join(20)
        assert not failures and session.scalar(text("SELECT COUNT(*) FROM t")) == 1
        """,
        tmp_path,
    )
