"""What a session costs before any query: get, get and clear, scope; and how that grows.

    warm get        the session of a unit of work that has one
    get + clear     a unit of work that asks for one session and does nothing with it
    new greenlet    the same in a greenlet of its own, less what the greenlet costs
    growth          get + clear over engines configured (1..1,000), greenlets alive that hold a session (1..10,000) and
                    sessions in one scope (1..50)

Everything is patched by gevent, as in a gunicorn worker. No connection is ever opened.
"""

# ruff: noqa: E402  # patched first, as in a gunicorn worker
from __future__ import annotations

from gevent import monkey

monkey.patch_all()

import gc
import math
import tempfile
from collections.abc import Callable
from typing import Any

import gevent
from greenlet import getcurrent

import dbsession
from dbsession import SessionManager, clear_dbsession, get_dbsession, session_scope

from . import pattern, plots
from .common import Metrics, Report, Samples, interleave, nanoseconds, options
from .peers import BUILDERS, PATTERN, Peer, nothing

AGAIN = f"{PATTERN} (again, control)"
FLAT = 1.5
"""What counts as O(1): at the largest size at most so many times the cost of the smallest. Linear would be 1,000x."""


def warm(report: Report, peers: dict[str, Peer], seconds: float) -> Samples:
    """The steps to the session one by one: the name's proxy, its registry, and both."""
    here: dict[Any, Any] = {}

    def bare(name: str) -> Any:
        return here[getcurrent()]

    def single(peer: Peer, get: Any = None, how: str = "get()") -> Callable[[], Metrics]:
        def measure() -> Metrics:
            found: Metrics = {}
            timed = (get, how) if get else (peer.get, peer.how)
            peer.unit(lambda: found.update(ns=nanoseconds(timed[0], seconds, timed[1])))
            return found

        return measure

    here[getcurrent()] = object()
    ours, theirs = peers["dbsession"], peers[PATTERN]
    none, by_name = peers["nothing"], "get('default')"
    cases = {
        "a call of nothing": single(none, nothing),
        "bare dict[getcurrent()]": single(none, bare, by_name),
        "dbsession: get_dbsession(name)": single(ours, get_dbsession, by_name),
        "pattern: get_dbsession(name)": single(theirs, pattern.get_dbsession, by_name),
        "dbsession: proxy.registry()": single(ours, get_dbsession("default").registry),
        "pattern: proxy.registry()": single(theirs, pattern.get_dbsession("default").registry),
    }
    pattern.clear_dbsession()
    skipped = ("nothing", "dbsession, session_scope()", "bare Flask app context")
    cases |= {f"{name}: the session": single(peer) for name, peer in peers.items() if name not in skipped}
    cases[f"{AGAIN}: the session"] = single(theirs)
    samples = interleave(cases, report.options.rounds)
    report.table("warm get", samples, {"ns": "ns"}, base=f"{PATTERN}: the session")

    def ratio(case: str, base: str, less: str | None = None) -> Any:
        return samples.ratio(case, base, "ns", less)

    report.goal(
        "warm get_dbsession(name) / the pattern's",
        ratio("dbsession: get_dbsession(name)", "pattern: get_dbsession(name)"),
        "<=",
        0.25,
    )
    report.goal(
        "warm get_dbsession(name)(), down to the session / the pattern's",
        ratio("dbsession: the session", f"{PATTERN}: the session"),
        "<=",
        0.25,
    )
    report.goal(
        "warm get_dbsession(name) / dict[getcurrent()]",
        ratio("dbsession: get_dbsession(name)", "bare dict[getcurrent()]"),
        "<=",
        1.6,
    )
    report.goal(
        "warm registry(), the session behind the proxy / dict[getcurrent()]",
        ratio("dbsession: proxy.registry()", "bare dict[getcurrent()]"),
        "<=",
        1.6,
    )
    report.control("the pattern's warm get", ratio(f"{AGAIN}: the session", f"{PATTERN}: the session"))
    return samples


