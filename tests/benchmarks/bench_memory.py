"""Memory by Private_Dirty, a fresh process for each sample: sessions held, what cycles leave, what is never cleared.

held    per session held in one of 10,000 greenlets, net of the greenlet (the same greenlets with no session)
grown   per cycle of get + clear, over 1,000,000 of them
kept    by an idle connection of MariaDB, after an answer of 5,000 rows instead of one row: what Python has allocated
left    per greenlet that asked for a session, never cleared it, and ended; net of the greenlet
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

from . import plots
from .common import Metrics, Report, Samples, interleave, options
from .database import database
from .peers import BUILDERS, PATTERN

AGAIN = f"{PATTERN} (again, control)"
NONE = "nothing"
SLOW = ("Flask-SQLAlchemy-Lite", "oslo.db")  # half a millisecond a cycle, and 50 us: a tenth of the cycles
CLEARED_BY_HAND = ("dbsession", PATTERN, "scoped_session (gevent.local)", "scoped_session (getcurrent)")


def child(what: str, name: str, count: int, *more: str) -> Callable[[], Metrics]:
    def measure() -> Metrics:
        peer = PATTERN if name == AGAIN else name
        command = [sys.executable, "-m", "benchmarks.memory_child", what, peer, str(count), *more]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
        return {"bytes": float(done.stdout)}

    return measure


def net(samples: Samples) -> Samples:
    for measured in samples.values.values():
        bare = samples.values[NONE]["bytes"]
        measured["net"] = [value - alone for value, alone in zip(measured["bytes"], bare, strict=True)]
    return samples


def kept(report: Report) -> None:
    names = ("dbsession", "dbsession read-only", PATTERN)
    with database() as (url, _):
        paths = {"rows of a table": "/rows/5000", "rows of no transaction": "/sequence/5000"}
        cases = {f"{name}: {text}": child("kept", name, 5, url, path) for name in names for text, path in paths.items()}
        samples = interleave(cases, 1)
    report.table("kept by an idle connection after 5,000 rows", samples, {"bytes": "B"})
    for name in names[:2]:
        most = max(samples.median(f"{name}: {text}", "bytes") for text in paths)
        report.goal(f"kept by an idle connection after 5,000 rows, {name}", most / 1024, "<=", 10, " KB")


def main() -> None:
    given = options(__doc__)
    report = Report("memory", __doc__, given)
    alive, cycles, ended = (2000, 50_000, 5000) if given.quick else (10_000, 1_000_000, 50_000)

    cases = {name: child("held", name, alive) for name in BUILDERS}
    cases[AGAIN] = child("held", AGAIN, alive)
    held = net(interleave(cases, given.rounds))
    report.table(f"held in {alive:,} greenlets", held, {"bytes": "B a greenlet"})
    report.table(f"held in {alive:,}, net of the greenlet", held, {"net": "B a session"}, base=PATTERN)
    report.goal(
        "memory per held session, net of the greenlet / the pattern",
        held.ratio("dbsession", PATTERN, "net"),
        "<=",
        0.80,
    )
    report.control("the pattern's memory per session", held.ratio(AGAIN, PATTERN, "net"))
    names = [name for name in held.values if name not in (NONE, AGAIN)]
    plots.bars(
        report.folder / "memory_held.svg",
        f"Memory of a held session, {alive:,} greenlets",
        {name: round(held.median(name, "net")) for name in names},
        "bytes a session, net of the greenlet",
    )

    cases = {name: child("grown", name, cycles // 10 if name in SLOW else cycles) for name in BUILDERS}
    grown = interleave(cases, min(3, given.rounds))  # a million of them is many already
    report.table(f"grown over {cycles:,} cycles", grown, {"bytes": "B a cycle"})
    for name in ("dbsession", "dbsession, session_scope()"):
        report.goal(f"growth of {name}, either way", abs(grown.median(name, "bytes")), "<=", 2, " B a cycle")

    left = net(interleave({name: child("left", name, ended) for name in (NONE, *CLEARED_BY_HAND)}, given.rounds))
    report.table(f"left by {ended:,} greenlets, never cleared", left, {"net": "B a greenlet"})
    kept(report)
    report.finish()


if __name__ == "__main__":
    main()
