"""F11, again and again: what a fork breaks it breaks by a race, so that one clean run would prove nothing."""

from __future__ import annotations

import pytest

from support.processes import run_script
from support.proxy import Proxy

pytestmark = pytest.mark.slow

SCRIPT = """
import gc, os, sys, threading, traceback
from sqlalchemy import text
from support.proxy import ProxyControl

url, proxy, rounds = sys.argv[1], ProxyControl(int(sys.argv[2])), int(sys.argv[3])
dbsession.configure({"default": {"url": url, "options": {"pool_size": 6}}})
session, engine = dbsession.get_dbsession(), dbsession.get_engine()

def read_tokens(who, count):
    for k in range(count):
        with dbsession.session_scope():
            token = f"{who}-{k}"
            assert session.scalar(text("SELECT :t"), {"t": token}) == token
            sleep(0)
            assert session.scalar(text("SELECT :t"), {"t": token * 2}) == token * 2

def transaction(number, ready, go_on):
    "A transaction that is open while others fork; its row has to be there in the end."
    with dbsession.session_scope():
        session.execute(text("INSERT INTO t VALUES (:n)"), {"n": number})
        inherited.append(session())
        ready.wait(20)
        assert go_on.wait(100)
        assert session.scalar(text("SELECT COUNT(*) FROM t WHERE n = :n"), {"n": number}) == 1
        session.commit()

def child(who):
    join([spawn(read_tokens, f"{who}-{k}", 3) for k in range(2)])
    assert engine.pool.checkedout() == 0
    for held in inherited:
        for use in (lambda: held.execute(text("SELECT 1")), held.commit, held.rollback, held.close):
            try:
                use()
            except Exception:
                pass
    inherited.clear()
    gc.collect()
    dbsession.dispose()

def fork(who, quiet):
    pid = os.fork()
    if pid:
        return pid
    try:
        child(who)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    if quiet:
        sys.exit(0)  # with atexit, finalizers and all
    os._exit(0)

def reap(pids):
    for pid in pids:
        done, status = wait_until(lambda: (lambda found: found if found[0] else None)(os.waitpid(pid, os.WNOHANG)), 20)
        assert status == 0, status

with dbsession.session_scope():
    session.execute(text("CREATE TABLE t (n INTEGER)"))
    session.commit()
for round in range(rounds):
    inherited, go_on, ready = [], threading.Event(), threading.Barrier(3)
    tasks = [spawn(transaction, 2 * round + k, ready, go_on) for k in range(2)]
    ready.wait(20)
    join([spawn(read_tokens, f"idle-{k}", 1) for k in range(2)])  # leaves two idle connections
    assert engine.pool.checkedout() == 2 and engine.pool.checkedin() >= 1

    # While this process is quiet, what inherited connections send would be a child's.
    # Those of the children before are closed, which the proxy may see late, with their last bytes.
    own = engine.pool.checkedout() + engine.pool.checkedin()
    wait_until(lambda: sum(each["open"] for each in proxy.connections()) == own, 20, "only the parent's are open")
    before = proxy.connections()
    reap([fork(f"quiet-{round}", True)])
    after = proxy.connections()
    assert len(after) > len(before), "the child opened none of its own"
    assert after[:len(before)] == before, [pair for pair in zip(before, after) if pair[0] != pair[1]]

    pids = [fork(f"busy-{round}-{n}", False) for n in range(2)]
    join([spawn(read_tokens, f"parent-{round}-{k}", 5) for k in range(2)])
    reap(pids)
    go_on.set()
    join(tasks)
    assert engine.pool.checkedout() == 0
with dbsession.session_scope():
    assert session.scalars(text("SELECT n FROM t ORDER BY n")).all() == list(range(2 * rounds))
"""


@pytest.mark.parametrize("rounds", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_f11_nothing_of_the_parent_breaks_when_it_forks_again_and_again(server, server_url, rounds):
    """With idle connections and open transactions, in a quiet parent and in a busy one: no wrong row, no error, not a
    byte of a child on an inherited connection, and every transaction of the parent is committed."""
    with Proxy(server.port) as proxy:
        url = server_url.replace(f":{server.port}/", f":{proxy.port}/")
        run_script("patched", SCRIPT, url, proxy.control_port, rounds, timeout=300)


@pytest.mark.parametrize("what", ["statement", "stream"])
def test_f11_child_never_has_a_statement_of_the_parent_ended(with_server, what):
    """The child's copies of the parent's greenlets and sessions end; what they wait for is the parent's still."""
    with_server(
        """
        import contextlib, os
        configure()
        before = server.kills()

        def in_child(work):
            pid = os.fork()
            if not pid:
                status = 1
                try:
                    work()
                    request()
                    # A side connection of the child's, if there is one, needs a moment before it shows.
                    for _ in range(30):
                        sleep(0.01)
                    status = 0
                finally:
                    os._exit(status)
            _, status = wait_until(lambda: (lambda done: done if done[0] else None)(os.waitpid(pid, os.WNOHANG)), 20)
            assert status == 0, status

        def statement():
            task = spawn(request, f"SELECT {db.sleep(2)}")
            running(db.sleep(2))
            in_child(task.handle.kill)
            assert join(task) == [0]

        def stream():
            with dbsession.session_scope():
                rows = session.execute(
                    text(f"SELECT 1 FROM {db.numbers(1_000_000)}"),
                    execution_options={"stream_results": True, "max_row_buffer": 10},
                )
                rows.fetchone()
                inherited = session()
                def roll_back():
                    with contextlib.suppress(exc.OperationalError):  # it may refuse
                        inherited.rollback()
                in_child(roll_back)
                assert sum(1 for _ in rows) == 999_999

        {"statement": statement, "stream": stream}[sys.argv[3]]()
        assert server.kills() == before
        nothing_in_use()
        """,
        what,
    )
