"""Finding: one line of the report."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

LEVELS = ("ok", "info", "warning", "error")


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        level: one of LEVELS.
        check: what was looked at; stable, for scripts.
        databases: the names that it is about; none: all of them.
        found: what is, with its values.
        change: what to do about it; empty when there is nothing to do.
    """

    level: str
    check: str
    databases: tuple[str, ...]
    found: str
    change: str = ""


def worst(findings: Iterable[Finding]) -> str:
    """Return the worst level of the findings: `error`, `warning`, or `ok` for everything below."""
    rank = max((LEVELS.index(finding.level) for finding in findings), default=0)
    return LEVELS[rank] if rank >= LEVELS.index("warning") else "ok"
