"""`dbsession top` as a user runs it, on the workers of a real gunicorn."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from dbsession.watch import cli
from dbsession.watch.inspection.client import collect
from support.gunicorn import PRELOAD, serve_probe
from support.processes import pause_process, script_env
from support.waiting import wait_until


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "sockets"


def serve(tmp_path, folder, *arguments, workers=2, **env):
    arguments = ["--graceful-timeout=20", *arguments]  # who is killed leaves its socket
    return serve_probe(f"sqlite:///{tmp_path}/a.db", *arguments, workers=workers, DBSESSION_INSPECT=str(folder), **env)


@contextmanager
def held(server, path="/token?token=s3cret&pause=300"):
    """A request that holds a connection, until the block ends."""
    client = server.connect()
    client.request("GET", path, headers={"Connection": "close"})
    try:
        yield
    finally:
        client.close()


def top(*arguments, status=0, **env):
    command = [sys.executable, "-m", "dbsession", "top", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=script_env(env))
    assert done.returncode == status, (done.returncode, done.stdout, done.stderr)
    return done


def seen(folder, pids):
    """Returns once all these workers serve."""
    wait_until(lambda: sorted(each["pid"] for each in collect(folder, 20).workers) == sorted(pids), 60)


def told_of(folder, pids, silent=()):
    """What `--json` and `--once` print when these workers answer in time; who is slow for once counts as silent."""

    def ask():
        told = json.loads(top("--json", "--folder", folder).stdout)
        found = [each["pid"] for each in told["workers"]], told["silent"]
        return told if found == (sorted(pids), sorted(silent)) else None

    def text():
        text = top("--once", DBSESSION_INSPECT=str(folder)).stdout
        said = text.partition("\n")[0].partition(", silent: ")
        found = said[0].split()[0], said[2]
        return text if found == (str(len(pids)), ", ".join(map(str, sorted(silent)))) else None

    return wait_until(ask, 60), wait_until(text, 60)


@pytest.mark.parametrize("preload", PRELOAD)
def test_held_connection_is_shown_with_its_route_in_text_and_json(tmp_path, folder, preload):
    # The request outlives its worker's grace: that is killed in the end.
    with serve(tmp_path, folder, *preload, "--graceful-timeout=1") as server, held(server):
        seen(folder, server.worker_pids())
        # A worker that has had no request has no engine yet, and so no limit to add.
        wait_until(lambda: server.get("/state") and all(each["databases"] for each in collect(folder, 20).workers), 60)
        wait_until(lambda: "GET /token" in top("--once", "--folder", folder).stdout, 60)
        told, text = told_of(folder, server.worker_pids())
        # The first worker's own `dbsession check` may hold one for a moment, too.
        holders = [holder for each in told["workers"] for holder in each["holders"]]
        [holder] = [holder for holder in holders if holder["scope"] == "GET /token"]
        assert holder["statement"] == "SELECT ?"
        assert text.startswith("2 workers (pid ") and "  GET /token  default  " in text and "\x1b" not in text
        assert "probe_app.py:" in text and "in token" in text and re.search(r"default +[12] +40 ", text)
        assert "s3cret" not in text + json.dumps(told)
        assert folder.stat().st_mode & 0o777 == 0o700
        assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}


def test_paused_worker_is_silent_and_the_others_are_shown(tmp_path, folder):
    with serve(tmp_path, folder) as server:
        paused, other = server.worker_pids()
        seen(folder, [paused, other])
        pause_process(paused)
        try:
            _, text = told_of(folder, [other], [paused])
            assert text.startswith(f"1 worker (pid {other}), silent: {paused}\n")
        finally:
            os.kill(paused, signal.SIGCONT)


@pytest.mark.slow
def test_killed_worker_is_gone_and_its_successor_there(tmp_path, folder):
    with serve(tmp_path, folder, workers=1) as server:
        [killed] = server.worker_pids()
        seen(folder, [killed])
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda: server.worker_pids() not in ([], [killed]), 60)
        seen(folder, server.worker_pids())
        assert [path.name for path in folder.iterdir()] == [f"{server.worker_pids()[0]}.sock"]
    assert list(folder.iterdir()) == []


def test_worker_serves_requests_and_says_so_when_it_cannot_be_inspected(tmp_path, folder):
    folder.mkdir(0o755)
    with serve(tmp_path, folder, workers=1) as server:
        assert server.get("/token?token=a").text == "a/a"
        assert "This worker cannot be inspected: The folder" in server.logs() and "mode 0755" in server.logs()
    assert list(folder.iterdir()) == []


@pytest.mark.slow
def test_nothing_is_served_unless_it_was_asked_for(tmp_path):
    with serve(tmp_path, "", workers=1) as server:
        assert server.get("/token?token=a").text == "a/a"
        opened = set()
        for path in Path(f"/proc/{server.worker_pids()[0]}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed since it was listed
                opened.add(os.readlink(path))
        listening = [line.split() for line in Path("/proc/net/unix").read_text().splitlines() if " 00010000 " in line]
        assert not {f"socket:[{line[6]}]" for line in listening} & opened


def test_nobody_answering_ends_with_1_and_a_sentence(folder):
    done = top("--once", "--folder", folder, status=1)
    assert done.stdout == "" and "No worker serves its snapshot in" in done.stderr
    done = top("--json", "--folder", folder, status=1)
    assert json.loads(done.stdout) == {"workers": [], "silent": [], "unreadable": {}}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "Set DBSESSION_INSPECT to the folder"),
        (["--folder", "x"], "This is no terminal: use --once or --json."),
        (["--folder", __file__, "--once"], "Not a directory"),
        (["--folder", "x", "--interval", "nan"], "'nan' is no number of seconds from 0.1 to 60"),
        (["--folder", "x", "--interval", "0"], "'0' is no number of seconds"),
    ],
)
def test_wrong_usage_ends_with_2_and_a_sentence(arguments, said, capsys):
    try:
        status = cli.main(["top", *arguments])
    except SystemExit as end:  # argparse's own
        status = end.code
    assert status == 2 and said in capsys.readouterr().err


SIZE = (30, 120)
# LINES and COLUMNS count more than the terminal's size, and readline, which pytest loads, has set them to 24 and 80.
TERMINAL = {"TERM": "xterm-256color", "LINES": "30", "COLUMNS": "120"}


def in_terminal(*command, keys=b"", env=None):
    """Exit status and output of a command on a terminal of its own; `keys` are typed once it has drawn something."""
    master, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, SIZE)
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env=script_env({**TERMINAL, **(env or {})}),
        start_new_session=True,
    )
    os.close(terminal)
    output = b""
    try:
        while True:
            ready, _, _ = select.select([master], [], [], 60)
            assert ready, output
            try:
                piece = os.read(master, 65536)
            except OSError:  # nobody has the terminal open any more
                break
            if not piece:
                break
            output += piece
            if keys and b"pause" in output and b"dbsession top" in output:  # the first line is there, and the keys
                os.write(master, keys)
                keys = b""
        return process.wait(30), output.decode(errors="replace")
    finally:
        process.kill()
        process.wait(30)
        os.close(master)


def test_screen_comes_up_in_a_terminal_and_ends_by_its_key(folder):
    status, output = in_terminal("-m", "dbsession", "top", "--folder", folder, keys=b"q")
    assert status == 0, output
    assert "dbsession top" in output and "Traceback" not in output


def test_screen_ends_with_its_terminal_when_no_signal_says_so(folder):
    """Whose controlling terminal it is not, as under some supervisors, gets no SIGHUP."""
    master, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, SIZE)
    process = subprocess.Popen(
        [sys.executable, "-m", "dbsession", "top", "--folder", str(folder)],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env=script_env(TERMINAL),
        start_new_session=True,
    )
    os.close(terminal)
    try:
        output = b""
        while b"pause" not in output:
            ready, _, _ = select.select([master], [], [], 60)
            assert ready, output
            output += os.read(master, 65536)
        os.close(master)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait(30)


def test_screen_says_what_to_install_when_textual_is_missing(tmp_path, folder):
    script = tmp_path / "without.py"
    script.write_text(
        "import sys, importlib.util as util\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name, *more: None if name == 'textual' else find(name, *more)\n"
        "from dbsession.watch.cli import main\n"
        f"sys.exit(main(['top', '--folder', {str(folder)!r}]))\n"
    )
    status, output = in_terminal(script)
    assert status == 2 and "pip install 'gevent-dbsession[top]'" in output
