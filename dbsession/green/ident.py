"""Which greenlet asks, and who tells us that it has ended.

The ident is the greenlet object itself (a plain thread has a root greenlet too). Integers are no idents:
`get_ident()` and `id()` are given to the next greenlet at once. What belongs to an ident hangs on the greenlet as an
attribute, so it dies with it and nothing of ours keeps a dead greenlet alive.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import gevent
import greenlet
from gevent import monkey
from gevent.hub import MAIN_THREAD_IDENT, Hub  # type: ignore[attr-defined]  # tests/unit/test_private_names.py

from dbsession.errors import ConfigError, ScopeRequired, UsedInHub, plain


def refuse_eventlet() -> None:
    """Raise ConfigError where eventlet has patched the process: its hub does not run what waits in gevent's."""
    patcher = sys.modules.get("eventlet.patcher")
    if patcher is not None and any(map(patcher.is_monkey_patched, ("socket", "select", "thread"))):
        raise ConfigError(
            "This process is patched by eventlet, which dbsession does not support: a greenlet that waited for a "
            "connection would stop all the others. Use gevent (gunicorn's worker_class = 'gevent', or gevent's "
            "monkey.patch_all() in place of eventlet's), threads, or dbsession.aio with asyncio."
        )


refuse_eventlet()  # before gevent is asked for what eventlet has taken away

# Raises RuntimeError once the interpreter tears greenlets down (greenlet 3.5.1): destructors guard against it.
current: Callable[[], Any] = greenlet.getcurrent

thread: Callable[[], int] = monkey.get_original("_thread", "get_ident")
"""The number of the native thread, whatever is patched."""

# The interpreter's own thread-local, patched or not: what it holds is dropped by the thread that ends, while it ends.
_this_thread: Any = monkey.get_original("_thread", "_local")()

# Weak references to the idents that nobody tells us the end of. Written by any thread, one set operation at a time,
# each of which is one step of the interpreter; read only through a copy.
_unlinked: set[weakref.ref[greenlet.greenlet]] = set()


def in_hub() -> bool:
    """Whether the caller is a gevent Hub, which must never wait."""
    return isinstance(current(), Hub)


def refuse_hub() -> None:
    """Raise UsedInHub when the caller is the Hub."""
    if in_hub():
        raise UsedInHub(
            "A session was asked for in the gevent Hub itself, in a callback of its loop, where waiting for a "
            "database would stop every greenlet. Do the work in a greenlet: gevent.spawn(function)."
        )


def refuse_pool_job() -> None:
    """Raise ScopeRequired in a job of `gevent.threadpool`: its thread lives on, and nothing says that a job ended.

    The worker class is private to gevent; its module's name is all we ask (tests/unit/test_private_names.py holds it).
    """
    if type(current()).__module__ == "gevent.threadpool":
        raise ScopeRequired(
            "A job of gevent.threadpool used a session outside any scope. The thread outlives the job, so nothing "
            "would close it: do the work inside `with dbsession.session_scope():`."
        )


class _ThreadEnd:
    """Tells that a thread has ended: its own local storage holds it, and drops it then. Lives as long as the thread."""

    def __init__(self, ended: Callable[[], None]) -> None:
        self._ended = ended

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self._ended()


def on_end(ident: Any, ended: Callable[[Any], None], thread_ended: Callable[[], None]) -> None:
    """Call `ended` or `thread_ended` once, soon after `ident` has ended, in a place that must not wait.

    A gevent greenlet says so by its link, in the Hub, and is the argument of `ended`; the root greenlet of a thread by
    the thread's own storage, in that thread as it dies (nothing more can run there). A raw greenlet says nothing: the
    destructor of what hangs on it acts when its last reference goes, and `dead_idents()` finds the others.
    """
    if isinstance(ident, gevent.Greenlet):
        ident.rawlink(ended)
    elif ident.parent is None:
        _this_thread.end = _ThreadEnd(thread_ended)
    else:
        _unlinked.add(weakref.ref(ident, _unlinked.discard))


def has_failed(greenlet: Any) -> bool:
    """Whether a greenlet that has ended was ended by an exception or a kill; of a thread nobody knows."""
    return greenlet.exception is not None or isinstance(greenlet.value, gevent.GreenletExit)


def dead_idents() -> list[Any]:
    """The raw greenlets that have ended and are still referenced by somebody. Each is returned once."""
    dead = []
    for reference in list(_unlinked):  # not tuple(): making one may start a collection, which changes the set
        ident = reference()
        if ident is not None and ident.dead:
            _unlinked.discard(reference)
            dead.append(ident)
    return dead


def name_of(greenlet: Any, thread_number: int) -> str:
    """What people call this ident: its function and its name, or the name of its thread, whose native number is
    `thread_number`; printable. None is one that has gone."""
    if greenlet is None:
        return "a greenlet that is gone"
    if isinstance(greenlet, gevent.Greenlet):
        run = getattr(greenlet, "_run", None)  # gone once it has ended; a subclass may override it
        owner = getattr(run, "__self__", None)
        if isinstance(owner, threading.Thread):  # a patched one, all of which begin in the same function
            return plain(f"thread {owner.name}")
        function = getattr(run, "__qualname__", None) or getattr(getattr(run, "func", None), "__qualname__", None)
        if function == "Greenlet._run":  # it has ended
            return plain(greenlet.name)
        return plain(f"{function} in {greenlet.name}" if function else greenlet.name)
    if greenlet.parent is not None:
        return f"a {type(greenlet).__name__} at {id(greenlet):#x}"
    if monkey.is_module_patched("threading"):  # its threads are greenlets, and its lock may wait
        return "the main thread" if thread_number == MAIN_THREAD_IDENT else "a thread"
    for known in threading.enumerate():
        if known.ident == thread_number:
            return plain(f"thread {known.name}")
    return "a thread"
