"""F15, F18 on a real Galera cluster: a writer that dies or stands still, a node outside the cluster, certification."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from support.galera import GaleraCluster, GaleraMissing
from support.processes import missing, run_script

pytestmark = [pytest.mark.galera, pytest.mark.slow]

# What both scripts with a load begin with. A script says at its end what each unit of work was told.
UNITS = """
import gc, itertools, json, sys
from sqlalchemy import text
from sqlalchemy.exc import OperationalError, SQLAlchemyError
from dbsession.errors import CommitOutcomeUnknown
from support.galera_node import NodeControl

gc.disable()  # nothing may depend on it
told = {}  # token -> what its unit of work was told; each unit writes its own
stopped = []  # not empty: no further unit begins
gone = []  # not empty: the server is gone, and who waited for that commits
numbers = itertools.count()

def entry(url):
    return {"url": url, "options": {"pool_size": 5}, "connect_timeout_s": 5, "read_timeout_s": 8, "write_timeout_s": 8}

def unit(name="default", before_commit=lambda: None):
    token = f"t{next(numbers)}"
    with dbsession.session_scope("unit") as scope:
        session = dbsession.get_dbsession(name)
        try:
            session.execute(text("INSERT INTO unit (token) VALUES (:token)"), {"token": token})
            before_commit()
            session.commit()
        except CommitOutcomeUnknown:
            told[token] = "unknown"
            assert scope.outcome == "unknown", scope.outcome
        except SQLAlchemyError as error:
            told[token] = "failed"
            assert scope.outcome not in ("committed", "unknown"), (scope.outcome, error)
        else:
            told[token] = "acknowledged"
            assert scope.outcome == "committed", scope.outcome
    return told[token]

def load():
    while not stopped:
        if unit() != "acknowledged":
            sleep(0.01)  # else the others get no turn while each connect is refused at once

def acknowledged():
    return sum(outcome == "acknowledged" for outcome in told.values())

def half_done(name):
    '''A unit of work that has written, and commits when the server is gone.'''
    written = []
    def wait():
        written.append(True)
        wait_until(lambda: gone, 100)
    task = spawn(unit, name, wait)
    wait_until(lambda: written, 20)
    return task

def hold_all(name):
    '''Fills the pool: five units of work at once.'''
    arrived = []
    def wait_for_all():
        arrived.append(1)
        wait_until(lambda: len(arrived) == 5, 20)
    assert join([spawn(unit, name, wait_for_all) for _ in range(5)]) == ["acknowledged"] * 5
    assert checked_out(dbsession.get_engine(name)) == 0
"""


@pytest.fixture(scope="module")
def cluster():
    try:
        cluster = GaleraCluster()
    except GaleraMissing as absent:
        missing(str(absent))
    try:
        yield cluster
    finally:
        cluster.close()


@pytest.fixture
def galera(cluster):
    """The cluster, whole, with the first node as the writer and an empty table `unit`."""
    cluster.ensure_healthy()
    with cluster.nodes[0].root() as cursor:
        cursor.execute("DROP TABLE IF EXISTS app.unit, app.hot")
        cursor.execute("CREATE TABLE app.unit (id BIGINT AUTO_INCREMENT PRIMARY KEY, token VARCHAR(20) NOT NULL)")
    return cluster


def check_stored(galera, told):
    """On each node: what was acknowledged is there once, what failed is not, the rest at most once."""
    galera.ensure_healthy()
    for node in galera.nodes:
        stored = Counter(token for (token,) in node.rows("SELECT token FROM app.unit"))
        allowed = {"acknowledged": (1,), "failed": (0,), "unknown": (0, 1)}
        wrong = {t: (outcome, stored[t]) for t, outcome in told.items() if stored[t] not in allowed[outcome]}
        assert not wrong, f"{node.name}: {wrong}"
        assert set(stored) <= {*told, "probe"}


@pytest.mark.parametrize("fault", ["kill", "pause"])
def test_f18_acknowledged_work_is_stored_once_when_the_writer_dies(galera, fault):
    """Behind haproxy, under load. Nothing that was reported as failed is stored, no place in the pool is lost, and
    from the moment that haproxy leads to another node nothing fails any more, on connections of before neither."""
    writer = galera.nodes[0]
    done = run_script(
        "patched",
        UNITS
        + """
import contextlib
import pymysql
from sqlalchemy.engine import make_url

url, path, pid, fault = sys.argv[1:]
dbsession.configure({"default": entry(url), "idle": entry(url), "other": entry(url)})
hold_all("idle")  # its connections then wait in the pool

def moved():
    arguments = make_url(url).translate_connect_args(username="user")
    try:
        connection = pymysql.connect(**arguments, autocommit=True, connect_timeout=5, read_timeout=5)
        with contextlib.closing(connection), connection.cursor() as cursor:
            cursor.execute("SELECT @@wsrep_node_name")
            (name,) = cursor.fetchone()
            cursor.execute("INSERT INTO unit (token) VALUES ('probe')")  # waits for the cluster without n1
            return name != "n1"
    except pymysql.err.OperationalError:
        return False

