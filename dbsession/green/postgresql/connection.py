"""A psycopg 3 connection that waits in gevent's loop, or in its thread, and gives up what nobody waits for.

psycopg decides at its import how all of its connections wait: imported before `monkey.patch_all()`, it stops the loop.
Ours wait here, whenever it was imported. What is sent and known is in `core.backends.psycopg`.
"""

from __future__ import annotations

import _socket
import os
import select
import socket
import threading
from collections.abc import Callable
from contextlib import closing, suppress
from time import monotonic
from typing import Any

import gevent
import psycopg
from gevent import monkey
from psycopg import errors
from psycopg.adapt import AdaptersMap
from psycopg.conninfo import conninfo_attempts, conninfo_to_dict, make_conninfo
from psycopg.waiting import Ready, Wait

from dbsession.core import fork
from dbsession.core.backends.postgresql_errors import not_connected
from dbsession.core.backends.psycopg import ACTIVE, Known
from dbsession.core.backends.psycopg_cursors import Named, RidesAlong, ours
from dbsession.core.connection_info import TooLate
from dbsession.core.fork import KNOWN
from dbsession.green import hub
from dbsession.green.timers import KeepsReader

_poll: Callable[[], Any] = monkey.get_original("select", "poll")

_POLLED = {Wait.R: select.POLLIN, Wait.W: select.POLLOUT, Wait.RW: select.POLLIN | select.POLLOUT}
_READY = {Wait.R: Ready.R, Wait.W: Ready.W}


class Cursor(RidesAlong, psycopg.Cursor[Any]):
    """A cursor that has all of its rows. Lives as long as they are read."""


class ServerCursor(Named, psycopg.ServerCursor[Any]):
    """A named cursor, whose rows are fetched piece by piece. Lives as long as its transaction, at most."""


class Connection(Known, KeepsReader, psycopg.Connection[Any]):
    """A `psycopg.Connection`. Lives as `Known` says."""

    _poll = _poll
    _cut = False  # nothing comes any more, and whoever waits closes the socket
    _cooperative = False  # it was opened where sockets are gevent's; without a hub yet nobody else has to run

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lock = threading.Lock()  # psycopg's own may have been made before a monkey patch
        self.cursor_factory = Cursor
        self.server_cursor_factory = ServerCursor
        self._cooperative = monkey.is_module_patched("socket")

    @classmethod
    def open_within(
        cls,
        seconds: float,
        conninfo: str = "",
        *,
        autocommit: bool = False,
        prepare_threshold: int | None = 5,
        context: Any = None,
        row_factory: Any = None,
        cursor_factory: Any = None,
        **arguments: Any,
    ) -> Connection:
        """Connect within so many seconds, all addresses of all hosts together; see psycopg's `connect()` for the
        arguments. Switches.

        Raises:
            psycopg.Error: the server cannot be reached, refuses, or does not answer in time.
        """
        until = monotonic() + seconds
        arguments.pop("connect_timeout", None)  # ours, by `seconds`
        failed: list[tuple[Any, Exception]] = []
        attempts = _attempts(conninfo_to_dict(conninfo, **arguments), seconds)
        for n, attempt in enumerate(attempts):
            left = until - monotonic()
            by = monotonic() + left / (len(attempts) - n)  # a silent address leaves their time to the others
            try:
                connection: Connection = drive(cls._connect_gen(make_conninfo("", **attempt)), by)
                break
            except TooLate:
                error: Exception = errors.ConnectionTimeout(
                    f"no connection within {seconds:g} s, the handshake included"
                )
                failed.append((attempt, error))
            except errors.Error as error:
                failed.append((attempt, error))
        else:
            raise not_connected(failed)
        try:
            connection.autocommit = autocommit
            connection.prepare_threshold = prepare_threshold
            if row_factory is not None:
                connection.row_factory = row_factory
            if cursor_factory is not None:
                connection.cursor_factory = ours(cursor_factory)
            if context is not None:
                connection._adapters = AdaptersMap(context.adapters)
        except BaseException:
            connection.close()
            raise
        return connection

    def wait(self, gen: Any, interval: float | None = None, timeout: float | None = None) -> Any:
        """Drive one of psycopg's generators, and wait where it would: for each piece of an answer as long as
        `read_timeout_s`, for the socket to take what is sent as long as `write_timeout_s`; where nothing was asked, as
        for a notification, `timeout` seconds in all, or for ever. Switches."""
        self.refuse_if_lost()
        until = None if timeout is None else monotonic() + timeout
        try:
            wanted = next(gen)
            self._waiting = True
            while True:
                wanted = gen.send(self._await(wanted, until))
        except StopIteration as end:
            self._heard = monotonic()
            return end.value
        except BaseException as error:
            self.interrupted(error)
            raise
        finally:
            self._waiting = False
            if self._cut:
                self.finish()

    def _await(self, wanted: Wait, until: float | None) -> Ready:
        if until is not None:
            seconds: float | None = until - monotonic()
        elif self.pgconn.transaction_status == ACTIVE:
            seconds = self.write_timeout_s if wanted & Wait.W else self.read_timeout_s
        else:
            seconds = None
        here: Any = hub.here() if self._cooperative else None
        try:
            if here is None:
                return _await_in_thread(self.pgconn.socket, wanted, seconds)
            if until is None and wanted == Wait.R:  # nearly always
                self._await_readable(here, self.pgconn.socket, seconds)
                return Ready.R
            with closing(here.loop.io(self.pgconn.socket, int(wanted))) as watcher:
                self._in_time(None if seconds is None else max(seconds, 0.001), here.wait, watcher)
                self._refuse_in_child()
        except TooLate:
            if until is not None:
                raise errors._WaitTimeout("wait timeout expired") from None
            raise errors.OperationalError(
                f"no answer from the server within {seconds:g} s: the connection is given up"
            ) from None
        if wanted is not Wait.RW:
            return _READY[wanted]
        return _await_in_thread(self.pgconn.socket, wanted, 0.0)

    def _refuse_in_child(self) -> None:
        """Leave the parent's socket alone, if this is a copy of who waits there: a connection just opened is not known
        to the hooks of a fork yet."""
        if not KNOWN[0]:
            fork.found_out()
        if self._epoch != fork.epoch:
            fork.cut(self)
            self.refuse_if_lost()

    def ping(self, idle_s: float, within_s: float) -> None:
        """Raise an error if the connection is gone. One that answered less than `idle_s` seconds ago is looked at only.
        Switches where it is asked, for `within_s` seconds at most."""
        if self.was_heard(idle_s):
            return
        self.pinging = True
        before = self.read_within_at_most(within_s)
        try:
            self.wait(self._ping_gen())
        finally:
            self.pinging = False
            self.read_within(before)

    def rollback(self) -> None:
        """Roll back, unless it is known that there is nothing to. Switches."""
        if not self.gave_up:  # else the server does, which has lost it
            super().rollback()

    def reset(self) -> None:
        """Take back what the session has set; see `Known`. Switches."""
        self.wait(self._reset_gen())

    def finish(self) -> None:
        """Close the socket, from any greenlet or thread. Whoever waits for an answer there finds its end, and closes:
        its number must not be another one's as long as somebody waits for it."""
        if not self._waiting:
            super().finish()
            return
        self._cut = True
        with suppress(OSError, errors.Error):
            mine = _socket.socket(fileno=os.dup(self.pgconn.socket))  # a gevent socket would want a hub
            try:
                mine.shutdown(socket.SHUT_RDWR)
            finally:
                mine.close()

    def close(self) -> None:
        super().close()
        if not self._waiting:
            self._close_timers()


