"""Where psycopg2 waits in C, in a program that is not patched: a thread of ours bounds its waits.

It shuts the socket of a connection from which nothing has come for too long, which wakes psycopg2 with an error. One
thread for the process, there as long as somebody waits; it looks as often as four times a second, so a bound is that
much longer.
"""

from __future__ import annotations

import _socket
import os
import struct
from collections.abc import Callable
from time import monotonic
from typing import Any

import psycopg2

from dbsession.core import fork
from dbsession.green import hub

LOOK_S = 0.25
_IDLE_S = 5.0
_SINCE_RECEIVED = struct.Struct("@52xI")  # tcpi_last_data_recv of <linux/tcp.h>, milliseconds

# connection -> (since when it is waited for, for how long). Written by whoever waits, one step each; taken out by the
# thread that shuts it, one step, too.
_waiting: dict[Any, tuple[float, float]] = {}
_watching = hub.allocate_lock()  # held by the thread; tried only


def call_watched(connection: Any, function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a method of psycopg2's does that waits in C; raise its error, or that nothing has come in time."""
    seconds = connection.read_timeout_s
    if seconds is None:
        return function(*arguments)
    _waiting[connection] = monotonic(), seconds
    if _watching.acquire(False):
        hub.run_in_thread(_watch)
    try:
        return function(*arguments)
    except psycopg2.Error as error:
        if connection in _waiting:
            raise
        connection.give_up(late := too_late(seconds))
        connection.close()
        raise late from error
    finally:
        _waiting.pop(connection, None)


def too_late(seconds: float | None) -> psycopg2.OperationalError:
    """Return the error of a connection that has waited for too long."""
    return psycopg2.OperationalError(f"no answer from the server within {seconds:g} s: the connection is given up")


def _watch() -> None:
    epoch, busy = fork.epoch, monotonic()
    try:
        while monotonic() - busy < _IDLE_S:
            hub.sleep_thread(LOOK_S)
            for connection, (since, seconds) in list(_waiting.items()):
                busy = now = monotonic()
                silent = now - since >= seconds and now - _received(connection) >= seconds
                if silent and _waiting.pop(connection, None) is not None:
                    connection.cut_off()
    finally:
        if epoch == fork.epoch:
            _watching.release()
    if _waiting and _watching.acquire(False):  # by somebody who came meanwhile
        hub.run_in_thread(_watch)


def _received(connection: Any) -> float:
    """Return when something has come last, by the clock monotonic(); 0.0 if the system does not tell."""
    try:
        mine = _socket.socket(fileno=os.dup(connection.fileno()))
    except (OSError, psycopg2.Error):
        return 0.0
    try:
        found = mine.getsockopt(_socket.IPPROTO_TCP, _socket.TCP_INFO, _SINCE_RECEIVED.size)
        return monotonic() - float(_SINCE_RECEIVED.unpack(found)[0]) / 1000
    except (OSError, AttributeError, struct.error):  # a Unix socket, or not Linux
        return 0.0
    finally:
        mine.close()


def _forget() -> None:
    global _watching
    _waiting.clear()
    _watching = hub.allocate_lock()


fork.in_child(_forget)
