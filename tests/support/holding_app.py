"""A WSGI application whose requests hold a connection until they are told: for tests of what looks on from outside.

The database is that of HOLDING_URL, with two connections. Who waits for one in vain is seen to wait for ten seconds.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from typing import Any

from sqlalchemy import text

import dbsession
from dbsession import get_dbsession

OPTIONS = {"pool_size": 2, "pool_timeout": 10}
dbsession.configure({"default": {"url": os.environ["HOLDING_URL"], "options": OPTIONS}})
session = get_dbsession()
_released = threading.Event()  # patched: the other requests of the one worker run meanwhile


def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    global _released
    path = environ["PATH_INFO"]
    if path.startswith("/hold/"):
        session.execute(text("SELECT 'a literal' AS held"))
        assert _released.wait(240)
    elif path == "/release":  # all of them
        _released.set()
        _released = threading.Event()
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "0")])
    return []


application = dbsession.DBSessionMiddleware(app)
