"""The support code itself: what other tests rely on without looking."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import URL, Connection, NullPool, create_engine, make_url, text
from sqlalchemy.exc import DBAPIError, OperationalError

from support.dialects import dialect_of
from support.gunicorn import Gunicorn
from support.mariadb import MariaDBServer
from support.postgresql import PostgreSQLServer
from support.processes import Supervised, pause_process, pid_alive, run_python, run_script, script_env, wait_gone
from support.proxy import Proxy
from support.servers import on
from support.waiting import wait_until

AnyServer = MariaDBServer | PostgreSQLServer


@contextlib.contextmanager
def connected(url: str | URL, port: int | None = None) -> Iterator[Connection]:
    """A connection in autocommit mode, without a pool."""
    where = make_url(url)
    engine = create_engine(where.set(port=port or where.port), poolclass=NullPool, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        yield connection


ALL_SERVERS = on("mariadb", "postgresql", "pgbouncer")


@ALL_SERVERS
def test_server_answers_and_shows_the_connection(server: AnyServer, server_url: str) -> None:
    with connected(server_url) as connection:
        connection.execute(text("CREATE TABLE t (x INT)"))
        assert connection.execute(text("SELECT 1 FROM t")).all() == []
        mine = connection.scalar(text(f"SELECT {server.dialect.who}"))
        (shown,) = [row for row in server.processlist() if row["id"] == mine]
    host, _, port = shown["host"].partition(":")
    assert (shown["user"], shown["db"], host, shown["info"]) == (
        "app",
        make_url(server_url).database,
        "127.0.0.1",
        None,
    )
    assert port.isdigit() and shown["command"] == "Sleep"


@ALL_SERVERS
def test_server_says_what_is_done_in_the_words_of_each(server: AnyServer, server_url: str) -> None:
    """What tests do to it with all rights, and the dialect's words."""
    words = server.dialect
    assert dialect_of(server_url) == words
    with connected(server_url) as connection, connection.execution_options(isolation_level="READ COMMITTED"):
        connection.execute(text(f"CREATE TABLE t (id {words.serial}, payload {words.payload})"))
        connection.commit()
        assert server.open_transactions() == 0
        connection.execute(text("INSERT INTO t (payload) VALUES ('x')"))
        assert server.open_transactions() == 1
        assert connection.execute(text(f"SELECT * FROM t WHERE {words.sleep(0.01)} = 0")).all() == [(1, "x")]
        connection.rollback()
        assert len(connection.execute(text(f"SELECT 1 FROM {words.numbers(20)}")).all()) == 20
        connection.rollback()
        server.refuse_writes(True)
        try:
            with pytest.raises(DBAPIError) as refused:
                connection.execute(text("INSERT INTO t (payload) VALUES ('x')"))
        finally:
            server.refuse_writes(False)
        assert words.code(refused.value) == words.READ_ONLY
        connection.rollback()
        with pytest.raises(DBAPIError) as unknown:
            connection.execute(text("SELECT * FROM nothing"))
        assert words.code(unknown.value) == words.UNKNOWN_TABLE and not words.is_lost(unknown.value)
        connection.rollback()
        statement = f"SELECT {words.sleep(50)}"

        def running() -> list[int]:
            return [row["id"] for row in server.processlist() if row["info"] == statement]

        mine = connection.scalar(text(f"SELECT {words.who}"))
        with ThreadPoolExecutor(1) as aside:
            for kill in (server.kill_statement, server.kill_connection):
                job = aside.submit(connection.execute, text(statement))
                assert wait_until(running) == [mine]
                kill(mine)
                error = job.exception(20)
                if kill == server.kill_statement:
                    assert words.code(error) == words.CANCELLED and not words.is_lost(error)
                else:
                    assert words.is_lost(error)
                connection.rollback()


def test_server_lets_nobody_in_without_the_password(server: AnyServer, server_url: str) -> None:
    for user in ("app", "root", "postgres"):
        with pytest.raises(OperationalError), connected(make_url(server_url).set(username=user, password="")):
            pass


@ALL_SERVERS
def test_server_comes_back_with_its_data_when_killed(server: AnyServer, server_url: str) -> None:
    port = server.port
    with connected(server_url) as connection:
        connection.execute(text("CREATE TABLE t (x INT)"))
    server.kill()
    with pytest.raises(OperationalError), connected(server_url):
        pass
    server.start()
    assert server.port == port
    with connected(server_url) as connection:
        connection.execute(text("SELECT x FROM t"))


