"""The asyncio half seen from outside: `dbsession top` and Prometheus over a real server's requests."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from support.gunicorn import Gunicorn
from support.processes import script_env
from support.uvicorn import Uvicorn
from support.waiting import wait_until

APP = "support.holding_asgi_app:application"


@contextmanager
def serve(kind: str, folder: Path) -> Iterator[Gunicorn]:
    env = {"HOLDING_URL": f"sqlite:///{folder}/a.db", "DBSESSION_INSPECT": str(folder / "sockets")}
    arguments = ["--worker-class=asgi", "--graceful-timeout=1"]
    with Uvicorn(APP, env=env) if kind == "uvicorn" else Gunicorn(APP, *arguments, env=env, ready="/") as server:
        yield server


@contextmanager
def holding(server: Gunicorn, *paths: str) -> Iterator[None]:
    requests = [threading.Thread(target=server.get, args=(path,)) for path in paths]
    for request in requests:
        request.start()
    try:
        yield
    finally:
        for request in requests:
            while request.is_alive():  # it may not hold anything yet
                server.get("/release")
                request.join(0.1)


def holders(folder: Path) -> list[dict[str, Any]]:
    """As `dbsession top --json` has them."""
    command = [sys.executable, "-m", "dbsession", "top", "--json", "--folder", str(folder / "sockets")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=script_env({}))
    return [holder for worker in json.loads(done.stdout)["workers"] for holder in worker["holders"]]


def metric(server: Gunicorn, line: str) -> float | None:
    """The value that Prometheus reads."""
    for each in server.get("/metrics").text.splitlines():
        if each.startswith(f"{line} "):
            return float(each.rpartition(" ")[2])
    return None


@pytest.mark.parametrize("kind", [pytest.param("uvicorn", marks=pytest.mark.slow), "gunicorn"])
def test_top_names_the_request_that_holds_a_connection(kind: str, tmp_path: Path) -> None:
    with serve(kind, tmp_path) as server:
        with holding(server, "/hold/orders?token=s3cret"):
            [holder] = wait_until(lambda: holders(tmp_path), 60)
            assert holder["scope"] == "GET /hold/orders" and holder["statement"] == "SELECT ? AS held"
            assert "holding_asgi_app.py" in holder["place"] and holder["state"] == "idle in transaction"
            assert "s3cret" not in json.dumps(holder) and "a literal" not in json.dumps(holder)
        wait_until(lambda: not holders(tmp_path), 60)


def test_metrics_count_what_tasks_hold_and_wait_for_in_vain(tmp_path: Path) -> None:
    with serve("uvicorn", tmp_path) as server:
        in_use = 'dbsession_pool_connections{database="default",state="in_use"}'
        timeouts = 'dbsession_pool_timeouts_total{database="default"}'
        with holding(server, "/hold/a", "/hold/b"):
            wait_until(lambda: metric(server, in_use) == 2.0, 60)
            assert metric(server, 'dbsession_pool_limit{database="default"}') == 2.0
            wait_until(lambda: metric(server, 'dbsession_oldest_holder_seconds{database="default"}'), 60)
            assert not metric(server, timeouts)
            refused = server.get("/hold/c").text
            assert "GET /hold/a (" in refused and "GET /hold/b (" in refused and "[DBS-POOL-TIMEOUT]" in refused
            assert metric(server, timeouts) == 1.0
        wait_until(lambda: metric(server, in_use) == 0.0, 60)
        assert metric(server, 'dbsession_checkouts_total{database="default"}') == 2.0
