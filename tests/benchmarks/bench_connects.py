"""What a connection to MariaDB costs: CPU to open it, after the first one, and memory while it is idle.

A hundred connections of one engine, each round in a fresh, patched process: to a server without TLS, to one that offers
it, and to one whose certificate is verified. PyMySQL by SQLAlchemy alone stands beside dbsession. The CPU is the
client's; a TLS handshake is a part of it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.certificates import make_authority, make_certificate
from support.mariadb import MariaDBServer

from .common import Metrics, Report, interleave, options, private_bytes

PACKAGES = ("sqlalchemy", "gevent", "greenlet", "pymysql")
COLUMNS = {"ms": "ms of CPU a connect", "kb": "KB an idle connection"}
STOCK, OURS = "SQLAlchemy, PyMySQL", "dbsession"


def child(who: str, url: str, count: int, ca: str) -> None:
    from gevent import monkey

    monkey.patch_all()
    import sqlalchemy

    import dbsession

    more: dict[str, Any] = {"pool_size": count + 1, "connect_args": {"ssl": {"ca": ca}} if ca else {}}
    if who == OURS:
        engine = dbsession.SessionManager({"default": {"url": url, "options": more}}).engine()
    else:
        engine = sqlalchemy.create_engine(url, **more)
    held = [engine.connect()]
    memory, cpu = private_bytes(), time.process_time()
    held += [engine.connect() for _ in range(count)]
    cpu = time.process_time() - cpu
    print(json.dumps({"ms": cpu / count * 1e3, "kb": (private_bytes() - memory) / count / 1024}))
    for connection in held:
        connection.close()
    engine.dispose()


def case(who: str, url: str, count: int, ca: str) -> Callable[[], Metrics]:
    def measure() -> Metrics:
        command = [sys.executable, "-m", "benchmarks.bench_connects", "child", who, url, str(count), ca]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=300)
        return dict(json.loads(done.stdout))

    return measure


def main() -> None:
    given = options(__doc__, rounds=3, quick_rounds=1)
    report = Report("connects", __doc__, given, PACKAGES)
    count = 20 if given.quick else 100
    with tempfile.TemporaryDirectory(prefix="dbs-") as name:
        authority = make_authority(Path(name))
        certificate, key = make_certificate(authority, "server", "IP:127.0.0.1")
        files = {"ca": authority, "cert": certificate, "key": key}
        for title, offered, ca in (
            ("without TLS", False, ""),
            ("TLS where it is offered", True, ""),
            ("TLS, verified", True, str(authority)),
        ):
            server = MariaDBServer(*(f"--ssl-{each}={path}" for each, path in files.items() if offered))
            try:
                url = server.create_database("bench")
                samples = interleave({who: case(who, url, count, ca) for who in (STOCK, OURS)}, given.rounds)
            finally:
                server.close()
            report.table(title, samples, COLUMNS, base=STOCK)
            if not offered:
                report.goal("CPU of a connect after the first", samples.median(OURS, "ms"), "<=", 1, " ms")
            report.goal(f"an idle connection, {title}", samples.median(OURS, "kb"), "<=", 100, " KB")
    report.finish()


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5])
    else:
        main()
