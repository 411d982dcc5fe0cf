"""C code that forks runs no hook of Python's: the child finds out at its first use of anything inherited."""

from __future__ import annotations

import pytest

from support.processes import run_python
from support.proxy import Proxy

PRELUDE = """
import sys
if sys.argv[2] == "patched":
    from gevent import monkey; monkey.patch_all()
import ctypes, gc, os, time, traceback
import gevent, gevent.event, dbsession
from sqlalchemy import text
from support.dialects import dialect_of

c_fork = ctypes.CDLL(None).fork
dbsession.configure({"default": {"url": sys.argv[1], "options": {"pool_size": 2}}})
session, engine = dbsession.get_dbsession(), dbsession.get_engine()
is_server = engine.dialect.name != "sqlite"
own = text(f"SELECT {dialect_of(sys.argv[1]).who}" if is_server else "SELECT 0")
with dbsession.session_scope():
    session.execute(text("CREATE TABLE t (n INTEGER)"))
    session.commit()

def in_child(work, fork=c_fork, leave=os._exit):
    pid = fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            if status == 0:
                leave(0)
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0

def refused(use):
    try:
        use()
    except Exception:
        return True
"""

SLOW = [pytest.param(each, marks=pytest.mark.slow) for each in ("postgresql", "sqlite")]
DATABASES = pytest.mark.parametrize("database", ["mariadb", *SLOW])
GEVENT = pytest.mark.parametrize("gevent_mode", ["patched", pytest.param("plain", marks=pytest.mark.slow)])


@pytest.fixture
def url(request, tmp_path):
    kind = request.getfixturevalue("database")
    return f"sqlite:///{tmp_path}/a.db" if kind == "sqlite" else request.getfixturevalue(f"{kind}_url")


@DATABASES
@GEVENT
def test_f24_child_that_c_code_forked_abandons_what_it_inherited(url, database, gevent_mode):
    """The parent is in a transaction. A child, a child's child, and one that Python forked in it; first by a session,
    by the engine, by nothing but their end."""
    run_python(
        PRELUDE
        + """
session.execute(text("INSERT INTO t VALUES (1)"))
mine, parents = session(), session.scalar(own)

def use():
    assert session() is not mine
    assert not is_server or session.scalar(own) != parents
    assert session.scalar(text("SELECT COUNT(*) FROM t")) == 0
    assert refused(lambda: mine.execute(text("SELECT 1"))) and refused(mine.commit)
    dbsession.clear_dbsession()
    assert dbsession.get_engine() is engine and engine.pool.checkedout() == 0
    refused(mine.rollback)
    gc.collect()

def use_engine():
    with engine.connect() as connection:
        assert not is_server or connection.scalar(own) != parents
    assert engine.pool.checkedout() == 0 and engine.pool.checkedin() == 1

def first_the_inherited_one():
    assert refused(lambda: mine.execute(text("INSERT INTO t VALUES (2)")))
    use()

def look_on():
    assert dbsession.snapshot().databases[0].in_use == 0

for work in (use, use_engine, first_the_inherited_one, look_on, dbsession.dispose, dbsession.clear_dbsession,
             gc.collect, lambda: refused(mine.rollback), lambda: refused(mine.close), lambda: None):
    in_child(work, leave=sys.exit)
in_child(lambda: in_child(use))
in_child(lambda: in_child(use, os.fork))
in_child(lambda: in_child(use), os.fork)
assert session.scalar(own) == parents
session.commit()
assert session.scalar(text("SELECT COUNT(*) FROM t")) == 1
""",
        url,
        gevent_mode,
    )


@GEVENT
def test_f24_not_a_byte_of_a_child_that_c_code_forked_reaches_an_inherited_connection(server, server_url, gevent_mode):
    with Proxy(server.port) as proxy:
        run_python(
            PRELUDE
            + """
from support.proxy import ProxyControl
proxy = ProxyControl(int(sys.argv[3]))
session.execute(text("SELECT 1"))
inner = session()
raw = inner.connection().connection.dbapi_connection
with dbsession.session_scope():
    session.execute(text("SELECT 1"))                 # a second one, which is idle then
before = proxy.bytes_sent()

def ping():
    raw.ping(*((False,) if engine.dialect.name == "mysql" else (0, 5)))

for first in (inner.rollback, lambda: inner.execute(text("SELECT 1")), inner.close, raw.close, raw.commit, ping,
              lambda: raw.cursor().execute("SELECT 1"), session.remove, dbsession.clear_dbsession, dbsession.dispose,
              engine.dispose, inner.invalidate, lambda: None):
    def child():
        refused(first)
        gc.collect()
    in_child(child, leave=sys.exit)
after = proxy.bytes_sent()
assert after[:2] == before, (before, after)
assert session.scalar(text("SELECT 7")) == 7
""",
            server_url.replace(f":{server.port}/", f":{proxy.port}/"),
            gevent_mode,
            proxy.control_port,
        )


