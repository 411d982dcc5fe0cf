"""postgresql_errors: what follows an error is told by its SQLSTATE, whichever driver raised it."""

from __future__ import annotations

import psycopg
import psycopg2
import pytest

from dbsession.core.backends import postgresql_errors
from dbsession.core.backends.base import Verdict


def by_psycopg(code):
    return psycopg.errors.lookup(code)("what the server said")


def by_psycopg2(code):
    class Error(psycopg2.Error):
        pgcode = code

    return Error("what the server said")


@pytest.mark.parametrize("made", [by_psycopg, by_psycopg2])
@pytest.mark.parametrize(
    ("code", "verdict"),
    [
        ("40P01", Verdict.RETRY),
        ("40001", Verdict.RETRY),
        ("55P03", Verdict.RETRY),
        ("25006", Verdict.FAILOVER),
        ("57P01", Verdict.DISCONNECT),
        ("57P02", Verdict.DISCONNECT),
        ("57P03", Verdict.DISCONNECT),
        ("57P05", Verdict.DISCONNECT),
        ("25P03", Verdict.DISCONNECT),
        ("08006", Verdict.DISCONNECT),
        ("08P01", Verdict.DISCONNECT),
        ("57014", Verdict.FATAL),
        ("23505", Verdict.FATAL),
        ("25P02", Verdict.FATAL),
    ],
)
def test_verdict_is_the_tables(made, code, verdict):
    error = made(code)
    assert postgresql_errors.state(error) == code
    assert postgresql_errors.classify(error) is verdict
    assert postgresql_errors.is_retryable(error) is (verdict is Verdict.RETRY)


def test_error_of_the_client_has_no_state_and_is_fatal():
    error = psycopg.ProgrammingError("the query has 2 placeholders but 1 parameters were passed")
    assert postgresql_errors.state(error) is None
    assert postgresql_errors.classify(error) is Verdict.FATAL


@pytest.mark.parametrize("driver", [psycopg, psycopg2])
def test_lost_connection_of_which_the_server_has_said_nothing_is_a_disconnect(driver):
    """So that a pool in which one after the other is found closed is discarded once a second at most."""
    error = driver.OperationalError("server closed the connection unexpectedly")
    assert postgresql_errors.classify(error) is Verdict.DISCONNECT
    assert postgresql_errors.classify(driver.InterfaceError("the cursor is closed")) is Verdict.FATAL


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (by_psycopg("53300"), True),
        (psycopg.OperationalError("FATAL:  sorry, too many clients already"), True),
        (psycopg.OperationalError("FATAL:  remaining connection slots are reserved for roles with SUPERUSER"), True),
        (psycopg.OperationalError("FATAL:  no more connections allowed (max_client_conn)"), True),
        (psycopg.OperationalError("connection refused"), False),
    ],
)
def test_server_or_pooler_without_room_is_known_by_its_state_or_text(error, full):
    assert postgresql_errors.is_full(error) is full


@pytest.mark.parametrize(("code", "open_"), [("57P01", True), ("40003", True), ("40001", False), ("23505", False)])
def test_commit_that_ended_with_an_error_may_have_happened(code, open_):
    assert postgresql_errors.commit_may_have_happened(by_psycopg(code), False) is open_
    assert postgresql_errors.commit_may_have_happened(by_psycopg(code), True)
