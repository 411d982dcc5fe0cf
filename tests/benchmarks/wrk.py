"""wrk against a gunicorn, and what its workers used of the CPU meanwhile."""

from __future__ import annotations

import os
import re
import subprocess
import time
from pathlib import Path

from support.gunicorn import Gunicorn

from .common import Metrics

_MS = {"us": 0.001, "ms": 1.0, "s": 1000.0, "m": 60_000.0}


def server(app: str, url: str, workers: int) -> Gunicorn:
    """A gunicorn with gevent workers that runs one of APPS; not started yet."""
    arguments = ["--worker-class=gevent", "--worker-connections=2000", "--backlog=4096", "--graceful-timeout=5"]
    env = {"BENCH_APP": app, "BENCH_URL": url}
    return Gunicorn("benchmarks.apps:app", *arguments, workers=workers, env=env, ready="/nothing")


def load(gunicorn: Gunicorn, path: str, connections: int, seconds: int) -> Metrics:
    """One run of wrk, once the server has nothing left to do from the last one."""
    wait_idle(gunicorn)
    command = ["wrk", "-t2", f"-c{connections}", f"-d{seconds}s", "--timeout", "60s", "--latency"]
    cpu = cpu_seconds(gunicorn)
    done = subprocess.run([*command, gunicorn.url + path], capture_output=True, text=True, timeout=seconds + 120)
    if done.returncode:
        raise RuntimeError(f"wrk failed:\n{done.stdout}{done.stderr}")
    cpu = cpu_seconds(gunicorn) - cpu
    requests = int(_found(r"(\d+) requests in", done.stdout)[0])
    refused = re.search(r"Non-2xx or 3xx responses: (\d+)", done.stdout)
    socket_errors = re.search(r"Socket errors: connect (\d+), read (\d+), write (\d+)", done.stdout)
    return {
        "rps": float(_found(r"Requests/sec: +([\d.]+)", done.stdout)[0]),
        "p50": milliseconds(done.stdout, 50),
        "p99": milliseconds(done.stdout, 99),
        "cpu": cpu / max(requests, 1) * 1e6,
        "errors": float(refused[1] if refused else 0) + sum(map(int, socket_errors.groups() if socket_errors else ())),
    }


def _found(pattern: str, text: str) -> tuple[str, ...]:
    found = re.search(pattern, text, re.M)
    if not found:
        raise RuntimeError(f"wrk's output has no {pattern!r}:\n{text}")
    return found.groups()


def milliseconds(text: str, percent: int) -> float:
    value, unit = _found(rf"^ +{percent}% +([\d.]+)(us|ms|s|m) *$", text)
    return float(value) * _MS[unit]


def cpu_seconds(gunicorn: Gunicorn) -> float:
    """What its workers have used so far, in user and in kernel mode."""
    ticks = 0
    for pid in gunicorn.worker_pids():
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def wait_idle(gunicorn: Gunicorn, deadline_s: float = 30.0) -> None:
    """Until the requests that the last wrk left behind are worked off."""
    end = time.monotonic() + deadline_s
    before = -1.0
    while time.monotonic() < end:
        now = cpu_seconds(gunicorn)
        if now == before:
            return
        before = now
        time.sleep(0.15)  # idle is: no CPU time in so long
    raise RuntimeError(f"the workers are still busy {deadline_s:g} s after the load")
