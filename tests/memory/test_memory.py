"""Nothing grows with the number of units of work that have ended."""

from __future__ import annotations

import pytest

from support.processes import run_python

MEASURE = """
import sys
if sys.argv[2] == "patched":
    from gevent import monkey; monkey.patch_all()
import gc, re
import gevent, dbsession
from sqlalchemy import text
dbsession.configure({"default": f"sqlite:///{sys.argv[1]}/a.db"})
session = dbsession.get_dbsession()

def private_bytes():
    gc.collect()
    with open("/proc/self/smaps_rollup") as file:
        return 1024 * int(re.search(r"Private_Dirty: +(\\d+)", file.read())[1])

def growth_per_cycle(cycle, warm_up, cycles):
    for _ in range(warm_up):
        cycle()
    before = private_bytes()
    for _ in range(cycles):
        cycle()
    return (private_bytes() - before) / cycles
"""


@pytest.mark.slow
@pytest.mark.parametrize("patched", ["patched", "plain"])
def test_million_get_and_clear_cycles_leave_less_than_two_bytes_each(tmp_path, patched):
    run_python(
        MEASURE
        + """
def cycle():
    dbsession.get_dbsession("default")()
    dbsession.clear_dbsession()
grown = growth_per_cycle(cycle, 20_000, 1_000_000)
assert grown < 2, grown
""",
        tmp_path,
        patched,
        timeout=900,
    )


# What is a part of another is left to the slow ones.
@pytest.mark.parametrize(
    "what",
    [
        *(pytest.param(each, marks=pytest.mark.slow) for each in ("scope", "raw", "request")),
        "greenlet",
        "streamed request",
    ],
)
def test_units_of_work_that_ended_leave_nothing(tmp_path, what):
    run_python(
        MEASURE
        + """
def scope():
    with dbsession.session_scope():
        session()
def greenlet_():
    gevent.spawn(session).join()
def raw():
    gevent.spawn_raw(session)
    gevent.sleep(0)
def body():
    session()
    yield b""
def request(make=lambda: [b""]):
    def app(environ, start_response):
        session()
        return make()
    answer = dbsession.DBSessionMiddleware(app)({}, None)
    for _ in answer:
        pass
    if hasattr(answer, "close"):
        answer.close()
cycles = {"scope": scope, "greenlet": greenlet_, "raw": raw, "request": request,
          "streamed request": lambda: request(body)}
grown = growth_per_cycle(cycles[sys.argv[3]], 5_000, 40_000)
assert grown < 20, grown                          # a page or two of the allocator's, over 40,000
""",
        tmp_path,
        "plain",
        what,
        timeout=300,
    )


def test_dead_greenlets_leave_no_entry_and_no_object(tmp_path):
    run_python(
        MEASURE
        + """
from dbsession.green import ident
from dbsession.green.scope import Scope
import greenlet
gc.collect()
before = sum(isinstance(o, Scope) for o in gc.get_objects())
for _ in range(1000):
    gevent.spawn(session.execute, text("SELECT 1"))
    raw = greenlet.greenlet(lambda: session.execute(text("SELECT 1")))
    raw.switch()
    del raw
    gevent.sleep(0)
with gevent.Timeout(30):
    while ident._unlinked or dbsession.get_engine().pool.checkedout():
        gevent.sleep(0)
gc.collect()
assert sum(isinstance(o, Scope) for o in gc.get_objects()) == before
assert dbsession.get_engine().pool.checkedout() == 0
""",
        tmp_path,
        "plain",
    )
