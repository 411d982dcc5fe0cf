"""The check at the start of a real gunicorn: logged by its first worker, beside its work."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from dbsession import gunicorn_hooks
from dbsession.watch.check.probe import BOUND_S
from support.gunicorn import DEMO_CONFIG as CONFIG
from support.gunicorn import PRELOAD
from support.gunicorn import serve_probe as serve
from support.proxy import Proxy
from support.waiting import wait_until

LATE = Path(__file__).with_name("gunicorn_late.conf.py")
SECRET = "n0tth1s"


def logged(server, text):
    wait_until(lambda: text in server.logs(), BOUND_S + 30, f"{text!r} in the log")
    return [line for line in server.logs().splitlines() if "dbsession check: " in line]


@pytest.mark.parametrize("preload", PRELOAD)
@pytest.mark.parametrize(
    "config",
    [
        pytest.param(CONFIG, id="patched at the top"),
        pytest.param(LATE, id="patched by the worker", marks=pytest.mark.slow),
    ],
)
def test_first_worker_alone_logs_what_is_wrong_when_the_budget_is_exceeded(mariadb, mariadb_url, preload, config):
    with mariadb.root() as cursor:
        cursor.execute("SET GLOBAL max_connections = 30")
    try:
        with serve(mariadb_url, *preload, config=config, workers=2) as server:
            (line,) = logged(server, "dbsession check: default: 40 connections (2 workers x 20) at most")
            assert "of max_connections 30" in line and "Raise max_connections to" in line
            # Where nothing sets logging up, Python writes the text alone.
            assert config == LATE or "[ERROR]" in line
            assert mariadb_url not in line and mariadb.password not in server.logs()
            wait_until(lambda: not mariadb.processlist(), 30)  # neither the worker nor the master keeps what it opened
            assert server.get("/token?token=t").text == "t/t"
    finally:
        with mariadb.root() as cursor:
            cursor.execute("SET GLOBAL max_connections = 500")


def test_check_says_nothing_but_one_info_when_all_is_well(mariadb_url, tmp_path):
    config = tmp_path / "conf.py"
    config.write_text(
        f"exec(open({str(CONFIG)!r}).read().replace('__file__', repr({str(CONFIG)!r})))\n"
        "logging.getLogger('dbsession').setLevel('INFO')\n"
    )
    with serve(mariadb_url, "--worker-connections=20", config=config) as server:
        (line,) = logged(server, "dbsession check: nothing is wrong with default.")
        assert "[INFO]" in line


@pytest.mark.parametrize("preload", PRELOAD)
def test_server_starts_and_serves_when_a_database_is_silent(mariadb, mariadb_url, tmp_path, preload):
    with Proxy(mariadb.port) as proxy:
        proxy.stall()
        silent = mariadb_url.replace(f":{mariadb.port}/", f":{proxy.port}/").replace(mariadb.password, SECRET)
        silent += "?connect_timeout=14"  # the check's own bound is a little more
        url = f"sqlite:///{tmp_path}/a.db"
        with serve(url, "--worker-connections=20", *preload, workers=1, DBSESSION_SILENT_URL=silent) as server:
            assert server.get("/token?token=t").text == "t/t"
            assert "dbsession check: " not in server.logs()  # it still waits, and nobody waits for it
            wait_until(proxy.connections, 30, "the check is connected")
            proxy.cut()
            assert len(logged(server, "dbsession check: silent: no connection: OperationalError (2013)")) == 1
            assert server.get("/token?token=t").text == "t/t"
            assert SECRET not in server.logs()


def test_only_the_first_worker_checks(monkeypatch):
    """Without a server: that a later worker will log nothing cannot be waited for."""
    checked = []
    monkeypatch.setattr(gunicorn_hooks.report, "in_worker", checked.append)
    for age in (1, 2, 3):
        gunicorn_hooks.post_worker_init(SimpleNamespace(age=age, cfg=age))
    assert checked == [1]
