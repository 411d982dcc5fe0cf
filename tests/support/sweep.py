"""Kills one unit of work at each of its switches to the Hub, one after the other, and looks at what is left behind.

Run as a script in a patched process: `from support import sweep; sweep.main()`, with the arguments that
`sweep.run_sweep` gives; it prints one JSON report. A kill is scheduled at the victim's k-th switch and thrown from the
loop, as `Greenlet.kill` and `gevent.Timeout` do; k grows until the victim ends before it is reached.

The answer of a local server is often there before anybody waits for it, and no switch would be made. So the victim's
reads and writes make their own: each read one before the answer is there and one when it is, and gives a few bytes;
what is sent goes in two pieces or more. There is a k for the middle of every packet, in both directions. Where a driver
in C reads and writes, the way to the server is a proxy that lets a few bytes pass at a time.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import logging
import socket
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import gevent
import gevent.event
import gevent.hub
import gevent.socket
import greenlet
from sqlalchemy import text

from support.admin import ServerAdmin
from support.processes import run_script
from support.proxy import Proxy, ProxyControl
from support.steering import steering
from support.victim import KILLS, VARIANTS, Bare, Managed, Told, Variant, WrongRow, work
from support.waiting import wait_until

LOST = "places of the pool lost"

RECV_MAX = 24
PASSED_MAX = 7
SEND_MAX = 65536
MISSES = 3  # in a row, and the sweep is over: connecting does not always switch as often
ENDED_WITHIN_S = 15.0  # what is promised is one second; the machine may be busy


@dataclass
class Report:
    """Of one sweep. `faults` are dicts: k, what, where (the victim was when the kill came), detail."""

    kills: int = 0
    slowest_s: float = 0.0
    faults: list[dict[str, Any]] = field(default_factory=list)


def run_sweep(server: Any, url: str, variant: str, kill: str, *, bare: bool = False, timeout: float = 400) -> Report:
    """The report of a sweep in a process of its own, against this database of the server; `bare`: of SQLAlchemy alone,
    with the pattern that everybody writes by hand, up to the first lost place."""
    source = "from support import sweep\nsweep.main()"
    with contextlib.ExitStack() as stack:
        control = stack.enter_context(steering(server))
        if not url.startswith("mysql"):
            proxy = stack.enter_context(Proxy(server.port))
            url = url.replace(f":{server.port}/", f":{proxy.port}/")
            proxy_control = proxy.control_port
        else:
            proxy_control = 0
        done = run_script("patched", source, url, control, proxy_control, variant, kill, int(bare), timeout=timeout)
    report = Report(**json.loads(done.stdout))
    if done.stderr and not report.faults:  # a socket left to the garbage collector, an error in a greenlet of ours
        report.faults.append({"what": "it wrote to stderr", "detail": done.stderr})
    return report


def rotated(variants: Iterable[str], kills: Iterable[str]) -> list[tuple[str, str]]:
    """Every variant once, each with the next kind of kill: for what a driver shares with one that is swept whole."""
    return list(zip(variants, itertools.cycle(kills), strict=False))


class Sweep:
    """One variant and one kind of kill. Lives as long as its process."""

    def __init__(
        self, url: str, control_port: int, proxy_control_port: int, variant: Variant, kill: str, bare: bool
    ) -> None:
        self._make_world = lambda: (Bare if bare else Managed)(url, variant)
        self._bare, self._variant, self._make_kill = bare, variant, KILLS[kill]
        self._hub = gevent.get_hub()
        self._victim: Any = None
        self._armed = False
        self._logged: list[str] = []
        self.report = Report()
        self._admin = ServerAdmin(url, control_port)
        self._proxy = ProxyControl(proxy_control_port) if proxy_control_port else None

    def run(self) -> None:
        if self._proxy is None:
            self._slow_down_the_victim()
        self._listen_to_warnings()
        gc.disable()  # what is left behind must not be found by the collector
        world, missed = self._fresh_world("before"), 0
        for k in itertools.count(1):
            faults = len(self.report.faults)
            if not self._kill_at(k, world):
                missed += 1
                if missed == MISSES:
                    break
            else:
                missed = 0
            if self._bare and any(fault["what"] == LOST for fault in self.report.faults):
                break
            if self._variant.cold:
                world.dispose()
            if self._variant.cold or len(self.report.faults) > faults:  # the old one may be of no use any more
                world = self._fresh_world(f"before-{k}")
        world.dispose()

    def _fresh_world(self, prefix: str) -> Any:
        world = self._make_world()
        if not self._variant.cold:
            self._follow(world, prefix)
        return world

    def _kill_at(self, k: int, world: Any) -> bool:
        """Whether the victim came that far."""
        kill, told, token = self._make_kill(), Told(), f"victim-{k}"
        switches, where = 0, ""
        self._logged.clear()

        def run() -> None:
            self._armed = True
            try:
                work(world, self._variant, token, told)
            except BaseException as error:
                told.error = error
            finally:
                self._armed = False

        def trace(_: str, switch: tuple[Any, Any]) -> None:
            nonlocal switches
            if self._armed and switch == (victim, self._hub):
                switches += 1
                if switches == k:
                    self._hub.loop.run_callback(throw)

        def throw() -> None:
            nonlocal where
            if self._armed:  # else it has ended meanwhile
                where = " < ".join(
                    f"{frame.name}:{frame.lineno}"
                    for frame in reversed(traceback.extract_stack(victim.gr_frame))
                    if "/gevent/" not in frame.filename and frame.name not in ("pass_turn", "recv_into", "sendall")
                )
                victim.throw(kill)

        enough = gevent.event.Event()
        holders = [gevent.spawn(self._hold, world, enough) for _ in range(self._variant.holders)]
        if holders:
            wait_until(lambda: all(engine.pool.checkedout() == len(holders) for engine in world.engines), 20)
            gevent.spawn_later(0.005, enough.set)  # the victim waits by then
        if self._proxy is not None:
            self._proxy.dribble(PASSED_MAX, "to_client")
        self._victim = victim = gevent.spawn(run)
        greenlet.settrace(trace)
        started = time.monotonic()
        victim.join(ENDED_WITHIN_S)
        greenlet.settrace(None)
        ended_s = time.monotonic() - started
        if self._proxy is not None:
            self._proxy.resume()
        gevent.joinall(holders, 20, raise_error=True)
        if victim.dead and switches < k:
            if told.error is not None:
                self._fault(k, "an error without a kill", where, told.error)
            return False
        self.report.kills += 1
        self.report.slowest_s = max(self.report.slowest_s, round(ended_s, 3))
        for what, detail in self._look(world, victim, kill, told, token, where):
            self._fault(k, what, where, detail)
        return True

    def _hold(self, world: Any, enough: gevent.event.Event) -> None:
        with world.scope():
            for name in self._variant.names:
                world.get(name).execute(text("SELECT 1"))
            assert enough.wait(60)

    def _fault(self, k: int, what: str, where: str, detail: object) -> None:
        if isinstance(detail, BaseException):
            detail = "".join(traceback.format_exception(detail))
        self.report.faults.append({"k": k, "what": what, "where": where, "detail": str(detail)})

    def _look(
        self, world: Any, victim: Any, kill: BaseException, told: Told, token: str, where: str
    ) -> Iterator[tuple[str, object]]:
        """Every fault to be seen after a kill; `where` is empty when it came too late."""
        if not victim.dead:
            yield f"the victim still runs after {ENDED_WITHIN_S} s", "".join(traceback.format_stack(victim.gr_frame))
            victim.kill(block=False)
            victim.join(1)
            return
        if where and told.error is not kill and not self._logged_instead(kill, told):
            yield f"the kill did not come out, logged was {self._logged}", told.error or "no error"
        if isinstance(told.error, WrongRow):
            yield "the victim read a wrong row", told.error
        with self._failing(LOST) as fault:
            # A returned connection may be cleaned by a greenlet of ours for a moment.
            wait = 10.0 if "reset" in self._variant.entry else 0.0
            wait_until(lambda: not any(engine.pool.checkedout() for engine in world.engines), wait)
        yield from fault
        with self._failing("a following request failed") as fault:
            self._follow(world, f"after-{token}")
        yield from fault
        with self._failing("a transaction is still open at the server") as fault:
            wait_until(lambda: not self._admin.open_transactions(), 10.0)
        yield from fault
        for name in self._variant.names:
            stored = self._admin.stored(f"{token}-{name}")
            detail = f"outcome {told.outcome!r}, {told.error!r}"
            if told.lie(name, stored):
                yield f"{name}: {told.lie(name, stored)}", detail
            elif told.outcome == "committed" and not stored and self._variant.names == (name,):
                yield f"{name}: not stored, and the scope says that it was committed", detail
            elif told.outcome == "unknown" and "commit:" not in where:
                yield f"{name}: the outcome is unknown, and nothing was being committed", detail

    def _logged_instead(self, kill: BaseException, told: Told) -> bool:
        # Teardown cannot tell an exception like any other from a failure of its own, and goes on.
        in_teardown = told.body_ended and told.error is None
        return in_teardown and isinstance(kill, Exception) and type(kill).__name__ in str(self._logged)

    @staticmethod
    @contextlib.contextmanager
    def _failing(what: str) -> Iterator[list[tuple[str, object]]]:
        found: list[tuple[str, object]] = []
        try:
            yield found
        except Exception as error:
            found.append((what, error))

    def _follow(self, world: Any, prefix: str) -> None:
        """Four requests at once, of which each has to read its own rows."""
        variant = replace(self._variant, payload=0, stream=False, commit=True)
        requests = [gevent.spawn(work, world, variant, f"{prefix}-{n}", Told()) for n in range(4)]
        gevent.joinall(requests, timeout=30, raise_error=True)
        running = [request for request in requests if not request.dead]
        gevent.killall(running, block=False)
        assert not running, f"{len(running)} of 4 requests wait for ever"
        assert not any(engine.pool.checkedout() for engine in world.engines) or "reset" in variant.entry

    def _listen_to_warnings(self) -> None:
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record: self._logged.append(
            record.getMessage() + (f" {record.exc_info[0].__name__}" if record.exc_info and record.exc_info[0] else "")
        )
        logging.getLogger().addHandler(handler)

    def _slow_down_the_victim(self) -> None:
        cls: Any = socket.socket
        receive, send = cls.recv_into, cls.send  # which gevent's sendall() calls, too

        def pass_turn() -> None:
            """Comes back when the loop has done what it has to do by now, a kill given at this very switch included."""
            waiter: Any = gevent.hub.Waiter(self._hub)
            self._hub.loop.run_callback(self._hub.loop.run_callback, waiter.switch, None)
            waiter.get()

        def recv_into(sock: Any, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
            if greenlet.getcurrent() is not self._victim:
                return int(receive(sock, buffer, nbytes, flags))
            gevent.socket.wait_read(sock.fileno(), timeout=sock.gettimeout())
            pass_turn()
            return int(receive(sock, buffer, min(nbytes or len(buffer), RECV_MAX), flags))

        def send_a_part(sock: Any, data: Any, *args: Any, **kwargs: Any) -> int:
            if greenlet.getcurrent() is self._victim:
                pass_turn()
                # A packet at first; then what is left of it, in a memoryview of sendall().
                data = data[: min(SEND_MAX, (len(data) + 1) // 2 if isinstance(data, bytes) else len(data))]
            return int(send(sock, data, *args, **kwargs))

        cls.recv_into, cls.send = recv_into, send_a_part


def main() -> None:
    url, control_port, proxy_control_port, variant, kill, bare = sys.argv[1:]
    sweep = Sweep(url, int(control_port), int(proxy_control_port), VARIANTS[variant], kill, bare == "1")
    sweep.run()
    print(json.dumps(asdict(sweep.report)))
