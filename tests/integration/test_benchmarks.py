"""The benchmarks run to their end, with the smallest counts: what they print and write is there, whatever it says."""

from __future__ import annotations

import importlib.util
import json
import os

import pytest

from support.processes import TESTS, run_python

pytestmark = pytest.mark.slow

# What is made smaller in each; and left out where it is not installed, as the peers are for whole runs only.
SMALL = {
    "requests": "bench.CELLS = {path: cell._replace(quick=min(cell.quick, 1)) for path, cell in bench.CELLS.items()}",
    "checkout": """
in_child = bench.in_child
bench.in_child = lambda pool, clients, seconds: in_child(pool, clients, 0.3)
if not installed:
    del bench.POOLS["DBUtils PooledDB"]
""",
    "connect": "bench.AT_ONCE = 5",
    "settings": """
bench.ROWS, bench.QUERIES, bench.load = 100, 2, lambda *given: load(*given[:2], 4, 1)
if not installed:
    bench.SERVERS = {bench.PYTHON_PARSER: bench.SERVERS[bench.PYTHON_PARSER]}
    common.machine = lambda packages: {}
""",
}
NEEDS = {"checkout": "dbutils", "settings": "gunicorn_h1c"}
NOT_IN_QUICK = {
    "requests": [f"streamed Core rows{without}: CPU / the pattern" for without in ("", ", without asyncmy")],
}


@pytest.mark.parametrize("name", SMALL)
def test_benchmark_measures_all_that_it_says(name, tmp_path):
    results = tmp_path / "tests" / "benchmarks" / "results"
    needed = NEEDS.get(name)
    installed = needed is None or importlib.util.find_spec(needed) is not None
    if needed == "dbutils" and not installed:  # its children import it, too
        stub = tmp_path / needed / "pooled_db.py"
        stub.parent.mkdir()
        stub.write_text("PooledDB = None")
    run_python(
        f"""
import sys
from pathlib import Path
installed = {installed}
from benchmarks import bench_{name} as bench, callgrind, common
from benchmarks.wrk import load
common.RESULTS = Path({str(results)!r})
callgrind.available = lambda: False  # CPU time is enough here, and fifty times quicker
{SMALL[name]}
sys.argv[1:] = ["--quick", "--rounds", "1"]
bench.main()
""",
        timeout=300,
        env={"PYTHONPATH": f"{TESTS}{os.pathsep}{tmp_path}"},
    )
    report = json.loads((results / "quick" / f"{name}.json").read_text())
    assert report["quick"] and report["rounds"] == 1 and report["samples"]
    for title, cases in report["samples"].items():
        for case, metrics in cases.items():
            assert metrics and all(metrics.values()), (title, case)
    left_out = [goal["text"] for goal in report["goals"] if goal["value"] is None]
    assert left_out == NOT_IN_QUICK.get(name, [])
