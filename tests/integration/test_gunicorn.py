"""Real gunicorn 27, gevent workers, real HTTP: SQLite and MariaDB, preload on and off, patched early and late."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from support.gunicorn import PRELOAD, Gunicorn
from support.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = {
    "patched at the top": ROOT / "deploy" / "gunicorn.conf.py",
    "patched by the worker": Path(__file__).with_name("gunicorn_late.conf.py"),
}


@pytest.fixture(params=[pytest.param("sqlite", marks=pytest.mark.slow), "mariadb"])
def url(request, tmp_path):
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/a.db"
    return request.getfixturevalue("mariadb_url")


@pytest.fixture(params=["patched at the top", pytest.param("patched by the worker", marks=pytest.mark.slow)])
def config(request):
    return CONFIGS[request.param]


@pytest.fixture(params=["preload", pytest.param("no preload", marks=pytest.mark.slow)])
def preload(request):
    return ["--preload"] if request.param == "preload" else []


def serve(url, *arguments, config=CONFIGS["patched at the top"], app="wrapped", **env):
    return Gunicorn(
        f"support.probe_app:{app}",
        "--worker-class=gevent",
        "--graceful-timeout=5",
        *arguments,
        config=config,
        env={"DBSESSION_URL": url, **env},
        ready="/state",
    )


@pytest.fixture(scope="module", params=[pytest.param("sqlite", marks=pytest.mark.slow), "mariadb"])
def shared(request, tmp_path_factory):
    """A server for the tests whose requests leave nothing behind, which each of them sees to."""
    if request.param == "sqlite":
        with serve(f"sqlite:///{tmp_path_factory.mktemp('d')}/a.db") as server:
            yield server
        return
    mariadb = request.getfixturevalue("mariadb")
    mariadb.ensure_running()
    with serve(mariadb.create_database("gunicorn")) as server:
        yield server
    mariadb.drop_database("gunicorn")


def state(server):
    return json.loads(server.get("/state").body)


def nothing_in_use(server):
    wait_until(lambda: state(server)["checked_out"] == 0 or Never(server.get("/holders").text), 30)


class Never(str):
    """Not what was waited for, but what it looks like: the last value that `wait_until` tells of."""

    def __bool__(self):
        return False


def all_at_once(server, paths):
    """The texts of the answers, in the order of their paths. Where one is missing, it says who holds connections."""

    def text_of(path):
        try:
            answer = server.get(path, timeout_s=60)
            return answer.text if answer.status == 200 else f"{answer.status}: {answer.text}"
        except (OSError, http.client.HTTPException) as error:
            lost.append(f"{path}: {error!r}")

    lost = []
    with ThreadPoolExecutor(len(paths)) as pool:
        answers = list(pool.map(text_of, paths))
    assert not lost, f"{len(lost)} without an answer: {lost}\n{server.get('/holders').text}"
    return answers


def test_f02_concurrent_requests_have_a_session_each(url, config, preload):
    """Under --preload and without patching at the top, a registry of SQLAlchemy's would be one session for all."""
    with serve(url, *preload, config=config) as server:
        assert len(set(all_at_once(server, ["/session?of=50"] * 50))) == 50
        nothing_in_use(server)


def test_concurrent_requests_read_their_own_rows(url, config, preload):
    with serve(url, *preload, config=config, PROBE_QUERY_AT_IMPORT="1") as server:
        tokens = [f"t{n}" for n in range(60)]
        answers = all_at_once(server, [f"/token?token={token}&pause=0.05" for token in tokens])
        of_others = [
            (token, answer) for token, answer in zip(tokens, answers, strict=True) if answer != f"{token}/{token}"
        ]
        assert not of_others
        nothing_in_use(server)


@pytest.mark.parametrize("preload", PRELOAD)
def test_collector_leaves_what_was_imported_alone_when_the_demos_configuration_is_used(url, preload):
    """Before the fork where the master has imported the application; and after a reload as before it."""
    with serve(url, *preload) as server:
        first = state(server)
        os.kill(server.pid, signal.SIGHUP)
        wait_until(lambda: first["pid"] not in server.worker_pids(), 30)
        second = state(server)
        assert second["pid"] != first["pid"]
        for answer in (first, second):
            assert answer["threshold"] == 50_000
            assert answer["frozen"] > 10_000  # the modules' functions, classes and dicts
            assert (answer["frozen_at_fork"] > 10_000) is bool(preload)


def test_f11_workers_of_a_preloading_master_that_used_the_database(url):
    """Two workers inherit the master's connection; each must open its own."""
    with serve(url, "--preload", "--workers=2", PROBE_QUERY_AT_IMPORT="1") as server:
        for _ in range(5):
            tokens = [f"t{n}" for n in range(30)]
            assert all_at_once(server, [f"/token?token={t}" for t in tokens]) == [f"{t}/{t}" for t in tokens]