def test_paused_process_has_no_thread_that_runs() -> None:
    busy = """
        import hashlib, threading
        def work():  # without the GIL
            while True:
                hashlib.pbkdf2_hmac("sha256", b"", b"", 10_000)
        for _ in range(8):
            threading.Thread(target=work, daemon=True).start()
        print("busy", flush=True)
        threading.Event().wait(60)
    """
    command = [sys.executable, "-c", textwrap.dedent(busy)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "busy\n"
            for _ in range(50):
                pause_process(process.pid)
                stats = [path.read_text() for path in Path(f"/proc/{process.pid}/task").glob("*/stat")]
                assert [stat.rpartition(")")[2].split()[0] for stat in stats] == ["T"] * 9
                process.send_signal(signal.SIGCONT)
        finally:
            process.kill()


@ALL_SERVERS
def test_server_is_silent_when_paused(server: AnyServer, server_url: str) -> None:
    with connected(server_url) as connection, contextlib.closing(socket.socket()) as quiet:
        server.pause()
        quiet.settimeout(0.3)
        quiet.connect(("127.0.0.1", server.port))
        if not isinstance(server, MariaDBServer):
            quiet.sendall(b"\0\0\0\x08\x04\xd2\x16\x2f")  # PostgreSQL's clients speak first: SSLRequest
        with pytest.raises(TimeoutError):
            quiet.recv(1)
        server.resume()
        connection.execute(text("SELECT 1"))


def test_server_that_is_paused_ends_when_its_starter_is_killed(tmp_path: Path) -> None:
    """PostgreSQL's processes are in groups of their own, and what it had of shared memory is no file of its folder."""
    source = """
        import time
        from support.postgresql import PostgreSQLServer
        from support.processes import child_pids
        server = PostgreSQLServer()
        print(server.folder, server.pid, *child_pids(server.pid), flush=True)
        server.pause()
        print("paused", flush=True)
        time.sleep(600)  # it is killed before
    """
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(source))
    starter = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, env=script_env(), text=True)
    assert starter.stdout is not None
    try:
        folder, *pids = starter.stdout.readline().split()
        assert starter.stdout.readline() == "paused\n"
        assert len(pids) > 1
    finally:
        starter.kill()
        starter.wait(10)
        starter.stdout.close()
    wait_gone([int(pid) for pid in pids])
    wait_until(lambda: not Path(folder).exists(), what="the folder's end")


def test_supervised_command_dies_when_its_starter_is_killed(tmp_path: Path) -> None:
    """The folder goes with it, and a grandchild that ignores SIGTERM, too."""
    folder = tmp_path / "data"
    folder.mkdir()
    source = """
        import sys, time
        from pathlib import Path
        from support.processes import Supervised
        grandchild = "trap '' TERM; sleep 600 & echo $! >pid.new; mv pid.new pid; wait"
        process = Supervised(["sh", "-c", grandchild], log=Path("log"), remove=Path(sys.argv[1]))
        print(process.pid, flush=True)
        time.sleep(600)  # it is killed before
    """
    script = tmp_path / "script.py"
    script.write_text("\n".join(line.strip() for line in source.splitlines()))
    starter = subprocess.Popen(
        [sys.executable, str(script), str(folder)], stdout=subprocess.PIPE, env=script_env(), cwd=tmp_path
    )
    assert starter.stdout is not None
    try:
        pids = [int(starter.stdout.readline())]
        wait_until((tmp_path / "pid").exists, what="the grandchild's pid")
        pids.append(int((tmp_path / "pid").read_text()))
        assert all(map(pid_alive, pids))
    finally:
        starter.kill()
        starter.wait(10)
        starter.stdout.close()
    wait_gone(pids)
    wait_until(lambda: not folder.exists(), what="the folder's end")


def test_supervised_tells_the_exit_status(tmp_path: Path) -> None:
    process = Supervised(["sh", "-c", "exit 7"], log=tmp_path / "log")
    assert process.wait(10) == 7
    process.close()
    process = Supervised(["sleep", "600"], log=tmp_path / "log")
    assert process.poll() is None
    process.signal(signal.SIGTERM)
    assert process.wait(10) == -signal.SIGTERM
    process.close()


@pytest.fixture
def echo_port() -> Iterator[int]:
    """A server that sends back what it gets."""
    source = """if True:
        import socketserver
        class Echo(socketserver.BaseRequestHandler):
            def handle(self):
                while data := self.request.recv(65536):
                    self.request.sendall(data)
        class Server(socketserver.ThreadingTCPServer):
            def handle_error(self, request, client_address):
                pass  # cut connections are what the tests are about
        server = Server(("127.0.0.1", 0), Echo)
        print(server.server_address[1], flush=True)
        server.serve_forever()
    """
    process = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE)
    assert process.stdout is not None
    yield int(process.stdout.readline())
    process.kill()
    process.wait(10)
    process.stdout.close()


