"""Real gunicorn, whose workers end in the middle of requests: those that had their time are finished, the others leave
nothing at the database, and the other worker serves on."""

from __future__ import annotations

import http.client
import itertools
import os
import signal
import socket
import struct
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy.engine import make_url

from support.gunicorn import Gunicorn
from support.processes import pid_alive
from support.waiting import wait_until

CONFIG = Path(__file__).resolve().parents[2] / "deploy" / "gunicorn.conf.py"
LONG_S = 60.0  # nothing here waits for its end


class Load:
    """Requests to /work in the background, of which the table `work` tells worker and connection while they run. Ends
    with its `with`; what runs then is the server's to end."""

    def __init__(self, server: Gunicorn, mariadb, database: str) -> None:
        self._server, self._mariadb, self._database = server, mariadb, database
        self._numbers = itertools.count(1)
        self._pool = ThreadPoolExecutor(64)
        self.answers: dict[int, Future] = {}

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def send(self, count: int, pause: float = 0, statement: float = 0, until: Path | None = None) -> list[int]:
        numbers = list(itertools.islice(self._numbers, count))
        for n in numbers:
            path = f"/work?n={n}&pause={pause}&statement={statement}" + (f"&until={until}" if until else "")
            self.answers[n] = self._pool.submit(self._server.get, path, timeout_s=40)
        return numbers

    def rows(self, level: str = "READ UNCOMMITTED") -> dict[int, tuple[int, int]]:
        """By number, the worker and the connection: those of requests under way too, unless another level is given."""
        with self._mariadb.root() as cursor:
            cursor.execute(f"SET SESSION TRANSACTION ISOLATION LEVEL {level}")
            cursor.execute(f"SELECT n, pid, id FROM `{self._database}`.work")
            return {row["n"]: (row["pid"], row["id"]) for row in cursor.fetchall()}

    def on_both(self, pause: float = 0, statement: float = 0, until: Path | None = None) -> dict[int, set[int]]:
        """Starts requests until each of two workers is at some; the workers, with the numbers of their requests, which
        go on when the file `until` is there."""
        numbers: list[int] = []
        while len(numbers) < 48:
            numbers += self.send(4, pause, statement, until)
            wait_until(lambda sent=numbers: not set(sent) - self.rows().keys(), 30, "they are under way")
            rows = self.rows()
            shares: dict[int, set[int]] = {}
            for n in numbers:
                shares.setdefault(rows[n][0], set()).add(n)
            if len(shares) == 2 and min(map(len, shares.values())) >= 2:
                return shares
        raise AssertionError(f"one worker gets them all: {shares}")

    def gone(self, numbers: set[int], rows: dict[int, tuple[int, int]]) -> None:
        """Waits until the server has none of the connections that did these requests."""
        ids = {rows[n][1] for n in numbers}
        wait_until(lambda: not ids & {p["id"] for p in self._mariadb.processlist()}, 20, "connections gone")

    def statuses(self, numbers: set[int]) -> set[object]:
        """The HTTP statuses; None for a connection that ended without an answer."""
        return {self._status(self.answers[n]) for n in numbers}

    @staticmethod
    def _status(answer: Future) -> int | None:
        try:
            return answer.result(30).status
        except (OSError, http.client.HTTPException):
            return None


@pytest.fixture(params=["preload", pytest.param("no preload", marks=pytest.mark.slow)])
def serve(request, mariadb, mariadb_url) -> Iterator:
    """`start(*gunicorn's arguments)`, two workers with a table `work`, and `load_on(server)`. At the end they leave no
    connection."""
    database = make_url(mariadb_url).database
    with mariadb.root() as cursor:
        cursor.execute(f"CREATE TABLE `{database}`.work (n INT PRIMARY KEY, pid INT, id INT)")

    def start(*arguments: str) -> Gunicorn:
        return Gunicorn(
            "support.probe_app:wrapped",
            *(["--preload"] if request.param == "preload" else []),
            *arguments,
            config=CONFIG,
            env={"DBSESSION_URL": mariadb_url, "PROBE_QUERY_AT_IMPORT": "1"},
            workers=2,
            ready="/state",
        )

    yield start, lambda server: Load(server, mariadb, database)
    wait_until(lambda: not mariadb.processlist(), 20, "no connection is left")


def serves_with_two_workers_without(server, load, ended, numbers=12):
    """The master has replaced the one that ended; the two serve, and lose nothing."""
    wait_until(lambda: len(server.worker_pids()) == 2 and ended not in server.worker_pids(), 30, "a new worker")
    assert load.statuses(set(load.send(numbers))) == {200}


