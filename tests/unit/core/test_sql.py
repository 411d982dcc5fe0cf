"""What a statement is, by its first word."""

from __future__ import annotations

from dbsession.core import sql


def test_statement_of_many_comments_is_classified_at_once():
    assert sql._reading_verb("/**/" * 48 + "INSERT") == ""
    assert sql._reading_verb("/**/" * 40 + "SELECT 1") == "select"
