"""The metrics of one process, and of processes that share a folder without gunicorn. Each test has an interpreter of
its own: prometheus_client decides at its import how it works, and its registry is the process's."""

from __future__ import annotations

import pytest

from support.processes import run_python

START = """
import os, sys
os.chdir(sys.argv[1])
import dbsession
from sqlalchemy import text
from dbsession.watch import metrics
from prometheus_client.parser import text_string_to_metric_families

def scrape(app=metrics.MetricsMiddleware(None), method="GET", accept=""):
    started = []
    environ = {"PATH_INFO": "/metrics", "REQUEST_METHOD": method, "QUERY_STRING": "", "HTTP_ACCEPT": accept}
    body = b"".join(app(environ, lambda *answer: started.append(answer)))
    assert started[0][0] == "200 OK", started
    families = text_string_to_metric_families(body.decode())
    return {
        (sample.name.removeprefix("dbsession_"), *sample.labels.values()): sample.value
        for family in families for sample in family.samples
    }

def use(session, times):
    for _ in range(times):
        with dbsession.session_scope():
            session.execute(text("SELECT 1"))

def manager(**options):
    return dbsession.SessionManager({"default": {"url": "sqlite:///a.db", "options": options}})
"""


@pytest.fixture
def shared(tmp_path):
    folder = tmp_path / "shared"
    folder.mkdir()
    return folder


def run(folder, source, **env):
    return run_python(START + source, folder, env=env)


def test_metrics_are_those_of_snapshot(tmp_path):
    run(
        tmp_path,
        """
dbsession.configure({"default": "sqlite:///a.db", "audit": "sqlite:///b.db"})
use(dbsession.get_dbsession(), 5)
use(dbsession.get_dbsession("audit"), 2)
with dbsession.session_scope():
    dbsession.get_dbsession()().execute(text("SELECT 1"))
    found = scrape()
    for pool in dbsession.snapshot().databases:
        name = pool.name
        assert found["pool_connections", name, "in_use"] == pool.in_use == (name == "default")
        assert found["pool_connections", name, "idle"] == pool.idle
        assert found["pool_size", name] == pool.size == found["pool_limit", name] == pool.limit == 20
        assert found["pool_waiting", name] == 0
        assert (found["oldest_holder_seconds", name] > 0) == (name == "default")
        assert found["checkouts_total", name] == pool.checkouts == (6 if name == "default" else 2)
        assert found["connects_total", name] == pool.connects == 1
        for short, histogram in ("pool_wait_seconds", pool.waits), ("connection_hold_seconds", pool.holds):
            below = 0
            for bound, count in zip((*histogram.bounds_s, float("inf")), histogram.counts, strict=True):
                below += count
                le = "+Inf" if bound == float("inf") else str(bound)
                assert found[short + "_bucket", name, le] == below, (short, le)
            assert found[short + "_count", name] == below
            assert abs(found[short + "_sum", name] - histogram.sum_s) < 1e-9
assert scrape()["oldest_holder_seconds", "default"] == 0
""",
    )


def test_metrics_are_in_the_registry_of_prometheus_client_too(tmp_path):
    run(
        tmp_path,
        """
import prometheus_client
dbsession.configure({"default": "sqlite:///a.db"})
use(dbsession.get_dbsession(), 3)
assert prometheus_client.REGISTRY.get_sample_value("dbsession_checkouts_total", {"database": "default"}) == 3
""",
    )


def test_metrics_of_one_name_are_counted_together_and_never_fall(tmp_path):
    run(
        tmp_path,
        """
import gc
one, other = manager(pool_size=3), manager(pool_size=4, max_overflow=1)
use(one.get(), 2)
use(other.get(), 3)
found = scrape()
assert found["checkouts_total", "default"] == 5
assert (found["pool_size", "default"], found["pool_limit", "default"]) == (7, 8)
assert found["pool_connections", "default", "idle"] == 2
other.configure({"default": "sqlite:///a.db"})
use(other.get(), 1)
found = scrape()
assert found["checkouts_total", "default"] == 6
assert found["pool_limit", "default"] == 23
use(one.get(), 1)  # what nobody has scraped yet when the manager goes
del one, other
gc.collect()
found = scrape()
assert found["checkouts_total", "default"] == 7
assert found["pool_connections", "default", "idle"] == found["pool_limit", "default"] == 0
""",
    )


def test_metrics_have_no_limit_where_the_pool_has_none(tmp_path):
    run(
        tmp_path,
        """
from sqlalchemy.pool import NullPool
unlimited, null = manager(max_overflow=-1), manager(poolclass=NullPool)
null.configure({"null": {"url": "sqlite:///a.db", "options": {"poolclass": NullPool}}})
use(unlimited.get(), 1)
use(null.get("null"), 1)
found = scrape()
assert found["pool_size", "default"] == 20 and ("pool_limit", "default") not in found
assert found["checkouts_total", "null"] == 1 and ("pool_size", "null") not in found
""",
    )


