"""asyncio: what a session of a task costs, a value of the loop, and a query; on asyncio's own loop and on uvloop.

task        a task of its own that asks for a session and does nothing with it; net of what the task costs
warm        the session once more, of a task that has one
loop-local  a value of the running loop once more, beside asyncio-loop-local
query       a task that reads one row by its primary key through the ORM, beside an AsyncSession passed by hand
growth      what each of 1,000,000 tasks left, by Private_Dirty, in a fresh process

The first three wait for nothing, and are judged by this process's CPU, in many short rounds.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable
from typing import Any

import uvloop
from sqlalchemy import create_engine, insert, make_url
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from dbsession import aio

from . import aio_peers as peers
from . import plots
from .aio_peers import AGAIN, ALONE, OURS, SCOPED, TASKS, Times
from .apps import POOL
from .common import Metrics, Report, Samples, interleave, options
from .database import database
from .work import ROWS, Base, Item

PACKAGES = ("sqlalchemy", "greenlet", "uvloop", "aiosqlite", "asyncmy", "aiomysql", "asyncio-loop-local")
LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}
NO_COST = 1.03
"""What counts as no measurable cost of a query: two identical copies differ by as much (see the noise)."""

SHORT = 5
"""So many rounds, that much shorter, in place of one, where nothing is waited for: the less time lies between what is
compared, the more alike is what the machine does else."""


class Bench:
    """The benchmark in one loop, which lives as long as it."""

    def __init__(self, report: Report, loop: str, runner: asyncio.Runner, seconds: float) -> None:
        self.report, self.loop, self.runner, self.seconds = report, loop, runner, seconds

    def interleave(self, build: Callable[[], Awaitable[dict[str, Times]]], seconds: float, divided: int = 1) -> Samples:
        """Each case in a task of its own, with what `build` made there. A round is `divided` into shorter ones."""

        async def one(name: str) -> Metrics:
            wall, cpu = await peers.per_time((await build())[name], seconds / divided)
            return {"ns": wall * 1e9, "us": wall * 1e6, "cpu": cpu * 1e6}

        async def names() -> list[str]:
            return list(await build())

        cases = {name: (lambda name=name: self.runner.run(one(name))) for name in self.runner.run(names())}
        return interleave(cases, self.report.options.rounds * divided)

    def goal(self, text: str, samples: Samples, case: str, base: str, limit: float, **how: str) -> None:
        ratio = samples.ratio(case, base, how.pop("metric", "cpu"), **how)
        self.report.goal(f"{self.loop}: {text}", ratio, "<=", limit)

    def control(self, what: str, samples: Samples, case: str, metric: str = "cpu") -> None:
        self.report.control(f"{self.loop}: {what}", samples.ratio(f"{case} {AGAIN}", case, metric))

    def tasks(self, engine: AsyncEngine) -> None:
        async def build() -> dict[str, Times]:
            units = {name: peers.tasks(make(engine)) for name, make in TASKS.items()}
            return units | {f"{SCOPED} {AGAIN}": peers.tasks(TASKS[SCOPED](engine))}

        samples = self.interleave(build, self.seconds, SHORT)
        for measured in samples.values.values():
            alone = samples.values[ALONE]["cpu"]
            measured["net"] = [us - bare for us, bare in zip(measured["cpu"], alone, strict=True)]
        columns = {"us": "us a task", "cpu": "CPU us", "net": "net CPU us"}
        self.report.table(f"{self.loop}: a task", samples, columns, base=SCOPED)
        text = "a task's get and end, unused / async_scoped_session get + remove()"
        self.goal(text, samples, OURS, SCOPED, 0.5)
        self.goal(f"{text}, net of the task", samples, OURS, SCOPED, 0.5, less=ALONE)
        self.control("async_scoped_session's get + remove()", samples, SCOPED)
        plots.bars(
            self.report.folder / f"aio_task_{self.loop}.svg",
            f"A task with a session that nothing was done with, {self.loop}",
            {name: samples.median(name, "cpu") for name in TASKS},
            "µs of CPU a task, the task itself included",
        )

    def warm(self, engine: AsyncEngine) -> None:
        samples = self.interleave(lambda: peers.warm(engine), self.seconds / 2, SHORT)
        self.report.table(f"{self.loop}: warm", samples, {"ns": "ns", "cpu": "CPU us"}, base=peers.WARM_THEIRS)
        for name, text in ((peers.WARM_OURS, "by the proxy"), (peers.WARM_BY_NAME, "by its name")):
            self.goal(f"warm get, {text} / async_scoped_session()", samples, name, peers.WARM_THEIRS, 0.6)
        self.control("async_scoped_session's warm get", samples, peers.WARM_THEIRS)

    def loop_local(self) -> None:
        samples = self.interleave(peers.loop_local, self.seconds / 2, SHORT)
        columns = {"ns": "ns", "cpu": "CPU us"}
        self.report.table(f"{self.loop}: loop-local", samples, columns, base="dict[get_running_loop()]")
        for what, limit in (("singleton", 0.5), ("async with sticky", 0.2)):
            for arguments in ("no arguments", "one argument"):
                case = f"{what}, {arguments}"
                ours, theirs = f"dbsession: {case}", f"asyncio-loop-local: {case}"
                self.goal(f"loop-local {case} / asyncio-loop-local's", samples, ours, theirs, limit)

    def queries(self, database: str, url: str) -> None:
        """Of the database that is configured under that name with `url`."""
        theirs = create_async_engine(url, pool_pre_ping=True, **POOL)
        samples = self.interleave(lambda: peers.queries(theirs, database), self.seconds * 4)
        columns = {"us": "us a query", "cpu": "CPU us"}
        self.report.table(f"{self.loop}, {database}: SELECT by primary key", samples, columns, base=peers.PASSED)
        # Nobody waits for the ROLLBACK at a task's end: it runs beside the next task's query, on another connection,
        # and the time would flatter us. So that case is judged by its CPU, and the one that waits by its time.
        for case, text, metric in (
            (peers.QUERY_OURS, "in a task, CPU", "cpu"),
            (peers.QUERY_IN_SCOPE, "in a scope", "us"),
        ):
            text = f"{database}: a query {text} / an AsyncSession passed by hand"
            self.goal(text, samples, case, peers.PASSED, NO_COST, metric=metric)
        for metric in columns:
            self.control(f"{database}, {columns[metric]} of an AsyncSession passed", samples, peers.PASSED, metric)
        self.runner.run(theirs.dispose())


def growth(report: Report) -> None:
    count = 50_000 if report.options.quick else 1_000_000

    def grown(loop: str, name: str, tasks: int) -> Callable[[], Metrics]:
        def measure() -> Metrics:
            command = [sys.executable, "-m", "benchmarks.aio_child", loop, name, str(tasks)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
            return {"bytes": float(done.stdout)}

        return measure

    for loop in LOOPS:
        cases = {
            name: grown(loop, name, count // 50 if name == peers.NEVER_REMOVED else count) for name in peers.GROWING
        }
        samples = interleave(cases, min(3, report.options.rounds))  # a million of them is many already
        report.table(f"{loop}: grown over {count:,} tasks", samples, {"bytes": "B a task"})
        grew = abs(samples.median(OURS, "bytes"))
        report.goal(f"{loop}: growth of a task's get and end, either way", grew, "<=", 2, " B a task")


def sqlite_file(folder: str) -> str:
    """The URL of one with the table of `apps`."""
    url = f"sqlite:///{folder}/rows.db"
    engine = create_engine(url)
    Base.metadata.create_all(engine, [Item.__table__])
    with engine.begin() as connection:
        connection.execute(insert(Item), [{"id": key, "name": f"item {key}"} for key in range(1, ROWS + 1)])
    engine.dispose()
    return url


def with_driver(url: str, driver: str) -> str:
    address = make_url(url)
    address = address.set(drivername=f"{address.get_backend_name()}+{driver}")
    if driver != "aiosqlite":
        address = address.update_query_dict({"charset": "utf8mb4"})
    return address.render_as_string(hide_password=False)


def main() -> None:
    given = options(__doc__)
    report = Report("aio", __doc__, given, PACKAGES)
    seconds = 0.05 if given.quick else 0.25
    with tempfile.TemporaryDirectory(prefix="dbs-") as folder, database() as (mariadb, _):
        unused = f"sqlite+aiosqlite:///{folder}/never.db"
        urls = {
            "SQLite, aiosqlite": with_driver(sqlite_file(folder), "aiosqlite"),
            "MariaDB, asyncmy": with_driver(mariadb, "asyncmy"),
            "MariaDB, aiomysql": with_driver(mariadb, "aiomysql"),
        }
        aio.configure({"default": unused, **urls})
        for loop, factory in LOOPS.items():
            with asyncio.Runner(loop_factory=factory) as runner:
                bench = Bench(report, loop, runner, seconds)
                engine: Any = create_async_engine(unused)
                bench.tasks(engine)
                bench.warm(engine)
                bench.loop_local()
                for name, url in urls.items():
                    bench.queries(name, url)
    growth(report)
    report.finish()


if __name__ == "__main__":
    main()