def cycles(report: Report, peers: dict[str, Peer], seconds: float) -> Samples:
    def measured(unit: Callable[[Callable[[], None]], None]) -> Callable[[], Metrics]:
        def measure() -> Metrics:
            same = nanoseconds(lambda: unit(nothing), seconds)
            new = nanoseconds(lambda: gevent.spawn(unit, nothing).join(), seconds)
            return {"same": same / 1000, "new": new / 1000}

        return measure

    cases = {name: measured(peer.unit) for name, peer in peers.items()}
    cases[AGAIN] = measured(peers[PATTERN].unit)
    samples = interleave(cases, report.options.rounds)
    for measured_case in samples.values.values():
        spawn = samples.values["nothing"]["new"]
        measured_case["net"] = [new - bare for new, bare in zip(measured_case["new"], spawn, strict=True)]
    report.table("get + clear, unused", samples, {"same": "same greenlet us", "net": "new one, net us"}, base=PATTERN)
    report.goal("get + clear, unused / the pattern", samples.ratio("dbsession", PATTERN, "same"), "<=", 0.5)
    report.control("the pattern's get + clear", samples.ratio(AGAIN, PATTERN, "same"))
    names = [name for name in samples.values if name not in ("nothing", AGAIN)]
    plots.bars(
        report.folder / "micro_cycle.svg",
        "get + clear of a session that nothing was done with",
        {name: samples.median(name, "same") for name in names},
        "µs a unit of work, in the same greenlet (log)",
        log=True,
    )
    return samples


def nothing_used(report: Report, seconds: float) -> None:
    """A teardown where there is nothing to tear down."""

    def app(environ: Any, start_response: Any) -> list[bytes]:
        return []

    def by_hand(environ: Any, start_response: Any) -> list[bytes]:
        try:
            return app(environ, start_response)
        finally:
            pattern.clear_dbsession()

    def scope() -> None:
        with session_scope():
            pass

    wrapped = dbsession.DBSessionMiddleware(app)
    theirs = pattern.dbsession_cache["default"]
    calls: dict[str, Callable[[], Any]] = {
        "dbsession: clear_dbsession()": clear_dbsession,
        "pattern: clear_dbsession()": pattern.clear_dbsession,
        "scoped_session.remove()": theirs.remove,
        "dbsession: with session_scope()": scope,
        "bare WSGI request": lambda: app({}, None),
        "dbsession: request through the middleware": lambda: wrapped({}, None),
        "pattern: request with clear in a finally": lambda: by_hand({}, None),
    }
    cases = {name: (lambda call=call: {"ns": nanoseconds(call, seconds)}) for name, call in calls.items()}
    samples = interleave(cases, report.options.rounds)
    report.table("nothing was used", samples, {"ns": "ns"}, base="pattern: clear_dbsession()")


class Growth:
    """get + clear, per session, at each of `sizes`; `prepare(size)` returns what to time and how to clean up."""

    def __init__(self, report: Report, what: str, sizes: list[int], seconds: float) -> None:
        self.report, self.what, self.sizes, self.seconds = report, what, sizes, seconds

    def run(self, prepare: dict[str, Callable[[int], tuple[Callable[[], Any], Callable[[], None], int]]]) -> None:
        def measured(ready: Callable[[int], Any], size: int) -> Callable[[], Metrics]:
            def measure() -> Metrics:
                call, undo, per_call = ready(size)
                try:
                    gc.collect()
                    return {"us": nanoseconds(call, self.seconds) / 1000 / per_call}
                finally:
                    undo()

            return measure

        cases = {
            f"{name}: {size:,} {self.what}": measured(r, size) for size in self.sizes for name, r in prepare.items()
        }
        samples = interleave(cases, self.report.options.rounds)
        self.report.table(f"get + clear, {self.what}", samples, {"us": "us a session"})
        least, most = min(self.sizes), max(self.sizes)
        series = {}
        for name in prepare:
            series[name] = [(size, samples.median(f"{name}: {size:,} {self.what}", "us")) for size in self.sizes]
        ratio = samples.ratio(f"dbsession: {most:,} {self.what}", f"dbsession: {least:,} {self.what}", "us")
        slope = math.log(ratio.value) / math.log(most / least)
        self.report.goal(
            f"get + clear is O(1) in {self.what}: {least:,} -> {most:,} (exponent {slope:.3f})", ratio, "<=", FLAT
        )
        plots.lines(
            self.report.folder / f"micro_{self.what.split()[0]}.svg",
            f"get + clear over {self.what}",
            series,
            self.what,
            "µs a session",
        )


