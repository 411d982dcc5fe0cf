"""What differs between a thread that runs a gevent hub and one that does not: waiting, sleeping, and putting
work aside into a greenlet or thread of ours.

Nothing here depends on whether `monkey.patch_all()` has run, or on when: the question is always asked at the call,
and the thread functions are the interpreter's own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import gevent
import gevent.hub
from gevent import monkey

# Private, and the only way to ask for the hub without making one: `gevent.get_hub()` would give every plain thread an
# event loop that nobody closes. tests/unit/test_hub.py fails loudly when the name goes.
from gevent._hub_local import get_hub_if_exists

_start_thread: Callable[[Callable[..., object], tuple[Any, ...]], int] = monkey.get_original(
    "_thread", "start_new_thread"
)
_allocate_lock = monkey.get_original("_thread", "allocate_lock")
_sleep_thread = monkey.get_original("time", "sleep")


def here() -> gevent.hub.Hub | None:
    """The calling thread's hub, or None when it has none (yet)."""
    hub: gevent.hub.Hub | None = get_hub_if_exists()
    return hub


def sleep(seconds: float) -> None:
    """Sleep without stopping the hub, where there is one. Switches greenlets there."""
    if here() is None:
        _sleep_thread(seconds)
    else:
        gevent.sleep(seconds)


class Waiter:
    """Parks its maker until somebody calls `wake()`. Lives for one wait.

    `wake()` may come from any greenlet or thread, before or after `wait()` began, once or more often. There is one
    maker, so nothing here is shared but the handle that wakes it, and both kinds of handle are safe across threads:
    a loop's async watcher (libev, `ev_async_send`) and a native lock.
    """

    __slots__ = ("_hub_waiter", "_lock", "_watcher")

    def __init__(self) -> None:
        hub = here()
        self._hub_waiter: Any = None
        if hub is None:
            self._lock = _allocate_lock()
            self._lock.acquire()
        else:
            # Started now and not in wait(): a watcher that is not active forgets what was sent to it.
            self._hub_waiter = gevent.hub.Waiter(hub)
            self._watcher = hub.loop.async_()
            self._watcher.start(self._hub_waiter.switch, None)

    def wait(self) -> None:
        """Return once woken. Switches greenlets where the thread has a hub, blocks the thread where it has none."""
        if self._hub_waiter is None:
            self._lock.acquire()
            return
        try:
            self._hub_waiter.get()
        finally:
            self._watcher.stop()  # not close(): a late wake() from another thread may still hold it

    def wake(self) -> None:
        if self._hub_waiter is not None:
            try:
                self._watcher.send()
            except ValueError:  # its loop has been destroyed: the wait is over in any case
                pass
        elif self._lock.locked():
            try:
                self._lock.release()
            except RuntimeError:  # somebody woke it between the two calls
                pass


def run_aside(work: Callable[[], object], home: gevent.hub.Hub | None = None) -> None:
    """Run `work` soon, not here: in a greenlet of `home` (the hub whose sockets it will use) or else of this thread's
    hub, or in a thread of ours where no hub is alive. Never waits, so it may be called by the Hub and by destructors.
    """
    hub = here()
    if home is not None and home is not hub and not home.dead:
        home.loop.run_callback_threadsafe(gevent.spawn, work)
    elif hub is not None and not hub.dead:
        gevent.spawn(work)
    else:
        run_in_thread(work)


def run_in_thread(work: Callable[[], object]) -> None:
    """Run `work` in a native thread of its own, whatever is patched. Dropped when the interpreter is shutting down."""
    if not sys.is_finalizing():
        _start_thread(work, ())
