"""deadline(): a bound on the time of a block."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import gevent
from gevent import monkey

from dbsession.core.config import positive_seconds
from dbsession.errors import ConfigError
from dbsession.green import ident
from dbsession.green.hub import TIMEOUT_MAX, here, start_timer

numbers = itertools.count()
"""The order in which deadlines began; each takes the next one, in one step of the interpreter."""


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


def require_gevent() -> None:
    """Raise ConfigError where no timer can end anything: nothing is patched, and the calling thread has no hub."""
    if here() is None and not monkey.is_module_patched("socket"):
        raise ConfigError(
            "A deadline was asked for where gevent does not run: the sockets are not patched and this thread has no "
            "hub, so nothing could end the work in time. Use gunicorn's gevent worker (worker_class = 'gevent'), call "
            "monkey.patch_all() first in a program of your own, or leave the deadline out."
        )


class HubTimer:
    """Calls `fired()` once, in the hub of the thread that made it, unless closed before."""

    __slots__ = ("_hub", "_timer")

    def __init__(self, seconds: float, fired: Callable[..., object], *arguments: object) -> None:
        self._hub: Any = gevent.get_hub()
        self._timer = start_timer(self._hub, min(seconds, TIMEOUT_MAX), fired, *arguments)

    def close(self) -> None:
        """Stop the timer. Never waits. From another thread it takes effect with the next pass of the hub's loop: a loop
        belongs to its thread."""
        if here() is self._hub:
            self._timer.close()
        else:
            call_in(self._hub, self._timer.close)


def call_in(hub: Any, function: Callable[[], object]) -> None:
    """Call `function` in `hub`, from another thread: with the next pass of its loop, unless that is destroyed."""
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
    interrupted. It is not swallowed at the end of the block. Deadlines nest. Do not wrap a `yield` in a generator that
    other code iterates: that code would be interrupted.

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
        self._timer: HubTimer | None = None

    def __enter__(self) -> None:
        if self._timer is not None:  # else the first block's timer would fire into whatever comes after it
            raise RuntimeError("This deadline is used already: call deadline() for each block.")
        exceeded = DeadlineExceeded(self._seconds, next(numbers))
        self._timer = HubTimer(self._seconds, ident.current().throw, exceeded)

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.close()
