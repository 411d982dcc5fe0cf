"""The metrics of several gunicorn workers, scraped from whichever answers: real gunicorn, preload on and off."""

from __future__ import annotations

import json
import os
import signal
import stat
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.parser import text_string_to_metric_families

from support.gunicorn import PRELOAD, Gunicorn, takes_signals
from support.processes import pid_alive, wait_gone
from support.waiting import wait_until

CONFIG = Path(__file__).resolve().parents[2] / "deploy" / "gunicorn.conf.py"
LATE = Path(__file__).with_name("gunicorn_late.conf.py")  # patched by the worker, after the import under --preload


def serve(tmp_path, *arguments, workers=2, config=CONFIG, **env):
    env = {"DBSESSION_METRICS": "/metrics", "METRICS_URL": f"sqlite:///{tmp_path}/a.db", "TMPDIR": str(tmp_path), **env}
    return Gunicorn(
        "support.metrics_app:wrapped",
        "--worker-class=gevent",
        "--graceful-timeout=20",
        *arguments,
        workers=workers,
        config=config,
        env=env,
        ready="/facts",
    )


def scrape(server):
    """{(name, label values): value} of our samples."""
    answer = server.get("/metrics")
    assert answer.status == 200
    return {
        (sample.name.removeprefix("dbsession_"), *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
        if sample.name.startswith("dbsession_")
    }


def wait_for(server, value, *key):
    try:
        wait_until(lambda: scrape(server).get(key) == value, 30, f"{key} being {value}")
    except AssertionError as error:
        error.add_note(f"the last scrape: {scrape(server)}")
        raise


def begun(server, by_the_import=0):
    """Waits until the master's first worker has looked at its databases, one checkout, which is counted as any other
    is, and over; how many checkouts there are then."""
    wait_for(server, 1 + by_the_import, "checkouts_total", "default")
    wait_for(server, 1 + by_the_import, "connection_hold_seconds_count", "default")
    return 1 + by_the_import


def published(folder):
    """The checkouts in the files of the workers, none of which is asked, and how many of them are over."""
    try:
        samples = [sample for family in MultiProcessCollector(None, path=folder).collect() for sample in family.samples]
    except (struct.error, RuntimeError):  # a file that a worker is just making
        return None
    return [
        sum(sample.value for sample in samples if sample.name == name)
        for name in ("dbsession_checkouts_total", "dbsession_connection_hold_seconds_count")
    ]


def query(server, times):
    """So many requests of one checkout each, ten at a time; the pids of who answered."""
    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda _: server.get("/query"), range(times)))
    assert {answer.status for answer in answers} == {200}
    return [int(answer.text) for answer in answers]


def query_all_workers(server):
    """Requests until every worker has answered one; how many there were."""
    asked = []
    wait_until(lambda: asked.extend(query(server, 1)) or set(asked) == set(server.worker_pids()), 60)
    return len(asked)


def facts(server):
    return json.loads(server.get("/facts").text)


@pytest.mark.parametrize("preload", PRELOAD)
@pytest.mark.parametrize(
    "config",
    [
        pytest.param(CONFIG, id="patched at the top"),
        pytest.param(LATE, id="patched by the worker", marks=pytest.mark.slow),
    ],
)
def test_metrics_sum_the_workers_exactly_whoever_is_scraped(tmp_path, preload, config):
    with serve(tmp_path, *preload, workers=3, config=config, METRICS_QUERY_AT_IMPORT="1") as server:
        extra = 0 if preload else 3  # the import's own: once in each worker, or in the master, which is not counted
        asked = begun(server, extra) + query_all_workers(server) + len(query(server, 100))
        folder = facts(server)["folder"]
        wait_until(lambda: published(folder) == [asked, asked], 30)
        wait_for(server, 0, "pool_connections", "default", "in_use")
        wait_until(lambda: scrape(server)["pool_connections", "default", "idle"] >= 3, 30)
        for _ in range(9):
            found = scrape(server)
            assert found["checkouts_total", "default"] == asked
            assert found["connection_hold_seconds_count", "default"] == asked
            assert found["connection_hold_seconds_bucket", "default", "+Inf"] == asked
            assert found["pool_wait_seconds_count", "default"] == asked
            assert found["pool_limit", "default"] == found["pool_size", "default"] == 3 * 2
            assert found["pool_connections", "default", "in_use"] == found["pool_waiting", "default"] == 0
            assert found["pool_timeouts_total", "default"] == found["oldest_holder_seconds", "default"] == 0
            assert found["connects_total", "default"] >= found["pool_connections", "default", "idle"] >= 3


