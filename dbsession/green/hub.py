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
import greenlet
from gevent import monkey

# Private, and the only way to ask for the hub without making one: `gevent.get_hub()` would give every plain thread an
# event loop that nobody closes. tests/unit/test_private_names.py fails loudly when the name goes.
from gevent._hub_local import get_hub_if_exists

from dbsession.core import fork

_start_thread: Callable[[Callable[..., object], tuple[Any, ...]], int] = monkey.get_original(
    "_thread", "start_new_thread"
)
allocate_lock: Callable[[], Any] = monkey.get_original("_thread", "allocate_lock")
"""The interpreter's own lock, whatever is patched. Never hold one over a switch."""

TIMEOUT_MAX = 1e6
"""Seconds that count as for ever; below what both kinds of timer take."""

sleep_thread: Callable[[float], None] = monkey.get_original("time", "sleep")
"""Stops the whole thread, whatever is patched: for threads of ours."""


here: Callable[[], gevent.hub.Hub | None] = get_hub_if_exists
"""The calling thread's hub, or None when it has none (yet)."""


def lasts() -> bool:
    """Whether the calling thread's hub runs as long as the process: a greenlet spawned here gets its turn. That of a
    thread pool's job does not, nor one in a program whose sockets block."""
    hub = here()
    return hub is not None and hub.main_hub and timers_run()


def timers_run() -> bool:
    """Whether gevent's timers run while the calling greenlet waits for a socket."""
    return here() is not None and monkey.is_module_patched("socket")


def sleep(seconds: float) -> None:
    """Sleep without stopping the hub, where there is one. Switches greenlets there."""
    if here() is None:
        sleep_thread(seconds)
    else:
        gevent.sleep(seconds)


def start_timer(hub: Any, seconds: float, function: Callable[..., object], *arguments: object) -> Any:
    """A timer of `hub`, running; the caller closes it. As gevent.Timeout's own: its time begins now and not when the
    loop last waited, which CPU work may have made long ago (update); and what has come by its end is handled first
    (priority), so that a hub that stood still takes no answer for a missing one."""
    timer = hub.loop.timer(seconds, priority=-1)
    timer.start(function, *arguments, update=True)
    return timer


def watch_forks() -> None:
    """Have the calling thread's hub look for a fork as its loop goes on in a child: before it wakes a greenlet of the
    parent's that waits for a socket which both have. It keeps no loop running."""
    hub: Any = here()
    if hub is not None and getattr(hub, "_dbsession_fork_watcher", None) is None:
        hub._dbsession_fork_watcher = watcher = hub.loop.fork(ref=False)
        watcher.start(fork.look)


def _take_over() -> None:
    """Give, in a forked child, the calling thread's hub, which was the parent's, a loop and helper threads of its own.
    gevent's own os.fork() does so; a second time changes nothing."""
    if here() is not None:
        gevent.reinit()


fork.in_child(_take_over)


