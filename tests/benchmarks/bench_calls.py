"""How far control travels through dbsession's own modules on the ways that are taken most; exact, nothing is timed.

On MariaDB, with PyMySQL under gevent and asyncmy in asyncio: a request of one SELECT and a commit through the
middleware, the close() of a streamed body whose transaction is open, an Engine.connect() and its close(). Each is warm:
its connection is in the pool, SQLAlchemy's caches are filled. Counted by sys.setprofile are the frames of dbsession
alone, what SQLAlchemy and the driver call between them left out:

calls     how many there were
modules   in how many different modules they were
moves     how often a call or a return made the innermost frame one of another module

The calls themselves: python -m benchmarks.calls_child gevent URL --tree. It has no goals.
"""

from __future__ import annotations

import json
import subprocess
import sys

from .common import Report, Samples, options
from .database import database

PACKAGES = ("sqlalchemy", "gevent", "greenlet", "pymysql", "asyncmy")
COLUMNS = {"calls": "calls", "modules": "modules", "moves": "moves"}


def main() -> None:
    given = options(__doc__, rounds=1, quick_rounds=1)
    report = Report("calls", __doc__, given, PACKAGES)
    samples = Samples()
    with database() as (url, _):
        for half in ("gevent", "asyncio"):
            command = [sys.executable, "-m", "benchmarks.calls_child", half, url]
            found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=120).stdout)
            for case, metrics in found.items():
                samples.add(f"{half}: {case}", metrics)
    report.table("of our own frames", samples, COLUMNS)
    report.finish()


if __name__ == "__main__":
    main()
