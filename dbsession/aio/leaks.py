"""The leak watch of the asyncio half: see `dbsession.leaks`.

It looks from a thread of its own, and not from a loop: a loop that is blocked is a reason why connections are held, and
a process may have several, one after another or at once, none of which lasts as long as it. Nor from a greenlet, where
gevent has patched the process: a hub may be blocked by a loop in its thread, or end with it.
"""

from __future__ import annotations

import _thread
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from types import ModuleType
from typing import Any

from dbsession.core.periodic import Turns
from dbsession.core.pool.leaks import Watches


def _own(module: ModuleType, name: str) -> Any:
    """The interpreter's own function, whatever gevent has patched; it is not loaded for that."""
    monkey = sys.modules.get("gevent.monkey")
    return getattr(module, name) if monkey is None else monkey.get_original(module.__name__, name)


_start_thread: Callable[[Callable[[], object], tuple[()]], int] = _own(_thread, "start_new_thread")
_sleep: Callable[[float], None] = _own(time, "sleep")

this_thread: Callable[[], int] = _own(_thread, "get_ident")
"""The number of the native thread, whatever gevent has patched."""


def run_in_thread(work: Callable[[], object]) -> None:
    """Run `work` soon in a thread of its own, which keeps no process running. Never waits: it is called in the middle
    of a connection's return, also by destructors. (So not threading.Thread: its start() takes locks, and waits.)

    Raises:
        RuntimeError: there are too many threads.
    """

    def bounded() -> None:
        try:
            work()
        except Exception:  # mostly a log handler's; logging it might fail again
            traceback.print_exc()

    if not sys.is_finalizing():
        _start_thread(bounded, ())


def run_aside(work: Callable[[], object]) -> None:
    """The same, as far as there is a thread for it. Never fails."""
    with suppress(RuntimeError):
        run_in_thread(work)


watches = Watches(run_aside)

_turns = Turns(watches.look, run_in_thread, _sleep)


def watch() -> None:
    """See to it that this process has its watcher. Called for each new connection, since a process without one has
    nothing to watch."""
    if watches:
        _turns.start()