class Waiter:
    """Parks its maker until somebody calls `wake()`, or its time is over. Lives for one wait.

    `wake()` may come from any greenlet or thread, before or after `wait()` began, once or more often. There is one
    maker, so nothing here is shared but what wakes it: a callback of its hub's loop, or a native lock.
    """

    __slots__ = ("_lock", "_parked", "hub")

    def __init__(self) -> None:
        self.hub: Any = here()
        if self.hub is None:
            self._lock = allocate_lock()
            self._lock.acquire()
        else:
            self._parked: Any = gevent.hub.Waiter(self.hub)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until woken; return True then, False after `timeout_s` seconds (None: never). Switches greenlets where
        the thread has a hub, blocks the thread where it has none."""
        if self.hub is None:
            return bool(self._lock.acquire(timeout=-1 if timeout_s is None else min(timeout_s, TIMEOUT_MAX)))
        # A timer in any case: a loop with nothing to wait for ends, though another thread may still wake us.
        timer = start_timer(self.hub, TIMEOUT_MAX if timeout_s is None else timeout_s, self._parked.switch, False)
        try:
            return bool(self._parked.get())
        finally:
            timer.close()

    def wake(self) -> None:
        if self.hub is None:
            try:
                self._lock.release()
            except RuntimeError:  # woken already
                pass
            return
        loop = self.hub.loop
        if loop is None:
            return  # destroyed with its thread, and so is who waited there
        try:
            if here() is self.hub:
                loop.run_callback(self._parked.switch, True)
            else:
                loop.run_callback_threadsafe(self._parked.switch, True)
        except ValueError:  # destroyed just now
            pass


class Mutex:
    """A lock for the greenlets of several hubs, and for threads. Lives as long as what it guards.

    gevent's own, which a patched `threading.Lock` is, wakes from one hub only: a greenlet of another hub that waits in
    the same queue is put back, and waits until somebody takes and releases the lock again, which may be never.

        _free     [True], or empty while somebody has it: taken and put back in one step
        _waiting  everybody who waits: each joins before the last look at `_free`, so that no release is missed

    A release wakes all of them, and one is the quickest: none of them has to live on for the others to be served.
    """

    __slots__ = ("_free", "_waiting")

    def __init__(self) -> None:
        self._free = [True]
        self._waiting: list[Waiter] = []

    def _taken(self) -> bool:
        try:
            return self._free.pop()
        except IndexError:
            return False

    def __enter__(self) -> None:
        while not self._taken():
            waiter = Waiter()
            self._waiting.append(waiter)
            try:
                if self._taken():
                    return
                waiter.wait()
            finally:
                self._waiting.remove(waiter)

    def __exit__(self, *_: object) -> None:
        self._free.append(True)
        for waiter in list(self._waiting):
            waiter.wake()


class BoundExceeded(BaseException):
    """The time of a `call_within()` is over."""


def call_within(seconds: float, work: Callable[[], object]) -> None:
    """Call `work`, and throw BoundExceeded into it when it takes longer than `seconds`; where gevent's timers do not
    run, it takes as long as it takes. What gevent.Timeout does, at a sixth of its cost, since each close of a session
    in a transaction has one: the timer is kept for the next call in this hub with as many seconds."""
    hub: Any = here()
    if hub is None or not monkey.is_module_patched("socket"):  # timers_run(), of this hub
        work()
        return
    kept, hub._dbsession_timer = getattr(hub, "_dbsession_timer", None), None  # nobody else has it meanwhile
    if kept is None or kept[0] != seconds:
        if kept is not None:
            kept[1].close()
        kept = seconds, hub.loop.timer(0.0, max(seconds, 0.001), priority=-1)  # as start_timer() has it
    timer = kept[1]
    try:
        # again(): started once more, a stopped timer would run for what was left of its time
        timer.again(_exceed, timer, greenlet.getcurrent(), update=True)
        work()
    finally:
        timer.stop()
        if hub._dbsession_timer is None:
            hub._dbsession_timer = kept
        else:  # another greenlet's call has ended meanwhile
            timer.close()


def _exceed(timer: Any, caller: Any) -> None:
    timer.stop()  # it would repeat
    caller.throw(BoundExceeded)


def run_aside(work: Callable[[], object], owner_hub: gevent.hub.Hub | None = None) -> None:
    """Run `work` soon, not here: in a greenlet of `owner_hub` (the hub whose sockets it will use) or else of this
    thread's hub, or in a thread of ours where no hub is alive. Never waits, so it may be called by the Hub and by
    destructors."""
    if sys.is_finalizing():
        return  # there is no soon any more
    hub = here()
    if owner_hub is not None and owner_hub is not hub and not owner_hub.dead:
        owner_hub.loop.run_callback_threadsafe(gevent.spawn, work)
    elif hub is not None and not hub.dead:
        gevent.spawn(work)
    else:
        run_in_thread(work)


def run_in_thread(work: Callable[[], object]) -> None:
    """Run `work` in a native thread of its own, whatever is patched. Dropped when the interpreter is shutting down."""
    if not sys.is_finalizing():
        _start_thread(work, ())
