"""What all benchmarks share: interleaved rounds, medians, ratios, the goals, and the tables, JSON and plots."""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.metadata
import json
import os
import platform
import random
import re
import statistics
import sys
import timeit
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).with_name("results")
PACKAGES = ("sqlalchemy", "gevent", "greenlet", "gunicorn", "pymysql", "flask", "flask-sqlalchemy")

Metrics = dict[str, float]


class Ratio(NamedTuple):
    """The quotient of two medians, and the quotients of the single rounds: the two were measured side by side there."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if self.low == self.high:  # one round, or an exact count
            return f"{figure(self.value)}x"
        return f"{figure(self.value)}x (rounds {figure(self.low)}..{figure(self.high)})"


class Samples:
    """case -> metric -> one value a round. Lives for one table."""

    def __init__(self) -> None:
        self.values: dict[str, dict[str, list[float]]] = {}

    def add(self, case: str, metrics: Metrics) -> None:
        for metric, value in metrics.items():
            self.values.setdefault(case, {}).setdefault(metric, []).append(value)

    def __contains__(self, case: str) -> bool:
        return case in self.values

    def median(self, case: str, metric: str) -> float:
        return statistics.median(self.values[case][metric])

    def worst(self, case: str, metric: str, best: Callable[..., float] = min) -> float:
        """The worst round: the largest value, or with `best=max` the smallest."""
        return (max if best is min else min)(self.values[case][metric])

    def ratio(self, case: str, base: str, metric: str, less: str | None = None) -> Ratio:
        """`case` over `base`; with `less`, the median of that case is subtracted from both first."""
        off = self.median(less, metric) if less else 0.0
        ours, theirs = (self.values[name][metric] for name in (case, base))
        rounds = [quotient(a - off, b - off) for a, b in zip(ours, theirs, strict=True)]
        value = quotient(statistics.median(ours) - off, statistics.median(theirs) - off)
        return Ratio(value, min(rounds), max(rounds))


def quotient(a: float, b: float) -> float:
    return a / b if b else float("inf") if a else 1.0


def interleave(cases: Mapping[str, Callable[[], Metrics]], rounds: int, samples: Samples | None = None) -> Samples:
    """Measure every case in each round: what the machine does meanwhile hits all of them alike. In another order each
    time, so that none always comes after the same, whose heat it would feel."""
    samples = samples or Samples()
    for name in cases:
        samples.values.setdefault(name, {})  # the tables' order
    for number in range(rounds):
        for name in random.Random(number).sample(list(cases), len(cases)):
            progress(f"round {number + 1}/{rounds}: {name}")
            gc.collect()
            samples.add(name, cases[name]())
    progress("")
    return samples


def nanoseconds(get: Any, seconds: float, how: str = "get()") -> float:
    """The time of one evaluation of `how`. The collector stays on: what it costs, belongs to it."""
    timer = timeit.Timer(how, "gc.enable()", globals={"get": get, "gc": gc})
    number = 1
    while (took := timer.timeit(number)) < seconds / 20:
        number *= 4
    number = max(1, int(number * seconds / max(took, 1e-9)))
    return timer.timeit(number) / number * 1e9


def private_bytes() -> int:
    for _ in range(3):
        gc.collect()
    found = re.search(r"^Private_Dirty: +(\d+)", Path("/proc/self/smaps_rollup").read_text(), re.M)
    assert found
    return 1024 * int(found[1])


def progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text[:100]}", end="", file=sys.stderr, flush=True)


def figure(value: float) -> str:
    """A figure for a table: three significant digits, or all those before the point."""
    if value != value:
        return "-"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 0.001 else f"{value:.1e}"


def percentile(values: Iterable[float], percent: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def jain(counts: Sequence[float]) -> float:
    """Jain's fairness index: 1 when all got the same, 1/n when one got everything."""
    squares = sum(count * count for count in counts)
    return sum(counts) ** 2 / (len(counts) * squares) if squares else 0.0


class Goal(NamedTuple):
    text: str
    value: float | None
    shown: str
    limit: str
    met: bool | None


