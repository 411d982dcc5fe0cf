"""Whatever cancels a task of dbsession.aio at whichever of its awaits, nothing is left behind and nobody is told a
lie."""

from __future__ import annotations

import json
from itertools import product

import pytest

from support.aio_cancel import KINDS
from support.aio_sweep import LOST, run_sweep
from support.aio_victim import VARIANTS
from support.drivers import DRIVERS
from support.sweep import rotated

# Every driver, and the cancellation that comes when the answer is there.
QUICK = {("small", "cancel", "aiomysql"), ("small", "late", "asyncmy"), ("level", "cancel", "asyncmy")}
QUICK |= {("small", "cancel", "psycopg_async"), ("small", "late", "asyncpg")}
AIO = [name for name, its in DRIVERS.items() if its.half == "aio"]
# MySQL's drivers are swept whole. What PostgreSQL's add to it are their own waits: each variant is cancelled, and meets
# one of the other kinds, another one with either driver.
_OTHERS = [kind for kind in KINDS if kind != "cancel"]
ROTATED = {(variant, kind, "psycopg_async") for variant, kind in rotated(VARIANTS, _OTHERS)}
ROTATED |= {(variant, kind, "asyncpg") for variant, kind in rotated(VARIANTS, reversed(_OTHERS))}
CASES = [
    pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
    for case in product(VARIANTS, KINDS, AIO)
    if case[2] in ("asyncmy", "aiomysql") or case[1] == "cancel" or case in ROTATED | QUICK
]


SQLITE = [variant for variant in VARIANTS if variant != "queued"]  # its holders would wait for one another's lock


def shown(faults):
    return f"{len(faults)} faults:\n" + json.dumps(faults[:3], indent=1).replace("\\n", "\n")


@pytest.mark.parametrize(("variant", "kind", "driver"), CASES, indirect=["driver"])
def test_task_leaves_nothing_behind_when_cancelled_at_any_await(driver, drivers_server, drivers_url, variant, kind):
    """The cancellation comes out, every session of the scope is closed, its connection's place is free, the next four
    tasks read their own rows, no transaction stays open, and nothing is stored that its caller believes to be rolled
    back: a cancellation at COMMIT says so."""
    report = run_sweep(drivers_server, drivers_url, variant, kind)
    assert report.cancelled >= (4 if driver == "asyncpg" else 10)  # which waits once for each answer
    assert not report.faults, shown(report.faults)


@pytest.mark.parametrize("kind", ["cancel", pytest.param("late", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "variant", [pytest.param(each, marks=pytest.mark.slow) for each in SQLITE if each != "small"] + ["small"]
)
def test_task_leaves_nothing_behind_in_a_file_when_cancelled_at_any_await(tmp_path, variant, kind):
    """With aiosqlite, whose thread carries out the COMMIT that nobody waits for any more."""
    report = run_sweep(None, f"sqlite+aiosqlite:///{tmp_path}/a.db", variant, kind)
    assert report.cancelled >= 9  # three a statement, and one at the end: each is a way to the thread and back
    assert not report.faults, shown(report.faults)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_task_leaves_nothing_behind_when_cancelled_at_any_await_under_uvloop(mariadb, mariadb_url, variant):
    report = run_sweep(mariadb, mariadb_url.replace("pymysql", "asyncmy"), variant, "cancel", "uvloop")
    assert report.cancelled >= 4  # about one a round trip, the COMMIT's among them
    assert not report.faults, shown(report.faults)


@pytest.mark.slow
def test_sweep_finds_the_fault_of_async_scoped_session_without_dbsession(mariadb, mariadb_url):
    """So that a sweep without faults means something."""
    report = run_sweep(mariadb, mariadb_url.replace("pymysql", "asyncmy"), "small", "cancel", bare=True)
    assert LOST in [fault["what"] for fault in report.faults]