def _attempts(arguments: dict[str, Any], seconds: float) -> list[Any]:
    """Return what to connect with, one address each, once their names are resolved, within so many seconds."""
    found: list[Any] = []
    if monkey.is_module_patched("socket"):
        gevent.get_hub()  # resolving makes one, but too late for the bound
    try:
        hub.call_within(seconds, lambda: found.extend(conninfo_attempts(arguments)))
    except hub.BoundExceeded:
        raise errors.ConnectionTimeout(f"the server's name was not resolved within {seconds:g} s") from None
    return found


def drive(gen: Any, until: float) -> Any:
    """Drive a generator of psycopg's that opens a connection or asks for a cancellation, until that time of the clock
    monotonic(). Switches. Raises TooLate."""
    epoch = fork.epoch
    with closing(gen):
        try:
            descriptor, wanted = next(gen)
            while True:
                seconds = until - monotonic()
                if seconds <= 0:
                    raise TooLate
                ready = await_once(descriptor, wanted, seconds)
                fork.look()
                if epoch != fork.epoch:  # a copy of who waits there, in a child: it must not read what is the parent's
                    raise errors.OperationalError("this process was forked while the connection was opened")
                descriptor, wanted = gen.send(ready)
        except StopIteration as end:
            return end.value


def await_once(descriptor: int, wanted: Wait, seconds: float) -> Ready:
    """Wait until a socket is ready for what is wanted; return for what. Switches. Raises TooLate."""
    here: Any = hub.here()
    if here is None or not hub.timers_run():
        return _await_in_thread(descriptor, wanted, seconds)
    with closing(here.loop.io(descriptor, int(wanted))) as watcher:
        waiter = hub.Waiter()
        watcher.start(waiter.wake)
        if not waiter.wait(seconds):
            raise TooLate
    return _READY.get(wanted) or _await_in_thread(descriptor, wanted, 0.0)


def _await_in_thread(descriptor: int, wanted: Wait, seconds: float | None) -> Ready:
    """Wait in this thread, whatever is patched. Raises TooLate."""
    look = _poll()
    look.register(descriptor, _POLLED[wanted])
    found = look.poll(None if seconds is None else max(seconds, 0.0) * 1000)
    if not found:
        raise TooLate
    events = found[0][1]
    if not events & (select.POLLIN | select.POLLOUT):
        return Ready.R if wanted == Wait.R else Ready.W  # an error, which libpq finds
    return Ready((bool(events & select.POLLIN) and Ready.R) | (bool(events & select.POLLOUT) and Ready.W))
