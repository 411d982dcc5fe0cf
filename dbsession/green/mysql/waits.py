"""How a connection waits for its socket: with one timer of gevent's loop, or by the socket's own timeout.

Who may write: whoever sends or reads on the connection, one at a time; `_left_open` is whoever closes it meanwhile.
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import gevent.socket
import pymysql.connections
from gevent import monkey

from dbsession.core.connection_info import HUNG_UP
from dbsession.green.timers import KeepsTimers

_poll: Callable[[], Any] = monkey.get_original("select", "poll")  # which, with 0, never waits

# Their stubs leave the private names out.
_Connection: Any = pymysql.connections.Connection


class Waits(KeepsTimers, _Connection):  # type: ignore[misc]  # of Any
    """The socket of one connection. Lives as it does."""

    # PyMySQL's own, whose first values say too little of their types.
    _read_timeout: Any
    _write_timeout: Any
    _current_timeout: Any
    _sock: Any
    _rfile: Any

    # Class attributes, so that they are there while PyMySQL's __init__ connects.
    _connect_by: float | None = None
    _cooperative = False  # its socket is gevent's, and its timeouts are kept here
    _encrypted = False
    _look: Any = None  # a poll object that knows the socket
    _asked = False  # everything was sent, and no piece of the answer has come yet
    _reading = False  # somebody waits for what comes from the socket
    _left_open: tuple[Any, ...] = ()  # its file and socket, closed by another one than whoever waits for it

    def _take_over_timeouts(self) -> None:
        """Bound the waits of the connected socket ourselves. A gevent socket's own timeout makes a gevent.Timeout for
        each wait; a timer of the loop that is kept for the next wait does the same for a tenth of that."""
        self._cooperative = isinstance(self._sock, gevent.socket.socket)
        self._encrypted = hasattr(self._sock, "pending")
        self._look = None
        self._sock.settimeout(None if self._cooperative else self._read_timeout)
        self._current_timeout = self._read_timeout

    def _happened(self) -> int:
        """What poll() knows of the socket, of POLLIN and HUNG_UP: 0 if nothing has come and it is open. Never waits."""
        look = self._look
        if look is None:
            look = self._look = _poll()
            look.register(self._sock.fileno(), select.POLLIN | HUNG_UP)
        found = look.poll(0)
        return found[0][1] if found else 0

    def _send_cooperatively(self, data: Any) -> None:
        if not self._encrypted:  # gevent's TLS socket takes no timeout of one call
            try:
                sent = self._sock.send(data, 0, 0.0)
            except BlockingIOError:
                sent = 0
            if sent == len(data):
                return  # without a timer, as nearly always
            data = memoryview(data)[sent:]
        self._in_time(self._write_timeout, self._send, data)

    def _send(self, data: Any) -> None:
        # Nearly always all of it at once; gevent's sendall() takes twice the time for that.
        sent = self._sock.send(data)
        if sent < len(data):
            self._sock.sendall(memoryview(data)[sent:])

    def _read_piece(self, size: int) -> bytes:
        """Return what has come, at most `size` bytes; wait until something has."""
        read: Callable[[int], bytes] = self._rfile.read1
        first, self._asked = self._asked, False
        self._reading = True
        try:
            if self._cooperative:
                piece: bytes = self._in_time(self._read_timeout, self._await_first if first else read, size)
                return piece
            if self._connect_by:
                # The handshake's time is counted as a whole, however small the pieces are in which it comes.
                self._current_timeout = None
                self._sock.settimeout(self._seconds_left())
            return read(size)
        finally:
            self._reading = False
            if self._left_open:
                self._close_what_was_left_open()

    def _await_first(self, size: int) -> bytes:
        # The first piece of an answer, which takes longer than we do: a look that fails, and its exception, would come
        # before the wait.
        read, sock = self._rfile.read1, self._sock  # before others run, who may close it
        if not (self._encrypted and sock.pending()):
            sock._wait(sock._read_event)  # private names of gevent's, see tests/unit/test_private_names.py
        piece: bytes = read(size)
        return piece

    def _close_what_was_left_open(self) -> None:
        files, self._left_open = self._left_open, ()
        for each in files:
            with suppress(OSError):
                each.close()

    def _seconds_left(self) -> float:
        left = (self._connect_by or 0.0) - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"timed out: no connection within {self.connect_timeout} s, the handshake included")
        return left
