"""Close every session of a scope, whatever fails on the way; kills and timeouts pass through at the end."""

from __future__ import annotations

import atexit
import logging
import sys
import time
from typing import Any

from dbsession.core import teardown as core_teardown
from dbsession.core.teardown import Sessions
from dbsession.core.unsaved import report_dropped
from dbsession.green import hub, ident

logger = logging.getLogger("dbsession.teardown")


def close_all(sessions: Sessions, label: str) -> None:
    """Take every entry out of `sessions` and close it. May switch greenlets.

    The entry goes first: whatever happens to the close, nobody finds that session again. `popitem` is one step of the
    interpreter, so that two threads that end the same scope never close one session twice.

    All of them together have `BOUND_S` seconds. Where gevent's timers do not run, the driver's own timeouts have to
    see to that.

    Raises:
        BaseException: the first kill or timeout (anything that is no `Exception`) that landed on the way, after the
            last session was seen to. Errors are logged, one WARNING a session, and not raised: the response is made
            already and nobody could do anything with them.
    """
    kill: BaseException | None = None
    left_s = core_teardown.BOUND_S
    end = time.monotonic() + left_s
    while sessions:
        try:
            database, session = sessions.popitem()
        except KeyError:  # the other thread took the last one
            break
        if database.inherited:
            continue  # it belongs to the parent process: not a byte on its connections
        try:
            if session.in_transaction():
                hub.call_within(left_s, session.close)
            else:
                session.close()
        except BaseException as error:
            failure = core_teardown.not_in_time() if isinstance(error, hub.BoundExceeded) else error
            landed = _give_up(database, session, label, failure)
            kill = kill or landed
        if sessions:
            left_s = end - time.monotonic()
    if kill is not None:
        raise kill


def _give_up(database: Any, session: Any, label: str, failure: BaseException) -> BaseException | None:
    """Take back the connections of a session that failed to close, and log the failure. Returns a kill: `failure`
    itself, or one that landed here. May switch greenlets."""
    kill = core_teardown.kill_of(failure)
    database.stats.teardown_failures += 1
    # Whatever its close() was, the class's own, a user's that overrides it or one that a test put there, invalidate()
    # takes the connections back. Either step may wait, the second in a log handler, and be killed there.
    for step in (session.invalidate, lambda: core_teardown.report(logger, database, label, failure)):
        try:
            step()
        except BaseException as error:
            kill = kill or core_teardown.kill_of(error)
    return kill


def _say_what_the_program_drops() -> None:
    """Report, at the program's end, what the scope of its main thread drops: nobody else says it."""
    if getattr(sys, "last_value", None) is not None:
        return  # it ends by an exception
    try:
        scopes = getattr(ident.current(), "_dbsession_scopes", ())
    except SystemError:  # greenlet's, where a program that embeds Python ends it in another way (uWSGI)
        return
    for scope in scopes:
        if scope.kind == "implicit":
            scope.leave_word()
            for database, session in list(scope.sessions.items()):
                if not database.inherited:
                    report_dropped(session, failing=False)


atexit.register(_say_what_the_program_drops)