def test_metrics_middleware_is_the_application_but_for_its_path(tmp_path):
    run(
        tmp_path,
        """
app = metrics.MetricsMiddleware(lambda environ, start_response: environ, "/m")
for path in "/", "", "/m/", "/metrics", "/M":
    environ = {"PATH_INFO": path}
    assert app(environ, None) is environ
started = []
environ = {"PATH_INFO": "/m", "REQUEST_METHOD": "DELETE"}
assert app(environ, lambda *answer: started.append(answer)) == [b"Metrics are read: GET or HEAD.\\n"]
assert started[0][0] == "405 Method Not Allowed" and ("Allow", "GET, HEAD") in started[0][1]
environ = {"PATH_INFO": "/m", "REQUEST_METHOD": "HEAD"}
assert app(environ, lambda *answer: started.append(answer)) == [] and started[1][0] == "200 OK"
assert environ == {"PATH_INFO": "/m", "REQUEST_METHOD": "HEAD"}
try:
    metrics.MetricsMiddleware(None, "metrics")
except dbsession.ConfigError as error:
    assert "must begin with '/'" in str(error)
else:
    raise AssertionError
assert dbsession.snapshot().scopes == ()
""",
    )


def test_metrics_without_prometheus_client_say_what_to_install():
    run_python(
        """
        import sys
        import dbsession
        sys.modules["prometheus_client"] = None
        try:
            from dbsession.watch import metrics
        except dbsession.ConfigError as error:
            assert "pip install 'gevent-dbsession[metrics]'" in str(error)
        else:
            raise AssertionError
        """
    )


def test_metrics_of_a_forked_child_begin_anew_and_are_added_to_its_parents(tmp_path, shared):
    """Also what the child counts after its last look, at its exit; and each count once."""
    run(
        tmp_path,
        """
dbsession.configure({"default": "sqlite:///a.db"})
metrics.start()
use(dbsession.get_dbsession(), 3)
assert scrape()["checkouts_total", "default"] == 3
use(dbsession.get_dbsession(), 1)  # not looked at before the fork
if os.fork() == 0:
    use(dbsession.get_dbsession(), 5)
    metrics.start()
    assert metrics.COUNTERS["checkouts"].labels("default")._value.get() == 5
    use(dbsession.get_dbsession(), 2)
    sys.exit()
assert os.wait()[1] == 0
found = scrape()
assert found["checkouts_total", "default"] == 4 + 7, found
assert found["connection_hold_seconds_count", "default"] == 4 + 7
""",
        PROMETHEUS_MULTIPROC_DIR=str(shared),
    )


@pytest.mark.parametrize("patch", ["from gevent import monkey; monkey.patch_all(); import gevent; gevent.sleep()", ""])
def test_metrics_are_published_each_second_by_themselves_in_a_shared_folder(tmp_path, shared, patch):
    run_python(
        patch
        + START
        + """
import glob, time
from support.waiting import wait_until
from prometheus_client import CollectorRegistry, multiprocess
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
dbsession.configure({"default": "sqlite:///a.db"})
metrics.start()
use(dbsession.get_dbsession(), 3)
value = lambda: registry.get_sample_value("dbsession_checkouts_total", {"database": "default"})
wait_until(lambda: value() == 3, 10)
use(dbsession.get_dbsession(), 1)
wait_until(lambda: value() == 4, 10)
""",
        tmp_path,
        env={"PROMETHEUS_MULTIPROC_DIR": str(shared)},
    )


def test_metrics_that_cannot_be_published_are_said_once(tmp_path, shared):
    run(
        tmp_path,
        """
import logging
told = []
handler = logging.Handler()
handler.emit = lambda record: told.append(record.getMessage())
logging.getLogger("dbsession").addHandler(handler)
dbsession.configure({"default": "sqlite:///a.db"})
folder = os.environ["PROMETHEUS_MULTIPROC_DIR"]
os.rename(folder, folder + ".away")
app = metrics.MetricsMiddleware(lambda environ, start_response: "served")
for _ in range(3):
    assert app({"PATH_INFO": "/"}, None) == "served"
    metrics.start()
assert told == [f"The metrics of process {os.getpid()} could not be published: FileNotFoundError (2)."], told
os.rename(folder + ".away", folder)
use(dbsession.get_dbsession(), 3)
assert scrape()["checkouts_total", "default"] == 3
""",
        PROMETHEUS_MULTIPROC_DIR=str(shared),
    )


