"""Cancels one unit of work at each of its awaits, one after the other, and looks at what is left behind.

Run as a script in a process of its own: `from support import aio_sweep; aio_sweep.main()`, with the arguments that
`aio_sweep.run_sweep` gives; it prints one JSON report. The victim's coroutine is driven step by step, and cancelled at
its k-th suspension; k grows until the victim ends before it is reached.

The victim's reads get a few bytes each, so that there is a k for the middle of every packet (not under uvloop, whose
sockets are its own). Where a driver in C reads, the way to the server is a proxy that lets a few pass at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import json
import logging
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from dbsession.core import session as sessions
from support.admin import ServerAdmin, SQLiteAdmin
from support.aio_cancel import KINDS, Kind, stepped
from support.aio_victim import VARIANTS, Bare, Managed, Told, Variant, Work, WrongRow
from support.processes import run_python
from support.proxy import Proxy, ProxyControl
from support.steering import steering

LOST = "places of the pool lost"

RECV_MAX = 7
MISSES = 3  # in a row, and the sweep is over: connecting does not always await as often
ENDED_WITHIN_S = 20.0  # the teardown's own bound is 5


@dataclass
class Report:
    """Of one sweep. `faults` are dicts: k, what, where (the victim was when it was cancelled), detail."""

    cancelled: int = 0
    at_commit: int = 0  # of these, how often the outcome of the COMMIT was unknown
    faults: list[dict[str, Any]] = field(default_factory=list)


def run_sweep(server: Any, url: str, variant: str, kind: str, loop: str = "asyncio", *, bare: bool = False) -> Report:
    """The report of a sweep in a process of its own, against the database `url` (of the server, or a file: None);
    `bare`: of SQLAlchemy alone, up to the first lost place."""
    source = "from support import aio_sweep\naio_sweep.main()"
    with contextlib.ExitStack() as stack:
        control = stack.enter_context(steering(server)) if server is not None else 0
        proxy_control = 0
        if "psycopg" in url:
            proxy = stack.enter_context(Proxy(server.port))
            url, proxy_control = url.replace(f":{server.port}/", f":{proxy.port}/"), proxy.control_port
        done = run_python(source, url, control, proxy_control, variant, kind, loop, int(bare), timeout=400)
    report = Report(**json.loads(done.stdout))
    if done.stderr and not report.faults:  # a connection left to the garbage collector, a task's lost exception
        report.faults.append({"what": "it wrote to stderr", "detail": done.stderr})
    return report


class Sweep:
    """One variant and one kind of cancellation. Lives as long as its process."""

    def __init__(
        self, url: str, control_port: int, proxy_control_port: int, variant: Variant, kind: str, bare: bool
    ) -> None:
        self._make_world = lambda: (Bare if bare else Managed)(url, variant)
        self._bare, self._variant, self._kind = bare, variant, KINDS[kind]
        self._armed = False
        self._proxy = ProxyControl(proxy_control_port) if proxy_control_port else None
        self._said: list[str] = []
        self.report = Report()
        self._admin = ServerAdmin(url, control_port) if control_port else SQLiteAdmin(url)

    async def run(self) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: self._said.append(str(context)))
        self._give_the_victim_little()
        self._listen_to_warnings()
        gc.disable()  # what is left behind must not be found by the collector
        world, missed = await self._fresh_world("before"), 0
        for k in itertools.count(1):
            faults = len(self.report.faults)
            if not await self._cancel_at(k, world):
                missed += 1
                if missed == MISSES:
                    break
            else:
                missed = 0
            if self._bare and any(fault["what"] == LOST for fault in self.report.faults):
                break
            if self._variant.cold or len(self.report.faults) > faults:  # the old one may be of no use any more
                await world.dispose()
                world = await self._fresh_world(f"before-{k}")
        await world.dispose()
        if not self._bare:
            with self._failing("connections are left at the server") as fault:
                await until(lambda: not self._admin.connections(), 20)
            for what, detail in fault:
                self._fault(k, what, "", detail)

    async def _fresh_world(self, prefix: str) -> Any:
        world = self._make_world()
        if not self._variant.cold:
            await self._follow(world, prefix)
        return world

    async def _cancel_at(self, k: int, world: Any) -> bool:
        """Whether the victim came that far."""
        kind, told, token = self._kind(), Told(), f"victim-{k}"
        steps = 0
        self._said.clear()

        async def work() -> None:
            try:
                await Work(world, self._variant).start(token, told)
            except BaseException as error:
                told.error = error
                raise

        def at(awaited: Any) -> None:
            nonlocal steps
            steps += 1
            kind.at(steps - k, awaited)

        enough = asyncio.Event()
        holders = [asyncio.create_task(self._hold(world, enough)) for _ in range(self._variant.holders)]
        if holders:
            await until(lambda: world.in_use() == len(holders), 20)
            asyncio.get_running_loop().call_later(0.01, enough.set)
        self._arm(True)
        kind.victim = victim = asyncio.create_task(kind.around(stepped(work(), at)))
        await asyncio.wait([victim], timeout=ENDED_WITHIN_S)
        self._arm(False)
        enough.set()
        if holders:
            await asyncio.wait(holders, timeout=20)
        if victim.done() and steps < k:
            if told.error is not None:
                self._fault(k, "an error without a cancellation", "", told.error)
            return False
        self.report.cancelled += 1
        where = place(told.error)
        async for what, detail in self._look(world, kind, told, token, where):
            self._fault(k, what, where, detail)
        return True

    def _arm(self, armed: bool) -> None:
        self._armed = armed
        if self._proxy is not None and armed:
            self._proxy.dribble(RECV_MAX, "to_client")
        elif self._proxy is not None:
            self._proxy.resume()

    async def _hold(self, world: Any, enough: asyncio.Event) -> None:
        async with world.scope():
            for name in self._variant.names:
                await Work(world, replace(self._variant, commit=False))._read_and_write(world.get(name), "holder")
            await enough.wait()

    def _fault(self, k: int, what: str, where: str, detail: object) -> None:
        if isinstance(detail, BaseException):
            detail = "".join(traceback.format_exception(detail))
        self.report.faults.append({"k": k, "what": what, "where": where, "detail": str(detail)})

    async def _look(self, world: Any, kind: Kind, told: Told, token: str, where: str) -> Any:
        """Every fault to be seen after a cancellation."""
        victim = kind.victim
        if not victim.done():
            victim.print_stack()
            yield f"the victim still runs after {ENDED_WITHIN_S} s", str(victim)
            victim.cancel()
            await asyncio.wait([victim], timeout=1)
            return
        raised = asyncio.CancelledError() if victim.cancelled() else victim.exception()
        too_late = kind.aside and told.error is None
        if not (too_late or (isinstance(told.error, asyncio.CancelledError) and isinstance(raised, kind.raised))):
            yield f"the cancellation did not come out, but {raised!r}; said was {self._said}", told.error or "no error"
        if isinstance(told.error, WrongRow):
            yield "the victim read a wrong row", told.error
        del raised
        with self._failing("tasks go on") as fault:
            await until(lambda: asyncio.all_tasks() <= {asyncio.current_task()}, 20)
        for each in fault:
            yield each
        if world.in_use():
            yield LOST, [engine.pool.status() for engine in world.engines]
        if told.scope is not None and told.scope.sessions:
            yield "the scope still has sessions", told.scope
        for session in told.sessions:
            sync = session.sync_session
            held = [each for each in sync._open_connections if not (each.closed or each.invalidated)]
            if held or session.in_transaction() or sync._close_state.name != "CLOSED":
                yield "a session is still open", vars(sync)
        if sessions._pinned:
            yield "connections are pinned for ever", sessions._pinned
        if self._said:
            yield "it said something", self._said
        with self._failing("a following task failed") as fault:
            await self._follow(world, f"after-{token}")
        for each in fault:
            yield each
        with self._failing("a transaction is still open at the server") as fault:
            await until(lambda: not self._admin.open_transactions(), 10)
        for each in fault:
            yield each
        for name in self._variant.names:
            stored = self._admin.stored(f"{token}-{name}")
            detail = f"outcome {told.outcome!r}, {told.error!r}"
            if told.lie(name, stored):
                yield f"{name}: {told.lie(name, stored)}", detail
            elif told.outcome == "committed" and not stored and self._variant.names == (name,):
                yield f"{name}: not stored, and the scope says that it was committed", detail
        if not self._bare:
            at_commit = "do_commit" in where
            self.report.at_commit += at_commit
            if {at_commit, told.noted, told.outcome == "unknown"} == {True, False}:
                yield f"at COMMIT: {at_commit}, noted: {told.noted}, outcome: {told.outcome}", told.error

    @staticmethod
    @contextlib.contextmanager
    def _failing(what: str) -> Iterator[list[tuple[str, object]]]:
        found: list[tuple[str, object]] = []
        try:
            yield found
        except Exception as error:
            found.append((what, error))

    async def _follow(self, world: Any, prefix: str) -> None:
        """Four tasks at once, of which each has to read its own rows."""
        variant = replace(self._variant, run="in_block", payload=0, stream=False, between="", commit=True)
        tasks = [asyncio.create_task(Work(world, variant).start(f"{prefix}-{n}", Told())) for n in range(4)]
        done, running = await asyncio.wait(tasks, timeout=30)
        for task in running:
            task.cancel()
        assert not running, f"{len(running)} of 4 tasks wait for ever"
        for task in done:
            task.result()
        assert not world.in_use()

    def _listen_to_warnings(self) -> None:
        # Not those of a session that a cancelled teardown gives up, nor SQLAlchemy's of a cancelled reset.
        handler = logging.Handler(logging.WARNING)
        handler.addFilter(
            lambda record: record.name != "dbsession.aio.closing" and record.msg != "Exception during reset or similar"
        )
        if not self._variant.commit or self._variant.holders:  # whose units of work end so
            handler.addFilter(lambda record: record.name != "dbsession.unsaved")
        handler.emit = lambda record: self._said.append(record.getMessage())
        logging.getLogger().addHandler(handler)

    def _give_the_victim_little(self) -> None:
        cls: Any = socket.socket
        receive, receive_into = cls.recv, cls.recv_into

        def recv(sock: Any, size: int, *flags: int) -> bytes:
            return bytes(receive(sock, min(size, RECV_MAX) if self._armed else size, *flags))

        def recv_into(sock: Any, buffer: Any, nbytes: int = 0, *flags: int) -> int:
            most = nbytes or len(buffer)
            return int(receive_into(sock, buffer, min(most, RECV_MAX) if self._armed else most, *flags))

        cls.recv, cls.recv_into = recv, recv_into


def place(error: BaseException | None) -> str:
    """The functions that `error` came through, innermost first; then those of the one that it came after."""
    found: list[str] = []
    while error is not None:
        frames = reversed(traceback.extract_tb(error.__traceback__))
        found += [f"{frame.name} {frame.lineno}" for frame in frames if "/support/" not in frame.filename]
        error = error.__context__
    return " < ".join(found)


async def until(predicate: Callable[[], object], deadline_s: float) -> None:
    """Returns when `predicate()` is true; AssertionError after `deadline_s` seconds."""
    async with asyncio.timeout(deadline_s):
        while not predicate():
            await asyncio.sleep(0.002)


def main() -> None:
    url, control_port, proxy_control_port, variant, kind, loop, bare = sys.argv[1:]
    factory = None
    if loop == "uvloop":
        import uvloop

        factory = uvloop.new_event_loop
    sweep = Sweep(url, int(control_port), int(proxy_control_port), VARIANTS[variant], kind, bare == "1")
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(sweep.run())
    print(json.dumps(asdict(sweep.report)))
