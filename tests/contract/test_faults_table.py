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
    rows = re.findall(r"^\| (\d+) \|(.*)\|$", table, re.M)
    assert [int(number) for number, _ in rows] == list(range(1, 47))
    for number, row in rows:
        named = re.findall(r"`(test_\w+)`", row)
        assert named and all(name.startswith(f"test_f{int(number):02d}_") for name in named), number
    assert set(re.findall(r"`(test_\w+)`", table)) <= defined