FULL = """
import errno
from dbsession.watch import metrics_folder
fallocate = os.posix_fallocate
def full(descriptor, offset, count):
    if count > 4096:
        raise OSError(errno.ENOSPC, "No space left on device")
    fallocate(descriptor, offset, count)
"""


def test_metrics_touch_no_file_that_the_disk_has_no_room_for(tmp_path, shared):
    """prometheus_client would write into a hole of a mapped file, and the kernel end the process."""
    run(
        tmp_path,
        FULL
        + """
import logging
told = []
handler = logging.Handler()
handler.emit = lambda record: told.append(record.getMessage())
logging.getLogger("dbsession").addHandler(handler)
dbsession.configure({"default": "sqlite:///a.db"})
os.posix_fallocate = full
use(dbsession.get_dbsession(), 3)
app = metrics.MetricsMiddleware(lambda environ, start_response: "served")
assert app({"PATH_INFO": "/"}, None) == "served"
assert told == [f"The metrics of process {os.getpid()} could not be published: OSError (28)."], told
assert not [file for file in os.listdir(metrics_folder.folder()) if "histogram" in file]
assert ("checkouts_total", "default") not in scrape()
os.posix_fallocate = fallocate
assert scrape()["checkouts_total", "default"] == 3
""",
        PROMETHEUS_MULTIPROC_DIR=str(shared),
    )


@pytest.mark.parametrize("names", [["default"], ["ü" * 200, '"' * 200, "b"], list(map(str, range(20)))])
def test_metrics_have_all_their_room_before_the_first_is_written(tmp_path, shared, names):
    run(
        tmp_path,
        f"names = {names!r}"
        + """
from dbsession.watch import metrics_folder
folder = metrics_folder.folder()
reserved, reserve = {}, metrics_folder.reserve
def spy(databases):
    reserve(databases)
    reserved.update({file: os.path.getsize(f"{folder}/{file}") for file in os.listdir(folder)})
metrics_folder.reserve = spy
managers = []
for name in names:
    managers.append(dbsession.SessionManager({name: "sqlite:///a.db"}))
    with managers[-1].scope():
        managers[-1].get(name).execute(text("SELECT 1"))
    metrics.start()  # publishes what there is so far
assert scrape()["checkouts_total", names[-1]] == 1
found = {file: os.stat(f"{folder}/{file}") for file in os.listdir(folder)}
assert {file: each.st_size for file, each in found.items()} == reserved and len(found) == 4, (found, reserved)
assert all(each.st_blocks * 512 >= each.st_size for each in found.values()), found
""",
        PROMETHEUS_MULTIPROC_DIR=str(shared),
    )


def test_scrape_reads_again_when_a_file_is_just_being_made(tmp_path, shared):
    run(
        tmp_path,
        """
from dbsession.green import hub
dbsession.configure({"default": "sqlite:///a.db"})
folder = os.environ["PROMETHEUS_MULTIPROC_DIR"]
use(dbsession.get_dbsession(), 3)
assert scrape()["checkouts_total", "default"] == 3
half = os.path.join(folder, "counter_1.db")
open(half, "w").close()
slept = []
hub.sleep = lambda seconds: slept.append(seconds) or (len(slept) == 3 and os.remove(half))
assert scrape()["checkouts_total", "default"] == 3 and len(slept) == 3
open(half, "w").close()  # it stays so: an error, and no answer that looks whole
try:
    scrape()
except Exception as error:
    assert type(error).__name__ == "error"
else:
    raise AssertionError
""",
        PROMETHEUS_MULTIPROC_DIR=str(shared),
    )


def test_metrics_have_a_counter_for_each_count():
    run_python(
        """
        from dbsession.core.pool.stats import Stats
        from dbsession.watch import metrics
        assert set(metrics.COUNTERS) == set(Stats.COUNTS)
        """
    )


def test_changes_hand_out_each_count_once_while_threads_count_and_take(tmp_path):
    run(
        tmp_path,
        """
import threading
from dbsession.watch.deltas import Changes
one = manager()
one.engine()
(database,) = [each for each in dbsession.core.engine.all_databases() if each.owner is one]
changes, taken, counting = Changes(lambda stats: [stats.checkouts]), [], threading.Event()

def take():
    while not counting.is_set():
        taken.extend(numbers[0] for _, numbers in changes.take())

takers = [threading.Thread(target=take) for _ in range(4)]
for taker in takers:
    taker.start()
for _ in range(200_000):
    database.stats.checkouts += 1
counting.set()
for taker in takers:
    taker.join()
taken.extend(numbers[0] for _, numbers in changes.take())
assert sum(taken) == 200_000, sum(taken)
assert list(changes.take()) == [("default", [0.0])]
""",
    )
