"""Close every session of a unit of work, whatever fails on the way; kills and timeouts pass through at the end."""

from __future__ import annotations

import logging
import time
from typing import Any, Protocol

from dbsession.core import teardown as core_teardown
from dbsession.core.engine import Database
from dbsession.errors import describe
from dbsession.green import hub

logger = logging.getLogger("dbsession.teardown")


class ClosableSession(Protocol):
    """What teardown needs of a session: `sessions.ManagedSession`, or what a user put in its place."""

    def close(self) -> None: ...

    def in_transaction(self) -> bool: ...

    def invalidate(self) -> None: ...


Sessions = dict[Any, Any]  # Database -> ClosableSession, the used set of one scope


def close_all(sessions: Sessions, label: str) -> None:
    """Take every entry out of `sessions` and close it. May switch greenlets.

    The entry goes first: whatever happens to the close, nobody finds that session again. `popitem` is one step of the
    interpreter, so that two threads that end the same scope never close one session twice.

    Raises:
        BaseException: the first kill or timeout (anything that is no `Exception`) that landed on the way, after the
            last session was seen to. Errors are logged, one WARNING a session, and not raised: the response is made
            already and nobody could do anything with them.
    """
    kill: BaseException | None = None
    end = time.monotonic() + core_teardown.BOUND_S
    while sessions:
        try:
            database, session = sessions.popitem()
        except KeyError:  # the other thread took the last one
            break
        failure = close_one(database, session, label, end)
        if failure is not None and not isinstance(failure, Exception):
            kill = kill or failure
    if kill is not None:
        raise kill


def close_one(database: Database, session: ClosableSession, label: str, end: float) -> BaseException | None:
    """Close one session; return what went wrong, a kill before an error, and never raise it. May switch greenlets.

    `end` is when it has to be over, by time.monotonic(). Where gevent's timers do not run, the driver's own timeouts
    have to see to that.
    """
    if database.inherited:
        return None  # it belongs to the parent process: not a byte on its connections
    try:
        if not session.in_transaction() or not hub.timers_run():
            session.close()
        else:
            with hub.Bound(end - time.monotonic()):
                session.close()
        return None
    except hub.BoundExceeded:
        failure: BaseException = TimeoutError(f"not closed within {core_teardown.BOUND_S:g} s")
    except BaseException as error:
        failure = error
    database.stats.teardown_failures += 1
    try:
        # Whatever `close` was, the class's own, a user's that overrides it or one that a test put there: this takes
        # the connections back.
        session.invalidate()
    except BaseException as error:
        if isinstance(failure, Exception) and not isinstance(error, Exception):
            failure = error
    try:
        logger.warning(
            "Database %r: a session of %s failed to close with %s; its connection was discarded.",
            database.name,
            label,
            describe(failure),
        )
    except BaseException as error:  # a log handler may wait, too, and be killed there
        if isinstance(failure, Exception):
            failure = error
    return failure