@pytest.mark.slow
def test_metrics_of_threaded_workers_are_summed_too(tmp_path):
    config = tmp_path / "gunicorn.conf.py"
    config.write_text("from dbsession.gunicorn_hooks import *\nworker_class, threads = 'gthread', 4\n")
    with serve(tmp_path, "--worker-class=gthread", config=config) as server:
        asked = begun(server) + query_all_workers(server) + len(query(server, 50))
        wait_for(server, asked, "checkouts_total", "default")
        wait_for(server, asked, "connection_hold_seconds_count", "default")
        before = server.worker_pids()
        asked += len(query(server, 10))
        for pid in before:
            os.kill(pid, signal.SIGTERM)
        wait_gone(before, 40)
        wait_for(server, asked, "checkouts_total", "default")


@pytest.mark.slow
def test_metrics_keep_counts_and_lose_gauges_when_a_worker_is_killed(tmp_path):
    with serve(tmp_path) as server:
        asked = begun(server) + query_all_workers(server)
        wait_for(server, asked, "checkouts_total", "default")
        wait_for(server, asked, "connection_hold_seconds_count", "default")
        wait_until(lambda: scrape(server)["pool_connections", "default", "idle"] >= 2, 30)
        victim = server.worker_pids()[0]
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: victim not in server.worker_pids() and len(server.worker_pids()) == 2, 40)
        wait_until(lambda: all(map(takes_signals, server.worker_pids())), 40)
        wait_for(server, 2 * 2, "pool_limit", "default")  # the new worker's, and no longer the dead one's
        folder = facts(server)["folder"]
        assert not list(Path(folder).glob(f"gauge_live*_{victim}.db"))
        found = scrape(server)
        assert found["checkouts_total", "default"] == asked
        assert found["connection_hold_seconds_count", "default"] == asked
        asked += query_all_workers(server)
        wait_for(server, asked, "checkouts_total", "default")


@pytest.mark.slow
def test_metrics_lose_no_count_when_workers_end_before_they_have_published(tmp_path):
    with serve(tmp_path) as server:
        before = server.worker_pids()
        asked = begun(server) + len(query(server, 40))
        for pid in before:
            os.kill(pid, signal.SIGTERM)
        wait_gone(before, 40)
        wait_until(lambda: len(server.worker_pids()) == 2 and all(map(takes_signals, server.worker_pids())), 40)
        wait_for(server, asked, "checkouts_total", "default")
        wait_for(server, 2 * 2, "pool_limit", "default")


@pytest.mark.slow
def test_metrics_go_on_when_gunicorn_reloads(tmp_path):
    with serve(tmp_path) as server:
        before, folder = server.worker_pids(), facts(server)["folder"]
        asked = begun(server) + len(query(server, 20))
        os.kill(server.pid, signal.SIGHUP)
        wait_gone(before, 40)
        wait_until(lambda: len(server.worker_pids()) == 2 and all(map(takes_signals, server.worker_pids())), 40)
        assert facts(server)["folder"] == folder
        asked += len(query(server, 20))
        wait_for(server, asked, "checkouts_total", "default")


@pytest.mark.slow
def test_metrics_of_two_masters_are_summed_in_the_folder_of_the_environment_when_gunicorn_is_upgraded(tmp_path):
    """SIGUSR2: the second master does not empty what the first one's workers still count in."""
    # PYTHONSAFEPATH: or the second one's sys.path would begin with gunicorn's folder, as it is started by `python -m`.
    with serve(tmp_path, PYTHONSAFEPATH="1", PROMETHEUS_MULTIPROC_DIR=str(tmp_path / "shared")) as server:
        first = server.worker_pids()
        asked = begun(server) + len(query(server, 20))
        os.kill(server.pid, signal.SIGUSR2)
        wait_until(lambda: len(server.worker_pids()) == 3, 40)
        (second,) = set(server.worker_pids()) - set(first)
        try:
            wait_until(lambda: facts(server)["pid"] not in first, 40)
            asked += 1  # the second master's first worker has looked, too
            wait_for(server, asked, "checkouts_total", "default")
            os.kill(server.pid, signal.SIGTERM)
            assert server.wait() == 0
            asked += len(query(server, 20))
            wait_for(server, asked, "checkouts_total", "default")
            wait_for(server, 2 * 2, "pool_limit", "default")
        finally:
            os.kill(second, signal.SIGTERM)
            wait_until(lambda: not pid_alive(second), 40)


