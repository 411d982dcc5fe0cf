"""Timers and a watcher of gevent's loop that are kept for the next wait of a connection."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import gevent

from dbsession.core.connection_info import TooLate
from dbsession.green import hub

_TIMERS = 4  # lengths of time that are kept: a read's, a write's, a cleaning's, and one that a scope has set


class KeepsTimers:
    """Before a driver's class among the bases of our connections: bounds its waits. Lives as the connection does.

    Who may write: whoever sends or reads on the connection, one at a time.
    """

    # Class attributes, so that they are there while a driver's __init__ connects.
    _timers: dict[float, Any] | None = None  # {seconds: one of `_timer_loop`, to be started again}
    _timer_loop: Any = None

    def _in_time(self, seconds: float | None, operation: Callable[..., Any], *arguments: Any) -> Any:
        """Return what `operation(*arguments)`, which waits in this thread's hub, does. Raises TooLate after
        `seconds`."""
        here: Any = hub.here()
        if seconds is None or here is None:  # without a hub it cannot wait; a last COM_QUIT is sent all the same
            return operation(*arguments)
        timers = self._timers
        if timers is None or self._timer_loop is not here.loop:
            self._close_timers()
            timers = self._timers = {}
            self._timer_loop = here.loop
        timer = timers.pop(seconds, None)  # nobody else has it meanwhile
        if timer is None:
            if len(timers) > _TIMERS:
                self._close_timers()
                timers = self._timers = {}
            timer = here.loop.timer(seconds, seconds, priority=-1)  # as hub.start_timer() has it
        try:
            # In here, as a signal's handler may raise: it repeats until somebody stops it.
            # again(): started once more, a stopped timer would run for what was left of its time
            timer.again(gevent.getcurrent().throw, TooLate, update=True)
            return operation(*arguments)
        finally:
            timer.stop()
            if timers is self._timers and seconds not in timers:
                timers[seconds] = timer
            else:  # the connection was closed meanwhile
                timer.close()

    def _close_timers(self) -> None:
        timers, self._timers = self._timers, None
        if timers:
            for timer in timers.values():
                with suppress(ValueError):  # its loop was destroyed, with its thread
                    timer.close()


class KeepsReader(KeepsTimers):
    """And waits for a bare descriptor, as that of libpq is. Lives as the connection does, whose user alone writes."""

    _reader: Any = None  # a watcher of `_reader_loop`
    _reader_loop: Any = None

    def _await_readable(self, here: Any, descriptor: int, seconds: float | None) -> None:
        """Wait in `here`, this thread's hub, for something to read from the connection's descriptor. Raises TooLate."""
        if self._reader_loop is not here.loop:
            self._close_reader()
            self._reader = here.loop.io(descriptor, 1)
            self._reader_loop = here.loop
        self._in_time(seconds, here.wait, self._reader)

    def _close_reader(self) -> None:
        reader, self._reader, self._reader_loop = self._reader, None, None
        if reader is not None:
            with suppress(ValueError):  # its loop was destroyed, with its thread
                reader.close()

    def _close_timers(self) -> None:
        super()._close_timers()
        self._close_reader()
