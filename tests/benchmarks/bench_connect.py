"""What a connection to MariaDB costs: CPU after the first one, the hub's longest stall, memory while it is idle.

A hundred connections of one engine, each round in a fresh, patched process: to a server without TLS, to one that offers
it, and to one whose certificate is verified. PyMySQL by SQLAlchemy alone stands beside dbsession. The CPU is the
client's; a TLS handshake is a part of it. Stall: forty greenlets connect at once, and so long, in CPU time, the hub
computes in one stretch, in which no other greenlet runs.
"""

from __future__ import annotations

import itertools
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
COLUMNS = {"ms": "ms of CPU a connect", "stall": "ms of stall", "kb": "KB an idle connection"}
AT_ONCE = 40
STOCK, OURS = "SQLAlchemy, PyMySQL", "dbsession"


def child(who: str, url: str, count: int, ca: str) -> None:
    from gevent import monkey

    monkey.patch_all()
    import gevent
    import sqlalchemy

    import dbsession

    more: dict[str, Any] = {"pool_size": count + 1 + AT_ONCE, "connect_args": {"ssl": {"ca": ca}} if ca else {}}
    if who == OURS:
        engine = dbsession.SessionManager({"default": {"url": url, "options": more}}).engine()
    else:
        engine = sqlalchemy.create_engine(url, **more)
    held = [engine.connect()]
    memory, cpu = private_bytes(), time.process_time()
    held += [engine.connect() for _ in range(count)]
    cpu = time.process_time() - cpu
    found = {"ms": cpu / count * 1e3, "kb": (private_bytes() - memory) / count / 1024}
    ticks = [time.process_time()]

    def tick() -> None:
        while True:
            gevent.sleep(0.001)
            ticks.append(time.process_time())

    ticker = gevent.spawn(tick)
    gevent.sleep(0.01)
    opening = [gevent.spawn(engine.connect) for _ in range(AT_ONCE)]
    held += [greenlet.get() for greenlet in gevent.joinall(opening, raise_error=True)]
    gevent.sleep(0.01)
    ticker.kill()
    found["stall"] = max(after - before for before, after in itertools.pairwise(ticks)) * 1e3
    print(json.dumps(found))
    for connection in held:
        connection.close()
    engine.dispose()


def case(who: str, url: str, count: int, ca: str) -> Callable[[], Metrics]:
    def measure() -> Metrics:
        command = [sys.executable, "-m", "benchmarks.bench_connect", "child", who, url, str(count), ca]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=300)
        return dict(json.loads(done.stdout))

    return measure


def main() -> None:
    given = options(__doc__, rounds=3, quick_rounds=1)
    report = Report("connect", __doc__, given, PACKAGES)
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
            ratio = samples.ratio(OURS, STOCK, "stall")
            report.goal(f"longest stall of the hub, {AT_ONCE} at once, {title} / PyMySQL", ratio, "<=", 1)
            report.goal(f"an idle connection, {title}", samples.median(OURS, "kb"), "<=", 100, " KB")
    report.finish()


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5])
    else:
        main()