held = half_done("other")
tasks = [spawn(load) for _ in range(8)]
wait_until(lambda: acknowledged() > 100, 60)
getattr(NodeControl(path, int(pid)), fault)()
wait_until(moved, 40)
first = next(numbers)
wait_until(lambda: sum(int(token[1:]) > first for token in list(told)) > 50, 60)
gone.append(True)
stopped.append(True)
join([*tasks, held])
assert held.result != "acknowledged"  # the rest of the load may have been lucky: all in a ping, say
after = [outcome for token, outcome in told.items() if int(token[1:]) > first]
assert checked_out(dbsession.get_engine()) == checked_out(dbsession.get_engine("other")) == 0
assert join([spawn(unit, "idle") for _ in range(10)]) == ["acknowledged"] * 10
assert checked_out(dbsession.get_engine("idle")) == 0
print(json.dumps({"told": told, "after": after}))
dbsession.dispose()
""",
        galera.url(),
        writer.socket,
        writer.pid,
        fault,
        timeout=250,
    )
    result = json.loads(done.stdout)
    assert set(result["after"]) == {"acknowledged"}, Counter(result["after"])
    check_stored(galera, result["told"])


def test_f15_non_primary_node_costs_no_place_and_heals(galera):
    """1047 fails the ROLLBACK as well, and lets the ping pass. Work that was under way when the node left the cluster
    is told the truth, 50 requests to it fail, and the first one after its return succeeds."""
    node = galera.nodes[2]
    done = run_script(
        "patched",
        UNITS
        + """
url, path = sys.argv[1:]
dbsession.configure({"default": entry(url), "other": entry(url)})
engine = dbsession.get_engine()
node = NodeControl(path)
hold_all("default")
held = half_done("other")
tasks = [spawn(load) for _ in range(8)]
wait_until(lambda: acknowledged() > 50, 60)
node.isolate()
gone.append(True)
stopped.append(True)
join([*tasks, held])
assert held.result != "acknowledged"
assert checked_out(engine) == checked_out(dbsession.get_engine("other")) == 0

codes = []

def request():
    with dbsession.session_scope():
        try:
            dbsession.get_dbsession().execute(text("SELECT COUNT(*) FROM unit"))
        except OperationalError as error:
            codes.append(error.orig.args[0])
            assert error.connection_invalidated

join([spawn(request) for _ in range(50)])
assert len(codes) == 50
assert checked_out(engine) == 0

node.rejoin()
assert unit() == "acknowledged"
assert join([spawn(unit) for _ in range(10)]) == ["acknowledged"] * 10
assert checked_out(engine) == 0
print(json.dumps({"told": told, "codes": codes}))
dbsession.dispose()
""",
        galera.url(2),
        node.socket,
        timeout=250,
    )
    result = json.loads(done.stdout)
    assert Counter(result["codes"]) == {1047: 50}
    check_stored(galera, result["told"])


def test_galera_certification_failure_at_commit_is_retried(galera):
    """Two writers increment one row: the cluster refuses one of them with 1213 at COMMIT, and all of it is run again.
    What was acknowledged is what is stored."""
    with galera.nodes[0].root() as cursor:
        cursor.execute("CREATE TABLE app.hot (id INT PRIMARY KEY, n INT NOT NULL)")
        cursor.execute("INSERT INTO app.hot VALUES (1, 0)")
    done = run_script(
        "patched",
        """
        import gc, json, sys
        from collections import Counter
        from sqlalchemy import text

        gc.disable()
        urls = dict(zip(("one", "two"), sys.argv[1:]))
        dbsession.configure({name: {"url": url, "options": {"pool_size": 5}} for name, url in urls.items()})
        seen = Counter()

        def writer(name):
            while seen["acknowledged"] < 100 or seen["refused at COMMIT"] < 3:
                whole = []  # one entry for each time that all but the COMMIT went well

                def increment(session):
                    session.execute(text("UPDATE hot SET n = n + 1 WHERE id = 1"))
                    sleep(0.002)  # the other node's commit has a chance to arrive
                    whole.append(True)

                dbsession.run_in_transaction(increment, name=name, attempts=50, backoff_s=0.01)
                seen["acknowledged"] += 1
                seen["refused at COMMIT"] += len(whole) - 1

        join([spawn(writer, name) for name in urls for _ in range(2)], 150)
        assert [checked_out(dbsession.get_engine(name)) for name in urls] == [0, 0]
        print(json.dumps(seen))
        dbsession.dispose()
        """,
        galera.url(0),
        galera.url(1),
        timeout=200,
    )
    seen = json.loads(done.stdout)
    for node in galera.nodes:
        assert node.rows("SELECT n FROM app.hot") == [(seen["acknowledged"],)]
    assert seen["refused at COMMIT"] >= 3
