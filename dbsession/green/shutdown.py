"""The end of a process: the statements that still run are ended at the server, which nobody else would do."""

from __future__ import annotations

import time
from typing import Any

import gevent

from dbsession.core import fork
from dbsession.core.pool.checkout import Checkout
from dbsession.green import abandoned, hub, ident
from dbsession.green.engine import process_databases

_LOOK_S = 0.02


def end_statements(within_s: float, at_least_s: float = 0.0) -> int:
    """End every statement that runs now, whoever waits for it; return how many. Switches greenlets until none of them
    is left to be ended at the server.

    A greenlet gets GreenletExit, so that it begins no other statement; its connection has the statement killed. Where
    that is caught and another one begun, and where a thread waits, the server is told at once: whoever waits gets the
    driver's error. A COMMIT is left alone.

    Args:
        within_s: seconds that this may take.
        at_least_s: seconds for which what is begun meanwhile is ended, too.
    """
    fork.look()  # or they are the parent's
    began = time.monotonic()
    told: set[object] = set()  # the greenlets; and the statements, each by its note and when it began
    count = 0
    while (spent_s := time.monotonic() - began) < within_s:
        running = _running()
        for note in running:
            statement = (note, note.changed)
            if statement not in told:
                told.add(statement)
                count += _end(note, told)
        if not running and not abandoned.pending() and spent_s >= at_least_s:
            break
        hub.sleep(_LOOK_S)
    return count


def _running() -> list[Checkout]:
    """The notes of the connections on which the server is at a statement."""
    notes = [note for database in process_databases() for note in database.held.notes()]
    return [note for note in notes if _runs(note) and _is_open(_connection(note))]


def _runs(note: Checkout) -> bool:
    state = note.state()
    # Between two pieces of PostgreSQL's streams nothing runs there.
    return state == "executing" or (state == "streaming" and bool(getattr(_connection(note), "unread", False)))


def _connection(note: Checkout) -> Any:
    record = note.record()
    return None if record is None else record.dbapi_connection


def _is_open(connection: Any) -> bool:
    return connection is not None and getattr(connection, "open", True) is not False


def _end(note: Checkout, told: set[object]) -> bool:
    """End this statement; return whether that is possible."""
    taker: Any = None if note.taker is None else note.taker()
    if taker is not None and taker not in told and _can_be_killed(taker, note):
        told.add(taker)
        gevent.kill(taker)
        return True
    connection = _connection(note)
    abandon = getattr(connection, "on_abandon", None)
    if abandon is not None:
        abandon(connection)
    return abandon is not None


def _can_be_killed(taker: Any, note: Checkout) -> bool:
    """Return whether an ident is a greenlet of this thread's hub. The thread's own first one, which has no parent, ends
    with it."""
    return note.thread == ident.thread() and taker.parent is not None and not taker.dead