@pytest.mark.slow
def test_requests_within_the_graceful_timeout_are_finished_when_a_worker_gets_sigterm(serve):
    start, load_on = serve
    with start("--graceful-timeout=10") as server, load_on(server) as load:
        shares = load.on_both(pause=1.5)
        victim, other = shares
        rows = load.rows()
        os.kill(victim, signal.SIGTERM)
        assert load.statuses(shares[victim] | shares[other]) == {200}
        wait_until(lambda: not pid_alive(victim), 30)
        load.gone(shares[victim], rows)
        assert load.rows("READ COMMITTED") == rows
        assert other in server.worker_pids()
        serves_with_two_workers_without(server, load, victim)


def test_requests_beyond_the_graceful_timeout_are_torn_down_when_a_worker_gets_sigterm(serve):
    """In the application's own wait, and in a statement: nothing of theirs is committed, no lock stays."""
    start, load_on = serve
    with start("--graceful-timeout=1") as server, load_on(server) as load:
        waiting = load.on_both(pause=LONG_S)
        victim, other = waiting
        in_statement = load.on_both(statement=3)
        rows = load.rows()
        os.kill(victim, signal.SIGTERM)
        lost = waiting[victim] | in_statement[victim]
        assert 200 not in load.statuses(waiting[victim])
        wait_until(lambda: not pid_alive(victim), 30)
        load.gone(lost, rows)
        assert load.statuses(in_statement[other]) == {200}
        kept = load.rows("READ COMMITTED").keys()
        assert not kept & waiting[victim]
        # Some may just have been finished; one that was killed at its COMMIT is stored or not.
        assert {n for n in in_statement[victim] if load.statuses({n}) == {200}} <= kept
        serves_with_two_workers_without(server, load, victim)
        assert other in server.worker_pids()
        server.kill()  # instead of waiting for the other worker's long requests


@pytest.mark.slow
def test_f14_long_statements_are_ended_when_workers_are_torn_down(serve):
    """The workers end before their statements would; their last act is to have them ended at the server."""
    start, load_on = serve
    with start("--graceful-timeout=1") as server, load_on(server) as load:
        shares = load.on_both(statement=LONG_S)
        rows = load.rows()
        for worker in shares:
            os.kill(worker, signal.SIGTERM)
        wait_until(lambda: not any(map(pid_alive, shares)), 30)
        for worker, numbers in shares.items():
            load.gone(numbers, rows)
            serves_with_two_workers_without(server, load, worker)
        assert not load.rows("READ COMMITTED").keys() & rows.keys()


@pytest.mark.parametrize(
    "signum",
    [signal.SIGKILL, *(pytest.param(signum, marks=pytest.mark.slow) for signum in (signal.SIGABRT, signal.SIGQUIT))],
    ids=lambda signum: signum.name,
)
def test_only_its_own_requests_are_lost_when_a_worker_dies(serve, signum, tmp_path):
    """No teardown runs; the kernel closes the sockets, and the server rolls back."""
    start, load_on = serve
    with start("--graceful-timeout=5") as server, load_on(server) as load:
        go_on = tmp_path / "go_on"
        shares = load.on_both(until=go_on)
        victim, other = shares
        rows = load.rows()
        os.kill(victim, signum)
        wait_until(lambda: not pid_alive(victim), 30)
        load.gone(shares[victim], rows)
        assert load.statuses(shares[victim]) == {None}
        go_on.touch()
        assert load.statuses(shares[other]) == {200}
        assert load.rows("READ COMMITTED").keys() == shares[other]
        assert other in server.worker_pids()
        serves_with_two_workers_without(server, load, victim)


@pytest.mark.slow
def test_no_request_is_lost_when_workers_end_after_max_requests(serve):
    start, load_on = serve
    with start("--max-requests=20", "--graceful-timeout=10") as server, load_on(server) as load:
        numbers: set[int] = set()

        def workers_so_far() -> set[int]:
            sent = set(load.send(20, pause=0.05))
            assert load.statuses(sent) == {200}
            numbers.update(sent)
            return {pid for pid, _ in load.rows("READ COMMITTED").values()}

        wait_until(lambda: len(workers_so_far()) >= 5, 90, "workers are replaced")
        rows = load.rows("READ COMMITTED")
        assert rows.keys() == numbers
        pids = {pid for pid, _ in rows.values()}
        ended = wait_until(lambda: pids - set(server.worker_pids()), 30, "one of them has ended")
        load.gone({n for n in numbers if rows[n][0] in ended}, rows)


