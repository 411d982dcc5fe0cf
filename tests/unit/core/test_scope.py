"""A scope's memory of its transactions."""

from __future__ import annotations

import pytest

from dbsession.core.scope import BaseScope


@pytest.mark.parametrize(
    ("ended", "outcome"),
    [
        ([], None),
        ([("a", "committed", True)], "committed"),
        ([("a", "committed", True), ("a", "rolled back", True)], "rolled back"),
        ([("a", "committed", True), ("a", "rolled back", False)], "committed"),  # it wrote nothing
        ([("a", "rolled back", False)], "rolled back"),
        ([("a", "rolled back", False), ("a", "committed", True)], "committed"),
        ([("a", "unknown", True), ("a", "committed", True)], "unknown"),
        ([("a", "unknown", True), ("b", "committed", True)], "unknown"),
        ([("a", "rolled back", True), ("b", "committed", True)], "committed"),
        ([("a", "committed", True), ("b", "committed", True), ("a", "rolled back", True)], "rolled back"),
    ],
)
def test_outcome_is_that_of_the_last_transaction_that_wrote_unless_one_is_unknown(ended, outcome):
    scope = BaseScope("a job")
    for name, what, lasting in ended:
        scope.note_outcome(name, what, lasting)
    assert scope.outcome == outcome and set(scope.outcomes) == {name for name, _, _ in ended}


def test_scope_that_notes_an_outcome_changes_no_other_scope():
    one, other = BaseScope("one"), BaseScope("other")
    one.note_outcome("a", "committed")
    assert not other.outcomes and not BaseScope("a third").outcomes
