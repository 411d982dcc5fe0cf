"""A WSGI application for the tests of the metrics under a real gunicorn. Each worker has a pool of two.

METRICS_POOL_TIMEOUT_S: the seconds that a request waits for a connection.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any
from urllib.parse import parse_qs

from sqlalchemy import text

import dbsession

options = {"pool_size": 2, "pool_timeout": float(os.environ.get("METRICS_POOL_TIMEOUT_S", "30"))}
dbsession.configure({"default": {"url": os.environ["METRICS_URL"], "options": options, "leak_after_s": 0}})
session = dbsession.get_dbsession()

if os.environ.get("METRICS_QUERY_AT_IMPORT"):
    session.execute(text("SELECT 1"))


def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    path = environ["PATH_INFO"]
    query = {key: values[0] for key, values in parse_qs(environ["QUERY_STRING"]).items()}
    status, answer = "200 OK", str(os.getpid())
    if path == "/query":
        session.execute(text("SELECT 1"))
    elif path == "/hold":
        session.execute(text("SELECT 1"))
        while not os.path.exists(query["until"]):
            time.sleep(0.01)  # patched: the others run
    elif path == "/facts":
        folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
        answer = json.dumps({"pid": os.getpid(), "folder": folder, "imported": "prometheus_client" in sys.modules})
    else:
        status = "404 Not Found"
    start_response(status, [("Content-Type", "text/plain"), ("Content-Length", str(len(answer)))])
    return [answer.encode()]


wrapped = dbsession.DBSessionMiddleware(app)