@pytest.mark.parametrize("graceful_s", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_no_connection_is_left_when_the_master_gets_sigterm_with_requests_in_flight(serve, mariadb, graceful_s):
    """Those within its graceful_timeout are finished; the workers of the others are killed by it."""
    start, load_on = serve
    with start(f"--graceful-timeout={graceful_s}") as server, load_on(server) as load:
        shares = load.on_both(pause=1.5 if graceful_s > 1 else LONG_S)
        numbers = set().union(*shares.values())
        server.term()
        assert load.statuses(numbers) == ({200} if graceful_s > 1 else {None})
        server.wait(40)
        wait_until(lambda: not mariadb.processlist(), 20, "no connection is left")
        assert load.rows("READ COMMITTED").keys() == (numbers if graceful_s > 1 else set())


HOOKS = "from dbsession.gunicorn_hooks import child_exit, post_request, post_worker_init, when_ready, worker_exit\n"


@pytest.mark.parametrize(
    "how", ["SIGTERM", *(pytest.param(how, marks=pytest.mark.slow) for how in ("SIGHUP", "SIGQUIT"))]
)
@pytest.mark.parametrize(
    "kind", ["gevent", pytest.param("gthread", marks=pytest.mark.slow), pytest.param("sync", marks=pytest.mark.slow)]
)
def test_f35_running_statements_are_ended_at_the_server_when_the_master_is_told_to_end(
    mariadb, mariadb_url, tmp_path, kind, how
):
    """Those of requests, and of greenlets and threads that they started; the server itself would let them run on."""
    config = tmp_path / "gunicorn.conf.py"
    config.write_text(HOOKS if kind != "gevent" else CONFIG.read_text())
    with mariadb.root() as cursor:
        cursor.execute(f"CREATE TABLE `{make_url(mariadb_url).database}`.work (n INT PRIMARY KEY, pid INT, id INT)")
    server = Gunicorn(
        "support.probe_app:wrapped",
        f"--worker-class={kind}",
        "--threads=4",
        "--graceful-timeout=2",
        config=config,
        env={"DBSESSION_URL": mariadb_url},
        workers=2,
        ready="/state",
    )
    with server, Load(server, mariadb, make_url(mariadb_url).database) as load, ThreadPoolExecutor(4) as pool:
        for n in (10, 20):
            pool.submit(lambda path: load._status(pool.submit(server.get, path)), f"/compute?n={n}")
        wait_until(lambda: len(load.rows()) == 4, 30, "they run")
        ids = {id for _, id in load.rows().values()}
        os.kill(server.pid, getattr(signal, how))
        if how != "SIGHUP":
            server.wait(40)
        wait_until(lambda: not ids & {p["id"] for p in mariadb.processlist()}, 20, "they are gone")


@pytest.mark.slow
def test_no_connection_is_left_when_the_master_is_killed(serve, mariadb):
    """The workers see that they are orphans."""
    start, load_on = serve
    with start("--graceful-timeout=2") as server, load_on(server) as load:
        load.on_both(pause=0.5)
        server.kill()
        wait_until(lambda: not mariadb.processlist(), 40, "no connection is left")


@pytest.mark.slow
def test_slots_come_back_and_others_are_served_when_many_clients_reset_mid_stream(serve, mariadb):
    """Twenty at a time over a pool of twenty each, while whole answers are read by others."""
    start, _ = serve
    with start("--graceful-timeout=5") as server, ThreadPoolExecutor(10) as pool:
        for _ in range(3):
            whole = [pool.submit(server.get, "/stream?rows=30&pause=0.01") for _ in range(10)]
            clients = []
            for _ in range(20):
                client = socket.create_connection(("127.0.0.1", server.port), 10)
                client.sendall(b"GET /stream?rows=5000&pause=0.001 HTTP/1.1\r\nHost: x\r\n\r\n")
                clients.append(client)
            for client in clients:
                assert client.recv(100).startswith(b"HTTP/1.1 200")
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close() resets
                client.close()
            assert {len(answer.result(30).body.splitlines()) for answer in whole} == {30}
        wait_until(lambda: all(server.get("/state").body.count(b'"checked_out": 0') for _ in range(10)), 30)
        # Those that were cut off, and those that had their statements ended, may still be ending at the server.
        wait_until(lambda: len(mariadb.processlist()) <= 2 * 20 + 1, 20, "no more connections than places")