@pytest.mark.slow
def test_metrics_answer_when_the_pool_is_exhausted(tmp_path):
    until, timeout_s = tmp_path / "until", 5  # long enough for a scrape that sees who waits
    with serve(tmp_path, workers=1, METRICS_POOL_TIMEOUT_S=str(timeout_s)) as server, ThreadPoolExecutor(3) as pool:
        begun(server)
        try:
            held = [pool.submit(server.get, f"/hold?until={until}") for _ in range(2)]
            wait_for(server, 2, "pool_connections", "default", "in_use")
            late = pool.submit(server.get, "/query")
            wait_for(server, 1, "pool_waiting", "default")
            found = scrape(server)
            assert found["pool_connections", "default", "idle"] == 0
            assert found["oldest_holder_seconds", "default"] > 0
            wait_for(server, 1, "pool_timeouts_total", "default")
            assert late.result().status == 500
        finally:
            until.touch()
        assert {each.result().status for each in held} == {200}
        wait_for(server, 2, "pool_connections", "default", "idle")
        found = scrape(server)
        assert found["checkouts_total", "default"] == 1 + 2
        assert found["pool_wait_seconds_count", "default"] == 1 + 3
        assert found["pool_wait_seconds_bucket", "default", "0.001"] == 1 + 2
        assert found["pool_wait_seconds_sum", "default"] >= timeout_s
        assert found["oldest_holder_seconds", "default"] == 0


@pytest.mark.slow
def test_metrics_path_takes_get_and_head_only(tmp_path):
    with serve(tmp_path, workers=1, DBSESSION_METRICS="/deep/metrics") as server:
        head = server.get("/deep/metrics", method="HEAD")
        assert (head.status, head.body) == (200, b"")
        assert head.headers["Content-Type"].startswith("text/plain; version=")
        for method in ("POST", "PUT", "DELETE", "OPTIONS"):
            answer = server.get("/deep/metrics", method=method)
            assert (answer.status, answer.headers["Allow"]) == (405, "GET, HEAD")
        assert server.get("/metrics").status == 404
        assert server.get("/deep/metrics/").status == 404
        assert server.get("/deep/metrics?name[]=x").status == 200


@pytest.mark.slow
def test_metrics_are_off_by_default(tmp_path):
    with serve(tmp_path, workers=1, DBSESSION_METRICS="") as server:
        assert server.get("/metrics").status == 404
        assert facts(server) == {"pid": server.worker_pids()[0], "folder": None, "imported": False}


@pytest.mark.slow
def test_metrics_folder_is_private_and_goes_with_the_master(tmp_path):
    with serve(tmp_path, workers=1) as server:
        folder = Path(facts(server)["folder"])
        assert folder.parent == tmp_path
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert list(folder.glob("*.db"))
    assert not folder.exists()


@pytest.mark.slow
def test_metrics_folder_of_the_environment_is_made_or_emptied_at_the_start_and_kept(tmp_path):
    folder = tmp_path / "some" / "folder"
    with serve(tmp_path, workers=1, PROMETHEUS_MULTIPROC_DIR=str(folder)) as server:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        asked = begun(server) + len(query(server, 5))
        wait_for(server, asked, "checkouts_total", "default")
    assert list(folder.glob("counter_*.db"))
    for name in ("notes.txt", "shop.db", "counter.db"):
        (folder / name).touch()
    (folder / "gauge_livesum_99999999.db").touch()
    with serve(tmp_path, workers=1, PROMETHEUS_MULTIPROC_DIR=str(folder)) as server:
        assert not (folder / "gauge_livesum_99999999.db").exists()
        assert all((folder / name).exists() for name in ("notes.txt", "shop.db", "counter.db"))
        for name in ("shop.db", "counter.db"):  # prometheus_client reads all that end so
            (folder / name).unlink()
        begun(server)


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [{"DBSESSION_METRICS": "metrics"}, {"PROMETHEUS_MULTIPROC_DIR": "/dev/null/x"}])
def test_metrics_are_off_with_a_warning_when_they_cannot_be(tmp_path, wrong):
    with serve(tmp_path, workers=1, **wrong) as server:
        assert server.get("/metrics").status == 404
        assert server.logs().count("DBSESSION_METRICS is ignored, there are no metrics: ") == 1
