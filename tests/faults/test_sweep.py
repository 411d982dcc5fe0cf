"""F9, F18: whatever ends a request at whichever of its switches, nothing is left behind and nobody is told a lie."""

from __future__ import annotations

import json
from itertools import product

import pytest

from support.sweep import KILLS, LOST, VARIANTS, run_sweep

# A kill, and the exception that SQLAlchemy knows least about.
QUICK = {("small", "GreenletExit"), ("stream", "Boom"), ("reset", "Boom")}
# Who reads the rows matters most where there are any.
CASES = [
    pytest.param(
        variant,
        kill,
        parser,
        marks=() if (variant, kill) in QUICK and (parser == "compiled" or variant == "stream") else pytest.mark.slow,
    )
    for parser, variant, kill in product(("compiled", "python"), VARIANTS, KILLS)
]


@pytest.mark.parametrize(("variant", "kill", "parser"), CASES, indirect=["parser"])
def test_f09_request_leaves_nothing_behind_when_killed_at_any_switch(mariadb, mariadb_url, variant, kill, parser):
    """It ends at once with what was thrown, its connection's place is free, the next four requests read their own
    rows, no transaction stays open, and nothing is stored that its caller believes to be rolled back."""
    report = run_sweep(mariadb_url, mariadb.socket, variant, kill)
    assert report.kills > 10
    assert not report.faults, f"{len(report.faults)} faults:\n" + json.dumps(report.faults[:3], indent=1).replace(
        "\\n", "\n"
    )


@pytest.mark.slow
def test_f09_sweep_finds_the_fault_of_the_pattern_without_dbsession(mariadb, mariadb_url):
    """So that a sweep without faults means something."""
    report = run_sweep(mariadb_url, mariadb.socket, "small", "Boom", bare=True)
    assert LOST in [fault["what"] for fault in report.faults]
