"""deadline(): a bound on the time of a block; and the timer that bounds the time of a request."""

from __future__ import annotations

import errno
import itertools
import math
import weakref
from collections.abc import Callable
from typing import Any

import gevent
from gevent import monkey

from dbsession.core.config import positive_seconds
from dbsession.errors import ConfigError
from dbsession.green import ident
from dbsession.green.hub import TIMEOUT_MAX, here, start_timer

_numbers = itertools.count()  # the order in which deadlines began; one step of the interpreter each


class DeadlineExceeded(gevent.Timeout):
    """The time of a `deadline()` block, or of a request, is over. As a gevent.Timeout it is no `Exception`, so that
    code which handles its own errors lets it pass. `seconds` is how long the block had."""

    code = "DBS-DEADLINE"
    seconds: float

    def __init__(self, seconds: float, number: float = math.inf) -> None:
        super().__init__()  # without seconds, so that it starts no timer of its own
        self.seconds = seconds
        self.number = number

    def __str__(self) -> str:
        return f"This was not over within its deadline of {self.seconds:g} s and was ended here. [{self.code}]"


class ConnectionCut(ConnectionResetError):
    """Tells a WSGI server, in the words it knows from a client that went away, to drop the connection."""

    def __init__(self, seconds: float) -> None:
        text = f"The request was not over within its deadline of {seconds:g} s [{DeadlineExceeded.code}]"
        super().__init__(errno.ECONNRESET, text)


def require_gevent() -> None:
    """Raise ConfigError where no timer can end anything: nothing is patched, and the calling thread has no hub."""
    if here() is None and not monkey.is_module_patched("socket"):
        raise ConfigError(
            "A deadline was asked for where gevent does not run: the sockets are not patched and this thread has no "
            "hub, so nothing could end the work in time. Use gunicorn's gevent worker (worker_class = 'gevent'), call "
            "monkey.patch_all() first in a program of your own, or leave the deadline out."
        )


class _Timer:
    """Calls `fired()` once, in the hub of the thread that made it, unless closed before."""

    __slots__ = ("_hub", "_timer")

    def __init__(self, seconds: float, fired: Callable[..., object], *arguments: object) -> None:
        self._hub: Any = gevent.get_hub()
        self._timer = start_timer(self._hub, min(seconds, TIMEOUT_MAX), fired, *arguments)

    def close(self) -> None:
        """Never waits. From another thread it takes effect with the next pass of the hub's loop: a loop belongs to
        its thread."""
        if here() is self._hub:
            self._timer.close()
        else:
            _call_in(self._hub, self._timer.close)


def _call_in(hub: Any, function: Callable[[], object]) -> None:
    loop = hub.loop
    try:
        if loop is not None:  # else destroyed with its thread
            loop.run_callback_threadsafe(function)
    except ValueError:  # destroyed just now
        pass


def deadline(seconds: float) -> Deadline:
    """A context manager: a block that runs longer than `seconds` is ended by DeadlineExceeded.

        with dbsession.deadline(2):
            rows = session.execute(report).all()

    It is thrown into the greenlet that runs the block, while that waits; code that computes and never waits is not
    interrupted. It is not swallowed at the end of the block. Deadlines nest. Not for round the `yield` of a generator
    that others iterate: they would be hit.

    Args:
        seconds: above 0.

    Raises:
        ConfigError: [DBS-CONFIG] not such a number; or gevent does not run here.
    """
    seconds = positive_seconds(seconds, "The deadline")
    require_gevent()
    return Deadline(seconds)


class Deadline:
    """What `deadline()` returns. Lives for one `with` block."""

    __slots__ = ("_seconds", "_timer")

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._timer: _Timer | None = None

    def __enter__(self) -> None:
        if self._timer is not None:  # else the first block's timer would fire into whatever comes after it
            raise RuntimeError("This deadline is used already: call deadline() for each block.")
        exceeded = DeadlineExceeded(self._seconds, next(_numbers))
        self._timer = _Timer(self._seconds, ident.current().throw, exceeded)

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.close()


class RequestTimer:
    """The deadline of one request. Lives until its scope ends, which closes it; it then throws nothing any more.

    Inside `with timer:` code of the application runs, and what is thrown there is DeadlineExceeded. Outside, once
    something was handed to the server, the same greenlet runs the server's code, which sends it: there a
    ConnectionCut is thrown. Where nobody can be thrown at, `late` says that the time is over.

    Written by whoever runs the request, and by the hub of the timer while that one waits or, where a body is read on
    in another thread, between two of its steps: each attribute by one assignment, and read anew in the throwing
    thread.
    """

    __slots__ = (
        "__weakref__",
        "_application",
        "_closed",
        "_target",
        "_target_hub",
        "_timer",
        "late",
        "number",
        "seconds",
    )

    def __init__(self, seconds: float) -> None:
        require_gevent()
        self.seconds = seconds
        self.number = next(_numbers)
        self.late = False
        self._closed = False
        self._application = False
        # Weak: a timer keeps no greenlet alive that has died with its request open.
        self._target: weakref.ref[Any] | None = None
        self._target_hub: Any = None
        self._timer = _Timer(seconds, self._fired)

    def __enter__(self) -> None:
        self._target_hub = here()
        self._target = weakref.ref(ident.current())
        self._application = True

    def __exit__(self, *_: object) -> None:
        self._application = False

    def hold(self) -> None:
        """Throw nothing until the next `with timer:`: neither the application runs, nor is anything being sent."""
        self._target = None

    def check(self) -> None:
        """Raise DeadlineExceeded if the time was over while the application could not be told."""
        if self.late:
            self.late = False
            raise DeadlineExceeded(self.seconds, self.number)

    def covers(self, exceeded: DeadlineExceeded) -> bool:
        """Whether `exceeded` began with this request or inside it. An older one belongs to somebody outside, such as
        the request that called this one in-process."""
        return exceeded.number >= self.number

    def close(self) -> None:
        """Never waits; from any greenlet or thread. Idempotent."""
        self._closed = True
        self._target = None
        self._timer.close()

    def _fired(self) -> None:
        if not self._closed:
            self.late = True
            self._throw()

    def _throw(self) -> None:
        """In the Hub."""
        reference, hub = self._target, self._target_hub
        target = reference() if reference is not None else None
        if self._closed or not self.late or target is None or target.dead or hub is None:
            return
        if hub is not here():
            _call_in(hub, self._throw)  # a greenlet takes throws from its own thread only
        elif self._application:
            self.late = False
            target.throw(DeadlineExceeded(self.seconds, self.number))
        else:
            target.throw(ConnectionCut(self.seconds))
