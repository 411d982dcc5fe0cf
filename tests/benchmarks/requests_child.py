"""What requests cost in a process of its own:  python -m benchmarks.requests_child CONTENDER URL {PATH=TIMES...}

Each PATH of `work` is requested a few times to warm up and then TIMES times, between two marks of `callgrind`. Prints a
JSON object: path -> microseconds of CPU a request. CONTENDER is one of `apps` or of ASYNCIO below; with "without
asyncmy" at its end that driver, whose parser dbsession uses where it is installed, cannot be imported.

With --calls after the arguments it prints, for each path, the functions of dbsession that one request calls, and of all
others how many calls each package has.
"""

# ruff: noqa: E402  # patched first, as in a gunicorn worker
from __future__ import annotations

import sys

WITHOUT = ", without asyncmy"
PASSED, TASK = "asyncio: an AsyncSession passed by hand", "asyncio: dbsession"
ASYNCIO = (PASSED, TASK)

if __name__ == "__main__" and sys.argv[1] not in ASYNCIO:
    from gevent import monkey

    monkey.patch_all()
if __name__ == "__main__" and sys.argv[1].endswith(WITHOUT):
    sys.modules["asyncmy"] = None  # type: ignore[assignment]  # an import of it fails

import asyncio
import cProfile
import gc
import json
import pstats
import random
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from support.proxy import ProxyControl

from . import callgrind
from .work import Item, Line

READS = {"/line": (1, Line), "/twenty": (20, Item)}
"""How many rows of which kind a task of asyncio's reads, each by its key."""

AT_ONCE = 4
"""Connections that are open before anything is measured."""

Times = Callable[[int], None]


def requests(contender: str, url: str, path: str) -> Times:
    from .apps import ALL, request

    if contender not in _built:
        _built[contender] = ALL[contender](url)
    app = _built[contender]

    def times(number: int) -> None:
        for _ in range(number):
            request(app, path)

    return times


_built: dict[str, Any] = {}


class Tasks:
    """An event loop, in which each unit of work is a task of its own."""

    def __init__(self, contender: str, url: str) -> None:
        from sqlalchemy.ext.asyncio import create_async_engine

        from .aio_peers import PASSED as BY_HAND
        from .aio_peers import QUERY_OURS, queries
        from .apps import POOL

        url = url.replace("pymysql", "asyncmy")
        if contender == TASK:
            from dbsession import aio

            aio.configure({"default": url})
        self.runner = asyncio.Runner()
        self.units: dict[str, Any] = {}
        for path, (reads, kind) in READS.items():
            ours = "default" if contender == TASK else None
            found = self.runner.run(queries(create_async_engine(url, **POOL), ours, reads, kind))
            self.units[path] = found[QUERY_OURS if contender == TASK else BY_HAND]
            self.runner.run(self.at_once(path))

    async def at_once(self, path: str) -> None:
        """Open some connections. A task of ours may begin while that before it is being closed, and needs one more."""
        await asyncio.gather(*(self.units[path](1) for _ in range(AT_ONCE)))

    def times(self, path: str) -> Times:
        return lambda number: self.runner.run(self.units[path](number))


def measured(times: Times, number: int) -> float:
    gc.collect()
    cpu = time.process_time()
    callgrind.mark()
    times(number)
    callgrind.mark()
    return (time.process_time() - cpu) / number * 1e6


def calls(times: Times, number: int) -> Iterator[str]:
    """What one unit of work calls: each function of ours, how often and how long in itself; others by package."""
    gc.collect()
    profile = cProfile.Profile()
    profile.runcall(times, number)
    ours: list[tuple[float, float, str]] = []
    packages: Counter[str] = Counter()
    for (file, _, function), (_, count, own, *_) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        parts = Path(file).parts
        if "dbsession" in parts and "site-packages" not in parts:
            where = "/".join(parts[len(parts) - parts[::-1].index("dbsession") :])
            ours.append((count / number, own / number * 1e6, f"{where} {function}"))
        package = parts[parts.index("site-packages") + 1] if "site-packages" in parts else parts[0]
        packages["dbsession" if "dbsession" in parts else package] += count
    yield "   calls  own us  function"
    yield from (f"{count:8.1f}{own:8.2f}  {name}" for count, own, name in sorted(ours, key=lambda row: -row[1]))
    yield from (f"{count / number:8.1f}          {package}" for package, count in packages.most_common(8))


def trips(proxy: ProxyControl, times: Times, number: int) -> float:
    """Round trips to PostgreSQL of one unit of work, by what its clients have sent: each waits for the answer to a
    Query or a Sync, https://www.postgresql.org/docs/current/protocol-flow.html"""

    def so_far() -> int:
        return sum(questions(proxy.sent(each)) for each in range(len(proxy.connections())))

    before = so_far()
    times(number)
    return (so_far() - before) / number


def questions(sent: bytes) -> int:
    at = 8 if int.from_bytes(sent[:4]) == 8 else 0  # it has asked for TLS first
    at, found = at + int.from_bytes(sent[at : at + 4]), 0
    while at < len(sent):
        found += sent[at : at + 1] in (b"Q", b"S")
        at += 1 + int.from_bytes(sent[at + 1 : at + 5])
    return found


def main() -> None:
    contender, url, *cells = (argument for argument in sys.argv[1:] if not argument.startswith("--"))
    random.seed(1)
    warnings.simplefilter("ignore")
    contender = contender.removesuffix(WITHOUT)
    tasks = Tasks(contender, url) if contender in ASYNCIO else None
    wanted: dict[str, tuple[Times, int]] = {}
    for cell in cells:
        path, _, number = cell.partition("=")
        times = tasks.times(path) if tasks else requests(contender, url, path)
        wanted[path] = (times, int(number))
        times(max(2, min(20, int(number))))  # connects, and fills SQLAlchemy's caches
    if "--calls" in sys.argv:
        for path, (times, number) in wanted.items():
            print(f"\n{contender}: {path}", *calls(times, number), sep="\n")
    elif port := [argument.partition("=")[2] for argument in sys.argv if argument.startswith("--trips=")]:
        proxy = ProxyControl(int(port[0]))
        print(json.dumps({path: trips(proxy, *how) for path, how in wanted.items()}))
    else:
        callgrind.start()
        print(json.dumps({path: measured(*how) for path, how in wanted.items()}))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
