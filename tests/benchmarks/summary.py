"""What the benchmarks found, from the JSON that they wrote:  python -m benchmarks.summary

Writes results/README.md (every goal, met or not, and the profile) and the table of README.md's section "What it costs"
(some of the goals). tests/integration/test_readme.py holds both to the JSON.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from .common import figure

RESULTS = Path(__file__).with_name("results")
README = RESULTS.parents[2] / "README.md"
NAMES = ("round_trips", "pool", "http", "profile", "micro", "memory", "aio")
BEGIN, END = "<!-- written by tests/benchmarks/run -->", "<!-- end of what tests/benchmarks/run writes -->"

SHOWN = [
    "round trips",
    "closed loop, 1,000:",
    "open arrivals, 125 %: p99",
    "uncontended",
    "1 worker, -c100, SELECT",
    "1 worker, -c1000, SELECT: p99",
    "warm get_dbsession(name)",
    "get + clear, unused",
    "memory per held session",
    "asyncio: a task's get and end",
    "asyncio: warm get",
    "asyncio: loop-local",
    "asyncio: SQLite, aiosqlite: a query in a scope",
    "asyncio: MariaDB, asyncmy: a query in a scope",
    "asyncio: MariaDB, aiomysql: a query in a scope",
    "asyncio: growth",
]
"""How the goals begin that README.md shows; those that are not met are shown in any case."""


def found() -> list[dict[str, Any]]:
    """The benchmarks that have results, as their JSON."""
    paths = [RESULTS / f"{name}.json" for name in NAMES]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def table(goals: list[dict[str, Any]]) -> str:
    verdicts = {True: "yes", False: "**no**", None: "not measured"}
    rows = [f"| {goal['text']} | {goal['shown']} | {goal['limit']} | {verdicts[goal['met']]} |" for goal in goals]
    return "\n".join(["| measured | result | goal | met |", "|---|---|---|---|", *rows])


def medians(samples: dict[str, dict[str, list[float]]], title: str) -> str:
    columns = list(dict.fromkeys(metric for measured in samples.values() for metric in measured))
    rows = [f"| {title} | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for case, measured in samples.items():
        rows.append(f"| {case} | {' | '.join(figure(statistics.median(measured[name])) for name in columns)} |")
    return "\n".join(rows)


def all_goals() -> str:
    """results/README.md."""
    parts = ["# Results\n\nWritten by `tests/benchmarks/run`; the single rounds are in the JSON files.\n"]
    for report in found():
        machine = ", ".join(f"{name} {version}" for name, version in report["machine"].items())
        noise = "".join(f"- {what}: {ratio}\n" for what, ratio in report["noise"].items())
        parts.append(
            f"## {report['benchmark']}\n\n`{report['command']}`, {report['when']}, {report['rounds']} rounds.\n"
            f"{machine}; load before/after {report['load']}.\n"
        )
        if report["goals"]:
            parts.append(f"{table(report['goals'])}\n")
        else:
            parts += [f"{medians(samples, title)}\n" for title, samples in report["samples"].items()]
        if noise:
            parts.append(f"Two identical copies of the same thing, in the same rounds (the noise):\n\n{noise}")
    return "\n".join(parts)


def some_goals() -> str:
    """What stands in README.md between the two marks."""
    goals = [goal for report in found() for goal in report["goals"]]
    return table([goal for goal in goals if not goal["met"] or goal["text"].startswith(tuple(SHOWN))])


def main() -> None:
    (RESULTS / "README.md").write_text(all_goals())
    text = README.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    README.write_text(f"{before}{BEGIN}\n{some_goals()}\n{END}{after}")
    print("written: tests/benchmarks/results/README.md, README.md")


if __name__ == "__main__":
    main()