@pytest.mark.parametrize("preload", PRELOAD)
def test_f11_dirty_workers_count_as_a_fork(url, preload):
    """Forked by an arbiter of their own; with preload they inherit, twice removed, the master's connection."""
    dirty = ["--dirty-app=support.probe_dirty:Probe", "--dirty-workers=2"]
    # The preloading master imports the probe, queries, and only then forks the dirty arbiter.
    with serve(url, *preload, *dirty, PROBE_QUERY_AT_IMPORT="1") as server:
        wait_until(lambda: server.get("/dirty?token=first").status == 200, 60)
        tokens = [f"t{n}" for n in range(30)]
        answers = [json.loads(a) for a in all_at_once(server, [f"/dirty?token={token}" for token in tokens])]
        assert [answer["token"] for answer in answers] == tokens
        assert json.loads(server.get("/state").body)["pid"] not in {answer["pid"] for answer in answers}
        # One is held by the import of the probe, outside any scope: nobody tells a dirty worker to close that.
        assert {answer["checked_out"] for answer in answers} <= {0, 1}
        nothing_in_use(server)


def test_f03_streamed_bodies_leave_nothing_in_use(shared):
    for _ in range(25):  # more than the pool's size
        assert len(shared.get("/stream?rows=3").body.splitlines()) == 3
    nothing_in_use(shared)


def test_f03_client_that_resets_in_the_middle_of_a_stream_costs_nothing(shared):
    for _ in range(25):
        client = socket.create_connection(("127.0.0.1", shared.port), 30)
        client.sendall(b"GET /stream?rows=200 HTTP/1.1\r\nHost: x\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 200")
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close() resets
        client.close()
    nothing_in_use(shared)
    assert shared.get("/token?token=t").text == "t/t"


def test_f03_requests_that_end_in_other_ways_leave_nothing_in_use(shared):
    for path, status in (("/raise", 500), ("/file", 200), ("/token?token=t", 200)):
        for _ in range(25):
            assert shared.get(path).status == status
    for _ in range(25):
        client = socket.create_connection(("127.0.0.1", shared.port), 30)
        client.sendall(b"GET /exit HTTP/1.1\r\nHost: x\r\n\r\n")
        client.close()  # gunicorn's worker swallows SystemExit and answers nothing
        client = socket.create_connection(("127.0.0.1", shared.port), 30)
        client.sendall(b"HEAD /stream?rows=2 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert client.recv(65536).startswith(b"HTTP/1.1 200")
        client.close()
    nothing_in_use(shared)


def test_f04_file_goes_through_gunicorns_own_file_wrapper(shared):
    answer = shared.get("/file")
    assert answer.body == (ROOT / "tests/support/probe_app.py").read_bytes()


def test_f06_uncommitted_write_of_one_request_is_never_committed_by_the_next(url):
    """On one keep-alive connection, so in one greenlet; also when the application is not wrapped (the backstop)."""
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE t (n INTEGER)"))
    engine.dispose()
    for app in ("wrapped", "unwrapped"):
        with serve(url, app=app) as server:
            client = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
            for path, expected in (("/write?n=1", "written"), ("/count", "0"), ("/write?n=2", "written")):
                client.request("GET", path)
                assert client.getresponse().read().decode() == expected, app
            client.request("GET", "/token?token=t")
            assert client.getresponse().read() == b"t/t"
            client.close()
            nothing_in_use(server)


def test_unwrapped_application_is_cleaned_up_by_the_backstop(url):
    with serve(url, app="unwrapped") as server:
        for _ in range(25):
            assert server.get("/token?token=t").text == "t/t"
        nothing_in_use(server)


@pytest.mark.parametrize("preload", PRELOAD)
def test_connections_are_bounded_and_gone_after_sigterm(mariadb, mariadb_url, preload, tmp_path):
    """At most workers x pool_size while it runs; none after SIGTERM."""
    top = CONFIGS["patched at the top"]
    config = tmp_path / "conf.py"  # it shows what the first worker's check finds, too, where that is no fault
    config.write_text(
        f"exec(open({str(top)!r}).read().replace('__file__', repr({str(top)!r})))\n"
        "logging.getLogger('dbsession').setLevel('INFO')\n"
    )

    def connections():
        return [each for each in mariadb.processlist() if each["db"] == mariadb_url.rpartition("/")[2]]

    with serve(mariadb_url, *preload, "--workers=2", config=config, PROBE_QUERY_AT_IMPORT="1") as server:
        # What the import used is left idle: in each worker that has answered, or in the master; and the first worker's
        # own `dbsession check`, whose connection is outside the pool, is over.
        answered = set()
        wait_until(lambda: answered.add(state(server)["pid"]) or answered == set(server.worker_pids()), 60)
        wait_until(lambda: "dbsession check: " in server.logs(), 60)
        wait_until(lambda: len(connections()) == (1 if preload else 2), 30)
        most, stop = [0], threading.Event()

        def watch():
            while not stop.wait(0.02):
                most[0] = max(most[0], len(connections()))

        watcher = threading.Thread(target=watch)
        watcher.start()
        all_at_once(server, [f"/token?token={n}&pause=0.02" for n in range(150)])
        stop.set()
        watcher.join()
        masters = 1 if preload else 0
        assert 0 < most[0] <= 2 * 20 + masters
        server.term()
        wait_until(lambda: not connections(), 30)
