"""One figure of bench_aio, in a process of its own:  python -m benchmarks.aio_child LOOP CASE N

The bytes of Private_Dirty that each of N tasks left, one after the other, in a loop of the kind LOOP.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile

from sqlalchemy.ext.asyncio import create_async_engine

from .aio_peers import GROWING, tasks
from .common import private_bytes


async def grown(name: str, url: str, count: int) -> float:
    if name.startswith("dbsession"):
        from dbsession import aio

        aio.configure({"default": url})
    times = tasks(GROWING[name](create_async_engine(url)))
    await times(20_000)
    before = private_bytes()
    await times(count)
    return (private_bytes() - before) / count


def main() -> None:
    loop, name, count = sys.argv[1:]
    new_loop = asyncio.new_event_loop
    if loop == "uvloop":
        import uvloop

        new_loop = uvloop.new_event_loop
    with tempfile.TemporaryDirectory(prefix="dbs-") as folder, asyncio.Runner(loop_factory=new_loop) as runner:
        print(runner.run(grown(name, f"sqlite+aiosqlite:///{folder}/never.db", int(count))), flush=True)
    os._exit(0)  # what was never removed need not be taken apart


if __name__ == "__main__":
    main()
