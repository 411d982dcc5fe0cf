"""The leak watch of the asyncio half: see `dbsession.leaks`.

It looks from a thread of its own, and not from a loop: a loop that is blocked is a reason why connections are held, and
a process may have several, one after another or at once, none of which lasts as long as it.
"""

from __future__ import annotations

import sys
import traceback
from _thread import start_new_thread
from collections.abc import Callable
from contextlib import suppress
from time import sleep

from dbsession.leaks import Watches
from dbsession.turns import Turns


def run_in_thread(work: Callable[[], object]) -> None:
    """Run `work` soon in a thread of its own, which keeps no process running. Never waits and never fails: it is called
    in the middle of a connection's return, also by destructors. (So not threading.Thread: its start() takes locks, and
    waits.)"""

    def bounded() -> None:
        try:
            work()
        except Exception:  # mostly a log handler's; logging it might fail again
            traceback.print_exc()

    if not sys.is_finalizing():
        with suppress(RuntimeError):  # there are too many, or the interpreter is shutting down
            start_new_thread(bounded, ())


watches = Watches(run_in_thread)

_turns = Turns(watches.look, run_in_thread, sleep)


def watch() -> None:
    """See to it that this process has its watcher. Called for each new connection, since a process without one has
    nothing to watch."""
    if watches:
        _turns.start()