@pytest.mark.slow
def test_f24_greenlet_that_waits_for_an_answer_does_not_take_it_in_a_child_that_c_code_forked(server_url):
    """The child lets its loop run before it uses anything of ours; the parent's greenlet gets its answer."""
    run_python(
        PRELUDE
        + """
def ask():
    with dbsession.session_scope():
        return session.scalar(text(f"SELECT {dialect_of(sys.argv[1]).sleep(0.5)} + 7"))
asking = [gevent.spawn(ask) for _ in range(2)]
gevent.sleep(0.1)

def child():
    gevent.sleep(1)                                   # in which the answers come
    assert not any(each.successful() for each in asking)
    with dbsession.session_scope():
        assert session.scalar(text("SELECT 8")) == 8

in_child(child)
assert [each.get() for each in asking] == [7, 7]
""",
        server_url,
        "patched",
    )


@pytest.mark.slow
@DATABASES
@GEVENT
def test_f24_child_is_not_held_up_by_locks_and_builds_of_another_thread_of_its_parent(url, database, gevent_mode):
    run_python(
        PRELUDE
        + """
with dbsession.session_scope():
    session.execute(text("SELECT 1"))
started = gevent.event.Event()
def find(name):
    started.set()
    gevent.sleep(30 if os.getpid() == parent else 0)
    return sys.argv[1]
parent = os.getpid()
manager = dbsession.SessionManager(find)
builder = gevent.spawn(manager.engine, "other")
started.wait(10)

def child():
    with dbsession.session_scope():
        session.execute(text("SELECT 1"))
        manager.get("other").execute(text("SELECT 1"))
assert engine.pool._lock.acquire(False)               # as a thread that was in the midst of a return
in_child(child)
engine.pool._lock.release()
builder.kill()
""",
        url,
        gevent_mode,
    )


@pytest.mark.slow
@GEVENT
def test_f24_other_pools_hand_out_nothing_inherited(server_url, gevent_mode):
    run_python(
        PRELUDE
        + """
from sqlalchemy.pool import QueuePool, StaticPool
for pool in (QueuePool, StaticPool):
    manager = dbsession.SessionManager({"default": {"url": sys.argv[1], "options": {"poolclass": pool}}})
    other = manager.engine()
    with other.connect() as connection:
        parents = connection.scalar(own)
    def child():
        with other.connect() as connection:
            assert connection.scalar(own) != parents
        with other.connect() as connection:
            assert connection.scalar(own) != parents
    in_child(child)
    with other.connect() as connection:
        assert connection.scalar(own) == parents
    manager.dispose()
""",
        server_url,
        gevent_mode,
    )


@pytest.mark.slow
def test_f24_number_of_a_descriptor_that_c_code_has_given_to_somebody_else_is_left_alone(server_url):
    run_python(
        PRELUDE
        + """
session.execute(text("SELECT 1"))
descriptor = session().connection().connection.dbapi_connection
descriptor = getattr(descriptor, "_sock", descriptor).fileno()

def child():
    os.closerange(3, 100)                             # as what makes a daemon does
    read, write = (os.dup2(each, 90 + each) for each in os.pipe())
    os.dup2(write, descriptor)
    with dbsession.session_scope():
        assert session.scalar(text("SELECT 7")) == 7
    os.write(descriptor, b"x")
    assert os.read(read, 9) == b"x"

in_child(child)
assert session.scalar(text("SELECT 7")) == 7
""",
        server_url,
        "plain",
    )


@pytest.mark.slow
def test_f24_where_the_kernel_does_not_tell_of_a_fork_the_number_of_the_process_does(server_url):
    run_python(
        """
import mmap
class NoMadvise(mmap.mmap):
    def madvise(self, *_):
        raise OSError
mmap.mmap = NoMadvise
"""
        + PRELUDE
        + """
from dbsession.core import fork
assert type(fork.KNOWN).__name__ == "_ByPid"
session.execute(text("SELECT 1"))
mine, parents = session(), session.scalar(own)
def child():
    assert session() is not mine and session.scalar(own) != parents
in_child(child)
in_child(lambda: in_child(child), os.fork)
assert session.scalar(own) == parents
""",
        server_url,
        "plain",
    )