class Report:
    """One benchmark's tables and goals. `finish()` prints the goals and writes everything to a file."""

    def __init__(
        self, name: str, doc: str | None, options: argparse.Namespace, packages: Sequence[str] = PACKAGES
    ) -> None:
        self.name = name
        self.packages = packages
        self.options = options
        self.tables: dict[str, Any] = {}
        self.shown: list[Sequence[Sequence[str]]] = []
        self.goals: list[Goal] = []
        self.noise: dict[str, str] = {}
        self.load_before = os.getloadavg()
        self.folder = RESULTS / "quick" if options.quick else RESULTS
        self.folder.mkdir(parents=True, exist_ok=True)
        print(f"\n# {name}: {(doc or '').splitlines()[0]}")
        print(f"{options.rounds} rounds{', QUICK: figures for trying only' if options.quick else ''}")

    def table(self, title: str, samples: Samples, metrics: Mapping[str, str], base: str | None = None) -> None:
        """Print the medians: a row for each case, a column for each metric, and its ratio to `base` beside it."""
        heads, rows = [title], []
        compared = [metric for metric in metrics if base and samples.median(base, metric)]
        for metric in metrics:
            heads += [metrics[metric]] + (["ratio"] if metric in compared else [])
        for case, measured in samples.values.items():
            row = [case]
            for metric in metrics:
                has = metric in measured
                row.append(figure(samples.median(case, metric)) if has else "-")
                if metric in compared:
                    row.append(f"{samples.ratio(case, base, metric).value:.2f}" if has else "")
            rows.append(row)
        self.text(heads, rows)
        self.tables[title] = samples.values

    def matrix(self, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table of the benchmark's own making, which is shown in results/README.md as well."""
        self.text(heads, rows)
        self.shown.append([heads, *rows])

    def text(self, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]
        print()
        for row in (heads, ["-" * width for width in widths], *rows):
            first, *others = zip(row, widths, strict=True)
            print("  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]).rstrip())

    def control(self, what: str, ratio: Ratio) -> None:
        """The A/A control: the same thing measured twice in each round. What it is off 1 by, is noise."""
        self.noise[what] = str(ratio)

    def goal(self, text: str, value: Ratio | float | None, relation: str, limit: float, unit: str = "") -> None:
        """One line of what must be reached; None: it was not measured."""
        wanted = f"{relation} {figure(limit)}{unit or ('x' if isinstance(value, Ratio) else '')}"
        if value is None:
            self.goals.append(Goal(text, None, "not measured", wanted, None))
            return
        number = value.value if isinstance(value, Ratio) else value
        met = {"<=": number <= limit, ">=": number >= limit, "==": number == limit}[relation]
        shown = str(value) if isinstance(value, Ratio) else f"{figure(value)}{unit}"
        self.goals.append(Goal(text, number, shown, wanted, met))

    def finish(self) -> None:
        verdicts = {True: "met", False: "NOT MET", None: "?"}
        if self.goals:
            rows = [[goal.text, goal.shown, goal.limit, verdicts[goal.met]] for goal in self.goals]
            self.text([f"goals of {self.name}", "measured", "goal", ""], rows)
        for what, ratio in self.noise.items():
            print(f"noise: two identical copies of {what}: {ratio}")
        load = "/".join(f"{value:.1f}" for value in (self.load_before[0], os.getloadavg()[0]))
        print(f"load before/after: {load} on {os.cpu_count()} CPUs")
        content = {
            "benchmark": self.name,
            "command": f"tests/benchmarks/run {' '.join([self.name, *sys.argv[1:]])}",
            "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "quick": self.options.quick,
            "rounds": self.options.rounds,
            "machine": machine(self.packages),
            "load": load,
            "noise": self.noise,
            "shown": self.shown,
            "goals": [goal._asdict() for goal in self.goals],
            "samples": self.tables,
        }
        path = self.folder / f"{self.name}.json"
        path.write_text(json.dumps(content, indent=1) + "\n")
        print(f"written: {path.relative_to(RESULTS.parents[2])}")


def machine(packages: Sequence[str]) -> dict[str, str]:
    versions = {"python": platform.python_version(), "cpus": str(os.cpu_count()), "system": platform.system()}
    return versions | {name: importlib.metadata.version(name) for name in packages}


def options(doc: str | None, rounds: int = 5, quick_rounds: int = 2, **flags: str) -> argparse.Namespace:
    """The command line of a benchmark; `flags` are further switches with their help."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds, for trying")
    parser.add_argument("--rounds", type=int, help=f"default: {rounds}, with --quick {quick_rounds}")
    for flag, text in flags.items():
        parser.add_argument(f"--{flag.replace('_', '-')}", action="store_true", help=text)
    given = parser.parse_args()
    given.rounds = given.rounds or (quick_rounds if given.quick else rounds)
    return given
