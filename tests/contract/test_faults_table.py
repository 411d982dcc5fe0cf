"""tests/faults/README.md names a test for each fault, and the tests that it names are there."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]


def test_each_fault_has_a_row_whose_tests_exist():
    table = (TESTS / "faults" / "README.md").read_text()
    defined = set(
        re.findall(r"^(?:async )?def (test_\w+)", "\n".join(p.read_text() for p in TESTS.rglob("test_*.py")), re.M)
    )
    rows = dict(re.findall(r"^\| (\d+) \|(.*)\|$", table, re.M))
    numbers = [int(number) for number in rows]
    assert numbers[:19] == list(range(1, 20))
    assert numbers == sorted(numbers) and numbers[-1] <= 19 + 24  # the points of "Nothing silent"
    for number, row in rows.items():
        named = re.findall(r"`(test_\w+)`", row)
        assert named and all(name.startswith(f"test_f{int(number):02d}_") for name in named), number
    assert set(re.findall(r"`(test_\w+)`", table)) <= defined
