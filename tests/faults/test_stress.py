"""F9, F14, F18 all at once: kills, timeouts, lost connections and restarts of the server, at random."""

from __future__ import annotations

import json
import random

import pytest

from support.processes import run_script
from support.steering import steering

SLOW = [
    ("mariadb", 3, 2000, 2, "compiled"),
    ("mariadb", 3, 2000, 2, "python"),
    ("postgresql", 3, 2000, 2, "compiled"),
    ("pgbouncer", 1, 400, 1, "compiled"),
]
CASES = [
    ("mariadb", 1, 400, 1, "compiled"),
    ("postgresql", 1, 400, 1, "compiled"),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW),
]


@pytest.mark.parametrize(("server", "waves", "size", "restarts", "parser"), CASES, indirect=["server", "parser"])
def test_f09_pool_is_whole_and_nobody_was_told_a_lie_after_stress(server, server_url, waves, size, restarts, parser):
    """Every request ends, each has read its own rows, every place of the pool is usable afterwards, every commit that
    returned is stored once, and nothing is that its caller believes to be rolled back."""
    seed = random.randrange(10**9)
    with steering(server) as control_port:
        done = run_script(
            "patched",
            "from support import stress\nstress.main()",
            *(server_url, control_port, seed, waves, size, restarts),
            timeout=600,
        )
    report = json.loads(done.stdout)
    faults = report["faults"]
    assert not faults, f"seed {seed}, {report['became']}, {len(faults)} faults:\n" + "\n".join(faults[:5])
    assert not done.stderr, f"seed {seed}"
    assert report["server_kills"] > 0
    assert {"committed", "GreenletExit", "Timeout", "Boom", "TimeoutError"} <= report["became"].keys()
    # Of the others a slow machine kills all.
    assert report["left_alone_committed"] == report["left_alone"] > waves * size / 3
