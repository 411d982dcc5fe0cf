"""outcome: what a statement is by its first word."""

from __future__ import annotations

import pytest

from dbsession.core.outcome import _reading_verb


@pytest.mark.parametrize(
    ("statement", "verb"),
    [
        ("SELECT 1", "select"),
        ("  ((/* a */ select 1", "select"),
        ("-- why\nSHOW TABLES", "show"),
        ("INSERT INTO t VALUES (1)", ""),
        ("CALL p()", ""),
        ("/**/" * 48 + "INSERT", ""),
        ("/**/" * 40 + "SELECT 1", "select"),  # many comments take no time to speak of
    ],
)
def test_statement_that_only_reads_is_known_by_its_verb(statement, verb):
    assert _reading_verb(statement) == verb
