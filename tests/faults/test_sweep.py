"""F9, F18: whatever ends a request at whichever of its switches, nothing is left behind and nobody is told a lie."""

from __future__ import annotations

import json
from itertools import product

import pytest

from support.servers import on
from support.sweep import KILLS, LOST, VARIANTS, rotated, run_sweep

# A kill, and the exception that SQLAlchemy knows least about.
QUICK = {("small", "GreenletExit"), ("stream", "Boom"), ("reset", "Boom")}
# Who reads the rows matters most where there are any.
READERS = {"mariadb": ("compiled", "python"), "postgresql": ("compiled",), "pgbouncer": ("compiled",)}


def is_quick(server, variant, kill, parser):
    if server == "mariadb":
        return (variant, kill) in QUICK and (parser == "compiled" or variant == "stream")
    return (server, variant, kill) == ("postgresql", "stream", "Boom")


CASES = [
    pytest.param(*case, marks=() if is_quick(*case) else pytest.mark.slow)
    for server, parsers in READERS.items()
    for case in product([server], VARIANTS, KILLS, parsers)
    # Behind PgBouncer the driver is the one that is swept whole without it; its streams are not for that mode.
    if server != "pgbouncer" or ("stream" not in case and case[1:3] in rotated(VARIANTS, KILLS))
]


@pytest.mark.parametrize(("server", "variant", "kill", "parser"), CASES, indirect=["server", "parser"])
def test_f09_request_leaves_nothing_behind_when_killed_at_any_switch(server, server_url, variant, kill, parser):
    """It ends at once with what was thrown, its connection's place is free, the next four requests read their own
    rows, no transaction stays open, and nothing is stored that its caller believes to be rolled back."""
    report = run_sweep(server, server_url, variant, kill)
    assert report.kills > 10
    assert not report.faults, f"{len(report.faults)} faults:\n" + json.dumps(report.faults[:3], indent=1).replace(
        "\\n", "\n"
    )


@pytest.mark.slow
@on("mariadb", "postgresql")
def test_f09_sweep_finds_the_fault_of_the_pattern_without_dbsession(server, server_url):
    """So that a sweep without faults means something."""
    report = run_sweep(server, server_url, "small", "Boom", bare=True)
    assert {LOST, "a following request failed"} & {fault["what"] for fault in report.faults}
