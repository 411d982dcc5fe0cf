"""What an error of MySQL or MariaDB means for the transaction, the connection and the pool: one table, by number."""

from __future__ import annotations

import re
from typing import Any

from pymysql.err import MySQLError

from dbsession.core.backends.base import Verdict
from dbsession.core.connection_info import TooLate

_REASONS: dict[int, tuple[Verdict, str]] = {
    # https://mariadb.com/kb/en/mariadb-error-code-reference/ and MySQL's server and client error references
    1047: (Verdict.DISCONNECT, "WSREP has not yet prepared the node: a Galera node outside the primary component"),
    1053: (Verdict.DISCONNECT, "server shutdown in progress"),
    1152: (Verdict.DISCONNECT, "aborted connection"),
    1158: (Verdict.DISCONNECT, "error reading communication packets"),
    1159: (Verdict.DISCONNECT, "timeout reading communication packets"),
    1160: (Verdict.DISCONNECT, "error writing communication packets"),
    1161: (Verdict.DISCONNECT, "timeout writing communication packets"),
    1927: (Verdict.DISCONNECT, "connection was killed (MariaDB)"),
    2006: (Verdict.DISCONNECT, "server has gone away: it could not be sent"),
    2013: (Verdict.DISCONNECT, "lost connection during the query: no answer came"),
    2014: (Verdict.DISCONNECT, "commands out of sync"),
    2045: (Verdict.DISCONNECT, "cannot open shared memory"),
    2055: (Verdict.DISCONNECT, "lost connection, with a system error"),
    4031: (Verdict.DISCONNECT, "disconnected by the server because of inactivity (MySQL 8)"),
    1290: (Verdict.FAILOVER, "the server runs with --read-only"),
    1792: (Verdict.FAILOVER, "cannot execute the statement in a READ ONLY transaction"),
    1836: (Verdict.FAILOVER, "running in read-only mode"),
    1020: (Verdict.RETRY, "the record has changed since it was read (snapshot isolation)"),
    1205: (Verdict.RETRY, "lock wait timeout, MariaDB's NOWAIT too: mostly only the statement was rolled back"),
    1206: (Verdict.RETRY, "the lock table is full: the transaction was rolled back"),
    1213: (Verdict.RETRY, "deadlock, or a Galera certification failure: the transaction was rolled back"),
}

LOCK_WAIT_TIMEOUT = 1205
"""Undoes its statement only, unless the server runs with innodb_rollback_on_timeout=ON."""
READ_ONLY_TRANSACTION = 1792

FULL = {1040, 1135, 1203, 1226}
"""At connecting: too many connections, no thread for one more, too many of this user by either of its limits."""

CLOSED_BEFORE_COMMIT = 2006, "MySQL server has closed the connection before COMMIT was sent: nothing was committed"
"""The driver's number (CR_SERVER_GONE_ERROR) and text where that is certain."""

_WRAPPED = re.compile(r"error (\d+)")
# What 1180 (error during COMMIT) may wrap: the numbers above, or those of the storage engine's handler for the same:
# HA_ERR_RECORD_CHANGED, HA_ERR_LOCK_WAIT_TIMEOUT, HA_ERR_LOCK_DEADLOCK (mysys/my_base.h).
_RETRYABLE_IN_1180 = {1020, 1205, 1213, 123, 146, 149}

# At COMMIT an answer with one of these leaves open what became of it: somebody ended the statement in the middle.
_INTERRUPTED = {1180, 1317, 1969, 3024}


def number(error: BaseException) -> int | None:
    """The server's or the client's error number of a DBAPI error, or of SQLAlchemy's wrapper of one."""
    original: Any = getattr(error, "orig", None) or error
    first = next(iter(original.args), None)
    return first if isinstance(first, int) and not isinstance(first, bool) else None


def classify(error: BaseException) -> Verdict:
    """What has to follow `error`, an error of PyMySQL or asyncmy, or SQLAlchemy's wrapper of one."""
    code = number(error)
    if code == 1180 and _wraps_retryable(error):
        return Verdict.RETRY
    if code == 1290 and "read" not in _message(error).lower():
        return Verdict.FATAL  # the same number for other options, --secure-file-priv say
    if code == 0:
        return Verdict.DISCONNECT  # PyMySQL's InterfaceError(0, ''): its socket is closed
    return _REASONS[code][0] if code in _REASONS else Verdict.FATAL


def is_retryable(error: BaseException) -> bool:
    """Whether `error`, of any driver, is one after which the whole unit of work may be run again."""
    return _is_of_mysql(error) and classify(error) is Verdict.RETRY


def is_refusal(error: BaseException) -> bool:
    """Whether `error` is the server's answer to a statement that it will not do, and that is all: the connection is in
    step."""
    return _is_of_mysql(error) and classify(error) is Verdict.FATAL


def commit_may_have_happened(error: BaseException) -> bool:
    """Whether a COMMIT that ended with `error` may have been carried out all the same."""
    verdict = classify(error)
    if number(error) == 0:
        return False  # the socket was closed already: nothing was sent
    return verdict is Verdict.DISCONNECT or (verdict is not Verdict.RETRY and number(error) in _INTERRUPTED)


def _is_of_mysql(error: BaseException) -> bool:
    """Return whether the number of an error is of the table: one of PyMySQL, whose errors aiomysql raises, too, or of
    asyncmy, which has its own."""
    return isinstance(error, MySQLError) or any(each.__module__ == "asyncmy.errors" for each in type(error).__mro__)


def _wraps_retryable(error: BaseException) -> bool:
    found = _WRAPPED.search(_message(error))
    return found is not None and int(found[1]) in _RETRYABLE_IN_1180


def _message(error: BaseException) -> str:
    original: Any = getattr(error, "orig", None) or error
    return str(original.args[1]) if len(original.args) > 1 else ""


def is_from_socket(error: BaseException) -> bool:
    """Whether the socket itself raised it. An OSError that somebody threw in here, `gevent.Timeout(1, TimeoutError)`
    say, is of a class of theirs, or has neither a number nor the socket's words; it is theirs to catch."""
    return isinstance(error, TooLate) or (
        isinstance(error, OSError)
        and type(error).__module__ in ("builtins", "socket", "ssl", "gevent.ssl", "gevent._socketcommon")
        and (error.errno is not None or "timed out" in str(error))
    )


def is_loss(error: BaseException) -> bool:
    """Whether the connection is gone, so that the server knows and has ended the statement."""
    return is_from_socket(error) and not isinstance(error, TimeoutError)
