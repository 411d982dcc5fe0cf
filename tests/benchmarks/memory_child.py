"""One figure of bench_memory, in a process of its own:  python -m benchmarks.memory_child WHAT PEER N [URL PATH]

held    bytes of Private_Dirty for each of N greenlets in which a session is held
grown   bytes for each of N cycles of get + clear in one greenlet, which were over
left    bytes for each of N greenlets that asked for a session, never cleared it, and ended
kept    bytes allocated since one row was read, after N times the request PATH of the app PEER on the database URL
"""

# ruff: noqa: E402  # patched first, as in a gunicorn worker
from __future__ import annotations

from gevent import monkey

monkey.patch_all()

import gc
import os
import sys
import tempfile
import tracemalloc

import gevent

from .common import private_bytes
from .peers import BUILDERS, Peer, nothing


def held(peer: Peer, count: int) -> float:
    peer.unit(nothing)
    gevent.spawn(peer.unit, nothing).join()
    before = private_bytes()
    greenlets = [gevent.spawn(peer.unit, gevent.get_hub().switch) for _ in range(count)]
    gevent.sleep(0)
    gevent.sleep(0)
    assert not any(map(bool, (greenlet.ready() for greenlet in greenlets))), "a greenlet ended"
    return (private_bytes() - before) / count


def grown(peer: Peer, count: int) -> float:
    for _ in range(20_000):
        peer.unit(nothing)
    before = private_bytes()
    for _ in range(count):
        peer.unit(nothing)
    return (private_bytes() - before) / count


def left(peer: Peer, count: int) -> float:
    class Abandoned(Exception):
        pass

    def abandon() -> None:
        raise Abandoned  # past the clear, which no `finally` guards in `unit`

    def never_cleared() -> None:
        try:
            peer.unit(abandon)
        except Abandoned:
            pass

    def run(greenlets: int) -> None:
        for _ in range(greenlets // 100):
            gevent.joinall([gevent.spawn(never_cleared) for _ in range(100)])
        gevent.sleep(0.05)

    run(2000)
    before = private_bytes()
    run(count)
    return (private_bytes() - before) / count


def kept(name: str, count: int, url: str, path: str) -> float:
    from .apps import APPS, request

    app = APPS[name](url)
    for warming in ("/line", path, "/line"):
        request(app, warming)
    tracemalloc.start()
    for _ in range(2):
        request(app, "/line")
    gc.collect()
    before = tracemalloc.get_traced_memory()[0]
    for _ in range(count):
        request(app, path)
    gc.collect()
    return tracemalloc.get_traced_memory()[0] - before


def main() -> None:
    what, name, count, *more = sys.argv[1:]
    if what == "kept":
        print(kept(name, int(count), *more))
        return
    with tempfile.TemporaryDirectory(prefix="dbs-") as folder:
        peer = BUILDERS[name](f"sqlite:///{folder}/never.db")
        print({"held": held, "grown": grown, "left": left}[what](peer, int(count)))
    sys.stdout.flush()
    os._exit(0)  # ten thousand greenlets need not be ended one by one


if __name__ == "__main__":
    main()