def growth(report: Report, url: str, peers: dict[str, Peer], seconds: float) -> None:
    quick = report.options.quick

    def cycle(get: Callable[[str], Any], clear: Callable[[], None], names: list[str]) -> Callable[[], None]:
        def call() -> None:
            for name in names:
                get(name)()
            clear()

        return call

    managers: dict[int, SessionManager] = {}

    def manager(size: int) -> SessionManager:
        if size not in managers:
            managers[size] = SessionManager({f"db{number}": url for number in range(size)})
        return managers[size]

    def ours_among(size: int) -> tuple[Callable[[], Any], Callable[[], None], int]:
        return cycle(manager(size).get, manager(size).clear, [f"db{size - 1}"]), nothing, 1

    def theirs_among(size: int) -> tuple[Callable[[], Any], Callable[[], None], int]:
        names = [f"db{number}" for number in range(size)]
        pattern.urls.update(dict.fromkeys(names, url))
        for name in names:
            pattern.get_dbsession(name)
        pattern.clear_dbsession()

        def undo() -> None:
            for name in names:
                del pattern.dbsession_cache[name]

        return cycle(pattern.get_dbsession, pattern.clear_dbsession, names[-1:]), undo, 1

    def alive(peer: Peer) -> Callable[[int], tuple[Callable[[], Any], Callable[[], None], int]]:
        def ready(size: int) -> tuple[Callable[[], Any], Callable[[], None], int]:
            held = [gevent.spawn(peer.unit, gevent.get_hub().switch) for _ in range(size)]
            gevent.sleep(0)
            return lambda: peer.unit(nothing), lambda: gevent.killall(held), 1

        return ready

    def ours_in_one(size: int) -> tuple[Callable[[], Any], Callable[[], None], int]:
        names = [f"db{number}" for number in range(size)]
        return cycle(manager(50).get, manager(50).clear, names), nothing, size

    def theirs_in_one(size: int) -> tuple[Callable[[], Any], Callable[[], None], int]:
        _, undo, _ = theirs_among(50)
        names = [f"db{number}" for number in range(size)]
        return cycle(pattern.get_dbsession, pattern.clear_dbsession, names), undo, size

    engines = [1, 10, 100, 1000]
    Growth(report, "engines configured", engines, seconds).run({"dbsession": ours_among, "pattern": theirs_among})
    greenlets = [1, 100, 2000] if quick else [1, 10, 100, 1000, 10_000]
    Growth(report, "greenlets holding a session", greenlets, seconds).run(
        {"dbsession": alive(peers["dbsession"]), "pattern": alive(peers[PATTERN])}
    )
    Growth(report, "sessions per scope", [1, 2, 5, 10, 20, 50], seconds).run(
        {"dbsession": ours_in_one, "pattern": theirs_in_one}
    )


def main() -> None:
    given = options(__doc__, rounds=7)
    seconds = 0.02 if given.quick else 0.1
    with tempfile.TemporaryDirectory(prefix="dbs-") as folder:
        url = f"sqlite:///{folder}/never.db"
        peers = {name: build(url) for name, build in BUILDERS.items()}
        report = Report("micro", __doc__, given)
        for peer in peers.values():
            peer.unit(nothing)
        warm(report, peers, seconds)
        cycles(report, peers, seconds)
        nothing_used(report, seconds)
        growth(report, url, peers, seconds)
        report.finish()


if __name__ == "__main__":
    main()