SQLITE_PARENT_CLOSES = """
import sqlite3
to_parent, to_child = os.pipe(), os.pipe()
def wait(end):
    assert os.read(end[0], 1) == b"x"
def tell(end):
    os.write(end[1], b"x")
def insert(n):
    with dbsession.session_scope():
        session.execute(text("INSERT INTO t VALUES (:n)"), {"n": n})
        session.commit()
"""


def test_f24_what_a_child_commits_to_sqlite_stays_when_its_parent_closes_the_file(tmp_path):
    """SQLite would have no lock of the child's own, and the parent, as the last one, would remove the WAL."""
    run_python(
        PRELUDE
        + SQLITE_PARENT_CLOSES
        + """
insert(1)
pid = c_fork()
if pid == 0:
    insert(2)
    tell(to_parent); wait(to_child)
    insert(3)
    os._exit(0)
wait(to_parent)
dbsession.dispose()
tell(to_child)
assert os.waitpid(pid, 0)[1] == 0
other = sqlite3.connect(sys.argv[1].removeprefix("sqlite:///"))
assert other.execute("SELECT n FROM t").fetchall() == [(1,), (2,), (3,)]
assert other.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
other.close()
""",
        f"sqlite:///{tmp_path}/a.db",
        "plain",
    )


def test_f24_parent_closes_its_file_of_sqlites_when_the_child_of_an_os_fork_has_its_locks(tmp_path):
    """The child is slow to come to its locks; the parent has to wait, and closes what was in use at the fork."""
    run_python(
        "import os, time\nos.register_at_fork(after_in_child=lambda: time.sleep(0.3))\n"
        + PRELUDE
        + SQLITE_PARENT_CLOSES
        + """
insert(1)
session.execute(text("SELECT 1"))
pid = os.fork()
if pid == 0:
    wait(to_child)
    insert(2)
    os._exit(0)
dbsession.clear_dbsession()
dbsession.dispose()
tell(to_child)
assert os.waitpid(pid, 0)[1] == 0
other = sqlite3.connect(sys.argv[1].removeprefix("sqlite:///"))
assert other.execute("SELECT n FROM t").fetchall() == [(1,), (2,)]
other.close()
""",
        f"sqlite:///{tmp_path}/a.db",
        "plain",
    )


@pytest.mark.slow
def test_f24_child_refuses_a_file_of_sqlites_that_its_parent_has_closed_before(tmp_path):
    run_python(
        PRELUDE
        + SQLITE_PARENT_CLOSES
        + """
insert(1)
pid = c_fork()
if pid == 0:
    wait(to_child)
    try:
        insert(2)
    except Exception as error:
        os._exit(0 if "dispose() before the fork" in str(error) else 1)
    os._exit(1)
dbsession.dispose()
insert(3)
tell(to_child)
assert os.waitpid(pid, 0)[1] == 0
assert session.scalar(text("SELECT COUNT(*) FROM t")) == 2
""",
        f"sqlite:///{tmp_path}/a.db",
        "plain",
    )


@pytest.mark.slow
@DATABASES
def test_f24_asyncio_child_that_c_code_forked_opens_connections_of_its_own(url, database):
    """In the midst of a transaction, with a loop in another thread; and where the parent's loop has ended."""
    run_python(
        """
import asyncio, ctypes, os, sys, threading
from dbsession import aio
from sqlalchemy import text

c_fork = ctypes.CDLL(None).fork
aio.configure({"default": sys.argv[1]})                # the driver is replaced by asyncio's
session = aio.get_dbsession()
own = text("SELECT CONNECTION_ID()" if "mysql" in sys.argv[1] else "SELECT NULL")

async def use():
    async with aio.session_scope():
        return await session.scalar(text("SELECT 7")), await session.scalar(own)

def in_child(mine):
    pid = c_fork()
    if pid == 0:
        answers = []
        thread = threading.Thread(target=lambda: answers.append(asyncio.run(use())))
        thread.start()
        thread.join(20)
        os._exit(0 if answers and answers[0][0] == 7 and (mine is None or answers[0][1] != mine) else 1)
    assert os.waitpid(pid, 0)[1] == 0

async def main():
    async with aio.session_scope():
        mine = await session.scalar(own)
        in_child(mine)
        assert await session.scalar(own) == mine
        await session.commit()

asyncio.run(main())
in_child(None)
assert asyncio.run(use())[0] == 7
""",
        url,
    )