def test_proxy_stalls_counts_and_cuts(echo_port: int) -> None:
    with Proxy(echo_port) as proxy, socket.create_connection(("127.0.0.1", proxy.port), 10) as client:
        client.sendall(b"one")
        assert client.recv(10) == b"one"

        proxy.stall()
        client.sendall(b"two")
        client.settimeout(0.2)
        with pytest.raises(TimeoutError):
            client.recv(10)
        assert proxy.bytes_sent() == [3]
        proxy.resume()
        client.settimeout(10)
        assert client.recv(10) == b"two"
        assert proxy.sent(0) == b"onetwo"

        # Only the answer is held back: the server has got the request.
        proxy.stall("to_client")
        client.sendall(b"three")
        wait_until(lambda: proxy.bytes_sent() == [11])

        proxy.cut()
        with pytest.raises(ConnectionResetError):
            client.recv(10)
        assert [c["open"] for c in proxy.connections()] == [False]


def test_proxy_dribbles_every_byte(echo_port: int) -> None:
    with Proxy(echo_port) as proxy, socket.create_connection(("127.0.0.1", proxy.port), 10) as client:
        client.sendall(b"first")
        assert client.recv(10) == b"first"  # both directions wait for bytes by now, with whatever size they had
        proxy.dribble(2)
        sent = b"0123456789" * 100  # half a second at least: whoever reads is not late for all of it
        client.sendall(sent)
        parts = []
        while sum(map(len, parts)) < len(sent):
            parts.append(client.recv(len(sent)))
        assert b"".join(parts) == sent
        assert len(parts) > 1


@ALL_SERVERS
def test_proxy_passes_the_server(server: AnyServer, server_url: str) -> None:
    with Proxy(server.port) as proxy, connected(server_url, proxy.port) as connection:
        connection.execute(text("SELECT 'marker'"))
        assert b"SELECT 'marker'" in proxy.sent(0)


def test_run_python_shows_the_output_when_the_script_fails() -> None:
    with pytest.raises(AssertionError, match=r"exit status 1(?s:.*)some output(?s:.*)ZeroDivisionError"):
        run_python("print('some output'); 1 / 0")


@pytest.mark.slow
def test_run_python_ends_the_script_and_its_children_when_late(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    source = """
        import subprocess, sys
        from pathlib import Path
        child = subprocess.Popen(["sleep", "600"])
        Path(sys.argv[1]).write_text(str(child.pid))
        child.wait()
    """
    with pytest.raises(AssertionError, match="did not end within 8 s"):
        run_python(source, pid_file, timeout=8)  # in which it has to have begun
    wait_gone([int(pid_file.read_text())])


def test_run_script_gives_the_prelude_in_each_mode(mode: str) -> None:
    done = run_script(
        mode,
        """
        import sys, threading
        from gevent import monkey

        assert monkey.is_module_patched("socket") == (MODE != "threads")
        seen = []
        def work(n):
            wait_until(lambda: len(seen) >= 3)
            return n
        tasks = [spawn(work, n) for n in range(3)]
        for n in range(3):
            sleep(0)
            seen.append(n)
        assert join(tasks) == [0, 1, 2]
        try:
            join(spawn(lambda: 1 / 0))
        except ZeroDivisionError:
            print(MODE, sys.argv[1:], dbsession.__name__)
        """,
        "argument",
    )
    assert done.stdout == f"{mode} ['argument'] dbsession\n"


def test_gunicorn_answers_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "hello.py").write_text(
        "def app(environ, start_response):\n"
        "    start_response('200 OK', [('Content-Length', str(len(environ['PATH_INFO'])))])\n"
        "    return [environ['PATH_INFO'].encode()]\n"
    )
    with Gunicorn("hello:app", "--worker-class=gevent", cwd=tmp_path, workers=2, ready="/") as server:
        assert server.get("/four").text == "/four"
        pids = [server.pid, *server.worker_pids()]
        assert len(pids) == 3
    assert not any(map(pid_alive, pids))
    assert not server.log.exists()


def test_gunicorn_says_why_when_it_does_not_start(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError) as caught, Gunicorn("no_such_module:app", cwd=tmp_path, ready="/"):
        pass
    assert "no_such_module" in "".join(caught.value.__notes__)
