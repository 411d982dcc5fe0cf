"""A dirty application (gunicorn/dirty) for test_gunicorn.py; importing it is importing the probe, as a user's would."""

from __future__ import annotations

import os
from typing import Any

from gunicorn.dirty.app import DirtyApp
from sqlalchemy import text

import dbsession
from support import probe_app


class Probe(DirtyApp):
    """Lives as long as a dirty worker."""

    def token(self, value: str) -> dict[str, Any]:
        with dbsession.session_scope("a dirty job"):
            found = probe_app.session.scalar(text("SELECT :t"), {"t": value})
        return {"pid": os.getpid(), "token": found, "checked_out": dbsession.get_engine().pool.checkedout()}
