"""Real uWSGI, which forks in C: its workers share nothing of what the import of the application has opened."""

from __future__ import annotations

import http.client
import re
import sqlite3
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy.engine import make_url

from support.processes import Supervised, script_env
from support.waiting import wait_until

REQUESTS = 300
MODES = {
    "plain": [],
    "threads": ["--threads", "3"],
    "lazy": ["--lazy-apps"],
    "gevent": ["--gevent", "50", "--gevent-early-monkey-patch"],
}
TABLE = "CREATE TABLE t (n INTEGER, pid INTEGER)"


def ask(port: int, n: int) -> list[str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", f"/?{n}")
        return connection.getresponse().read().decode().split()
    finally:
        connection.close()


def served(url: str, *options: str) -> tuple[list[list[str]], str]:
    """The answers to the requests 1, 2, ..., and uWSGI's log."""
    folder = Path(tempfile.mkdtemp(prefix="dbs-"))
    log = folder / "log"
    command = [sys.executable, "-c", "import pyuwsgi; pyuwsgi.run()", "--http-socket=127.0.0.1:0", "--master"]
    command += ["--processes=3", "--module=support.uwsgi_app", "--need-app", "--die-on-term", "--disable-logging"]
    process = Supervised(
        [*command, *options], log=log, remove=folder, env=script_env({"DBSESSION_URL": url}), cwd=folder
    )
    try:
        wait_until(lambda: log.read_text().count("spawned uWSGI worker") == 3 or process.poll(), 60, "it starts")
        found = re.search(r"127\.0\.0\.1:(\d+) \(port auto-assigned\)", log.read_text())
        assert found, log.read_text()
        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(lambda n: ask(int(found[1]), n), range(1, REQUESTS + 1)))
        process.signal(15)
        process.wait(30)
        return answers, log.read_text()
    finally:
        process.close()


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_f24_uwsgis_workers_have_connections_of_their_own(mariadb, mariadb_url, mode):
    database = make_url(mariadb_url).database
    with mariadb.root() as cursor:
        cursor.execute(f"USE `{database}`")
        cursor.execute(TABLE)
    answers, log = served(mariadb_url, *MODES[mode])
    assert [answer[2:] for answer in answers] == [[str(n)] * 2 for n in range(1, REQUESTS + 1)], log
    owners: dict[str, set[str]] = {}
    for pid, connection, *_ in answers:
        owners.setdefault(connection, set()).add(pid)
    assert all(len(pids) == 1 for pids in owners.values()) and len(set.union(*owners.values())) > 1
    with mariadb.root() as cursor:
        cursor.execute(f"SELECT n FROM `{database}`.t WHERE pid")
        assert sorted(row["n"] for row in cursor.fetchall()) == list(range(1, REQUESTS + 1))
    assert "Traceback" not in log and "Exception ignored" not in log, log


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_f24_uwsgis_workers_have_an_sqlite_file_open_each(tmp_path, mode):
    path = tmp_path / "a.db"
    with sqlite3.connect(path) as connection:
        connection.execute(TABLE)
    connection.close()
    answers, log = served(f"sqlite:///{path}", *MODES[mode])
    assert [answer[2:] for answer in answers] == [[str(n)] * 2 for n in range(1, REQUESTS + 1)], log
    connection = sqlite3.connect(path)
    assert connection.execute("SELECT n FROM t WHERE pid ORDER BY n").fetchall() == [
        (n,) for n in range(1, REQUESTS + 1)
    ]
    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    connection.close()
    assert "Traceback" not in log and "Exception ignored" not in log, log
