"""Under a real gunicorn: a connection that a request holds is named with its route, in the error and in the log."""

from __future__ import annotations

import threading

from support.gunicorn import Gunicorn
from support.waiting import wait_until

CONFIG = """
from gevent import monkey
monkey.patch_all()
import logging
logging.basicConfig(level="INFO")
from dbsession.gunicorn_hooks import post_request, post_worker_init, when_ready, worker_exit
worker_class = "gevent"
"""

APP = """
import os, pathlib, time
import dbsession
from sqlalchemy import text

entry = {"url": "sqlite:///own.db", "options": {"pool_size": 1, "pool_timeout": 0.2}, "leak_after_s": 0.2}
dbsession.configure({"default": entry})
session = dbsession.get_dbsession()

def hold():
    session.execute(text("SELECT 'hidden'"))
    pathlib.Path("held").touch()
    while not os.path.exists("end"):
        time.sleep(0.01)  # patched: the others run
    return ""

def other():
    try:
        session.execute(text("SELECT 1"))
    except dbsession.PoolTimeout as error:
        return str(error)

@dbsession.DBSessionMiddleware
def application(environ, start_response):
    answer = hold() if environ["PATH_INFO"].startswith("/hold") else other()
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [answer.encode()]
"""


def test_request_that_holds_the_connection_is_named_with_route_and_line(tmp_path):
    (tmp_path / "own.py").write_text(APP)
    config = tmp_path / "gunicorn.conf.py"
    config.write_text(CONFIG)
    with Gunicorn("own:application", config=config, cwd=tmp_path, workers=1) as server:
        # The worker's own `dbsession check` has had the only connection, and no longer has it.
        wait_until(lambda: "dbsession check: nothing is wrong" in server.logs(), 60)
        holding = threading.Thread(target=server.get, args=("/hold/7?card=hidden",))
        holding.start()
        try:
            wait_until((tmp_path / "held").exists, 30)
            said = server.get("/other?card=hidden").text
            logged = wait_until(lambda: "leak_after_s" in server.logs() and server.logs(), 30)
        finally:
            (tmp_path / "end").touch()
            holding.join(20)
    line = next(number for number, line in enumerate(APP.splitlines(), 1) if "time.sleep" in line)
    for told in (said, logged):
        assert "GET /hold/7 (" in told and f"now at {tmp_path}/own.py:{line} in hold" in told
        assert "last statement: SELECT ?" in told and "hidden" not in told
    assert said.endswith("[DBS-POOL-TIMEOUT]")
