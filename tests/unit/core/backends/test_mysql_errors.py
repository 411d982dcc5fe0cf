"""mysql.codes: what an error number means."""

from __future__ import annotations

import pytest
from pymysql import err
from sqlalchemy.exc import OperationalError as WrappedError

from dbsession.core.backends.mysql_errors import Verdict, classify, commit_may_have_happened, is_retryable, number


def error(code, message="text"):
    return err.OperationalError(code, message)


@pytest.mark.parametrize("code", [1047, 1053, 1152, 1158, 1159, 1160, 1161, 1927, 2006, 2013, 2014, 2055])
def test_disconnect_leaves_a_commit_in_doubt(code):
    assert classify(error(code)) is Verdict.DISCONNECT
    assert commit_may_have_happened(error(code)) and not is_retryable(error(code))


@pytest.mark.parametrize("code", [1205, 1206, 1213, 1020])
def test_whole_unit_may_be_run_again(code):
    assert is_retryable(error(code)) and not commit_may_have_happened(error(code))
    assert classify(WrappedError("SELECT 1", None, error(code))) is Verdict.RETRY


@pytest.mark.parametrize("code", [1792, 1836])
def test_failover(code):
    assert classify(error(code)) is Verdict.FAILOVER


def test_1290_is_a_failover_only_when_it_is_about_read_only():
    text = "The MariaDB server is running with the {} option so it cannot execute this statement"
    assert classify(error(1290, text.format("--read-only"))) is Verdict.FAILOVER
    assert classify(error(1290, text.format("--secure-file-priv"))) is Verdict.FATAL


def test_1180_is_what_it_wraps():
    for inner in (1213, 1205, 149, 146, 123):
        wrapped = error(1180, f'Got error {inner} "Lock deadlock; Retry transaction" during COMMIT')
        assert is_retryable(wrapped) and not commit_may_have_happened(wrapped)
    other = error(1180, 'Got error 6 "No such device or address" during COMMIT')
    assert not is_retryable(other) and commit_may_have_happened(other)


def test_interrupted_commit_is_in_doubt_and_a_refused_one_is_not():
    assert commit_may_have_happened(error(1317)) and commit_may_have_happened(error(1969))
    assert not commit_may_have_happened(error(1062)) and classify(error(1062)) is Verdict.FATAL


def test_commit_on_a_closed_connection_was_never_sent():
    closed = err.InterfaceError(0, "")
    assert classify(closed) is Verdict.DISCONNECT and not commit_may_have_happened(closed)


def test_error_without_a_number_is_fatal():
    assert number(ValueError("x")) is None and number(err.Error()) is None
    assert classify(err.Error("Already closed")) is Verdict.FATAL
