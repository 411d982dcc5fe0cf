"""What the benchmarks found, from the JSON that they wrote:  python -m benchmarks.summary

Writes results/README.md: every goal, met or not, and the profile. tests/integration/test_readme.py holds it to the
JSON.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from .common import figure

RESULTS = Path(__file__).with_name("results")
NAMES = (
    *("requests", "round_trips", "checkout", "pool", "connect", "http"),
    *("profile", "micro", "memory", "settings", "aio"),
)


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
        for heads, *rows in report.get("shown", []):
            parts.append("\n".join(f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows)) + "\n")
        if report["goals"]:
            parts.append(f"{table(report['goals'])}\n")
        else:
            parts += [f"{medians(samples, title)}\n" for title, samples in report["samples"].items()]
        if noise:
            parts.append(f"Two identical copies of the same thing, in the same rounds (the noise):\n\n{noise}")
    missing = [name for name in NAMES if not (RESULTS / f"{name}.json").exists()]
    if missing:
        parts.append(f"## Not measured\n\nNo whole run of these is recorded: {', '.join(missing)}.\n")
    return "\n".join(parts)


def main() -> None:
    (RESULTS / "README.md").write_text(all_goals())
    print("written: tests/benchmarks/results/README.md")


if __name__ == "__main__":
    main()
