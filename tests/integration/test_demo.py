"""deploy/demo itself: what it starts, what it says, and that it leaves nothing."""

from __future__ import annotations

import os
import re
import secrets
import signal
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.desks import environment, sqlite_urls
from support.galera import fixed_ports
from support.processes import Supervised, script_env
from support.waiting import wait_until

DEMO = Path(__file__).resolve().parents[2] / "deploy" / "demo"


def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(DEMO), *arguments], capture_output=True, text=True, timeout=60, env=os.environ | env)


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_demo_explains_itself_and_starts_nothing(option: str) -> None:
    """In a screen; it needs no Python, so it makes no virtual environment."""
    told = run(option, PATH="/usr/bin:/bin")
    assert told.returncode == 0 and told.stderr == ""
    assert "http://127.0.0.1:8000/" in told.stdout and "DASHBOARD_PORT" in told.stdout
    assert len(told.stdout.splitlines()) <= 24


@pytest.mark.parametrize(
    ("arguments", "env", "sentence"),
    [
        (["start"], {}, "deploy/demo takes no argument such as 'start'"),
        (["--help", "me"], {}, "deploy/demo takes no argument"),
        ([], {"PORT": "http"}, "PORT=http is not a port"),
        ([], {"DASHBOARD_PORT": "0"}, "DASHBOARD_PORT=0 is not a port"),
        ([], {"WEB_CONCURRENCY": "two"}, "WEB_CONCURRENCY=two is no number of workers"),
    ],
)
def test_demo_refuses_what_it_does_not_know_in_a_sentence(
    arguments: list[str], env: dict[str, str], sentence: str
) -> None:
    told = run(*arguments, **env)
    assert told.returncode == 2 and sentence in told.stderr and told.stdout == ""


class Demo:
    def __init__(self, folder: Path, port: int, dashboard_port: int) -> None:
        self.log = folder / "log"
        self.base = f"http://127.0.0.1:{port}"
        self.mark = f"DEMO_MARK={secrets.token_hex(8)}"
        key, value = self.mark.split("=")
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        env = {
            **environment(sqlite_urls(folder)),
            "PORT": str(port),
            "DASHBOARD_PORT": str(dashboard_port),
            "DBSESSION_INSPECT": str(folder / "sockets"),
            "TMPDIR": str(self.temporary),
            "PYTHONUNBUFFERED": "1",
            key: value,
        }
        self.process = Supervised([str(DEMO)], log=self.log, env=script_env(env))

    def logs(self) -> str:
        return self.log.read_text(errors="replace")

    def said(self) -> bool:
        assert self.process.poll() is None, self.logs()
        return "orders.csv" in self.logs()

    def pids(self, of: str = "") -> list[int]:
        """Its processes, of which each has the mark in its environment: those with `of` in their command."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                    command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    if of in command and "supervise.py" not in command:
                        found.append(int(folder.name))
            except OSError:
                continue
        return sorted(found)


@contextmanager
def demo(folder: Path) -> Iterator[Demo]:
    port, dashboard_port = fixed_ports(2)
    started = Demo(folder, port, dashboard_port)
    try:
        wait_until(started.said, 120, "the demo says that it is ready")
        yield started
    except BaseException as error:
        error.add_note(started.logs())
        raise
    finally:
        started.process.close()
        for pid in started.pids():
            os.kill(pid, signal.SIGKILL)


def read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=20) as answer:
        return str(answer.read().decode())


@pytest.mark.slow
def test_demo_starts_all_that_it_names_without_a_warning_and_leaves_nothing_at_ctrl_c(tmp_path: Path) -> None:
    with demo(tmp_path) as started:
        (dashboard,) = re.findall(r"dashboard, .* is at (\S+)", started.logs())
        assert "<title>dbsession</title>" in read(dashboard)
        assert f"Metrics for Prometheus are at {started.base}/metrics" in started.logs()
        assert "dbsession_pool" in read(f"{started.base}/metrics")
        page = read(f"{started.base}/")
        assert f'href="{dashboard}"' in page and "What usually goes wrong" in page
        curls = [line.strip() for line in started.logs().splitlines() if line.strip().startswith("curl ")]
        assert len(curls) == 3
        assert not re.search(r"WARNING|ERROR|Warning", started.logs())
        started.process.signal(signal.SIGINT)
        assert started.process.wait(30) == 0
        wait_until(lambda: not started.pids(), 10, "nothing is left")
        assert list(started.temporary.iterdir()) == [] and list((tmp_path / "sockets").glob("*.sock")) == []


@pytest.mark.slow
def test_demo_ends_at_once_at_a_second_ctrl_c(tmp_path: Path) -> None:
    with demo(tmp_path) as started:
        with urllib.request.urlopen(f"{started.base}/healthz", timeout=20):
            started.process.signal(signal.SIGINT)
            wait_until(lambda: "Handling signal: term" in started.logs(), 20)
            started.process.signal(signal.SIGINT)
            assert started.process.wait(30) == 0
        wait_until(lambda: not started.pids(), 10, "nothing is left")


@pytest.mark.slow
@pytest.mark.parametrize(("killed", "named"), [("dbsession dashboard", "the dashboard"), ("gunicorn", "gunicorn")])
def test_demo_ends_as_a_whole_when_a_part_of_it_dies(tmp_path: Path, killed: str, named: str) -> None:
    """It says which; nothing is left of the other."""
    with demo(tmp_path) as started:
        os.kill(started.pids(killed)[0], signal.SIGKILL)  # of gunicorn the master, which is the oldest
        assert started.process.wait(30) == 1
        assert f"deploy/demo: {named} has ended" in started.logs()
        wait_until(lambda: not started.pids(), 10, "nothing is left")


@pytest.mark.slow
def test_demo_takes_the_next_port_when_the_dashboards_is_taken(tmp_path: Path) -> None:
    """Here by the order desk itself."""
    (port,) = fixed_ports(1)
    started = Demo(tmp_path, port, port)
    try:
        wait_until(started.said, 120, "the demo says that it is ready")
        (dashboard,) = re.findall(r"dashboard, .* is at http://127\.0\.0\.1:(\d+)/", started.logs())
        assert int(dashboard) > port
        started.process.signal(signal.SIGTERM)
        assert started.process.wait(30) == 0
        wait_until(lambda: not started.pids(), 10, "nothing is left")
    finally:
        started.process.close()
