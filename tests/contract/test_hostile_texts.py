"""Labels, names, files and statements that command a terminal or forge a log line: escaped, whoever tells of them."""

from __future__ import annotations

import json
import logging
import threading

import pytest
from sqlalchemy import text

from dbsession import SessionManager, errors
from dbsession.core.snapshot import snapshot
from dbsession.watch import cli
from dbsession.watch.inspection import server
from dbsession.watch.inspection.client import collect
from dbsession.watch.top.command import lines
from support.snapshots import HARMLESS, HOSTILE
from support.waiting import wait_until

SOURCE = """
def hold(session, statement, wait):
    session.execute(statement)
    wait()
"""


@pytest.fixture
def told(tmp_path, caplog):
    """A holder that has been told of as a leak, and its manager. Everything that has a name has a hostile one."""
    options = {"pool_size": 1, "pool_timeout": 0.01}
    manager = SessionManager({HOSTILE: {"url": f"sqlite:///{tmp_path}/a.db", "leak_after_s": 0.05, "options": options}})
    names = {}
    exec(compile(SOURCE, f"/srv/{HOSTILE.replace('/', '')}.py", "exec"), names)
    over = threading.Event()

    def job():
        with manager.scope(HOSTILE):
            names["hold"](manager.get(HOSTILE), text(f'SELECT 1 AS "{HOSTILE}"'), over.wait)

    thread = threading.Thread(target=job, name=HOSTILE)
    thread.start()
    try:
        with caplog.at_level(logging.WARNING):
            wait_until(lambda: "dbsession.leaks" in {record.name for record in caplog.records}, 20)
        yield manager
    finally:
        over.set()
        thread.join(20)
        manager.dispose()


def test_log_lines_and_errors_have_no_character_that_does_anything(told, caplog):
    engine = told.engine(HOSTILE)
    with pytest.raises(errors.PoolTimeout) as caught:
        engine.connect()
    said = [*(record.getMessage() for record in caplog.records), str(caught.value)]
    for line in "\n".join(said).splitlines():
        assert line.isprintable(), line
    assert all(HARMLESS in each for each in said)


def test_top_shows_escapes_and_json_has_its_own(told, tmp_path, capsys):
    server.serve_snapshots(tmp_path / "sockets")
    try:
        now = wait_until(lambda: found if (found := collect(tmp_path / "sockets", 5)).workers else None, 20)
        shown = lines(now)
        assert all(line.isprintable() for line in shown) and sum(line.count(HARMLESS) for line in shown) == 3
        assert cli.main(["top", "--json", "--folder", str(tmp_path / "sockets")]) == 0
    finally:
        server.stop()
    [worker] = json.loads(printed := capsys.readouterr().out)["workers"]
    assert printed.rstrip("\n").isprintable() and printed.isascii()
    # What was escaped where it was made stays so; a database's name comes as it is.
    assert worker["databases"][0]["name"] == HOSTILE and snapshot().databases[0].name == HOSTILE
