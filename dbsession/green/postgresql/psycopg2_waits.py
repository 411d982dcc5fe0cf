"""How psycopg2 waits in a process whose sockets are gevent's, and how a connection of ours does.

psycopg2 has one wait callback for a whole process. Ours waits for our connections, within their bounds, and leaves the
others to the callback that was there before, psycogreen's mostly. It is set as an engine connects, whenever psycopg2
was imported; in a process that is not patched it is not set, psycopg2 blocks the thread that calls it, and
`psycopg2_watch` bounds that.
"""

from __future__ import annotations

import _socket
import ipaddress
import math
import os
import select
import socket
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from time import monotonic
from typing import Any

import gevent
import psycopg2
from gevent import monkey
from psycopg2 import extensions
from psycopg2.extensions import POLL_OK, POLL_READ, POLL_WRITE

from dbsession.core import fork
from dbsession.core.connection_info import HUNG_UP, TooLate
from dbsession.core.fork import KNOWN
from dbsession.green import hub
from dbsession.green.postgresql.psycopg2_watch import too_late
from dbsession.green.timers import KeepsReader

_poll: Callable[[], Any] = monkey.get_original("select", "poll")

_POLLED = {POLL_READ: select.POLLIN, POLL_WRITE: select.POLLOUT}
_READ, _WRITE = 1, 2  # of gevent's loop

# Whose connections are not ours. Written by `take_part`, one step.
_before: list[Callable[[Any], object] | None] = [None]


def take_part() -> bool:
    """Have our connections wait by our callback, wherever psycopg2 is to wait by one at all; return whether it is."""
    current = extensions.get_wait_callback()
    if current is not _wait:
        if current is None and not monkey.is_module_patched("socket"):
            return False
        _before[0] = current
        extensions.set_wait_callback(_wait)
    return True


def _wait(connection: Any) -> None:
    if not isinstance(connection, Waits):
        _wait_for_another(connection)
        return
    connection.waiting = True
    try:
        poll = connection.poll
        while (wanted := poll()) != POLL_OK:
            connection.await_socket(wanted)
            if not KNOWN[0]:
                fork.found_out()
            if connection._epoch != fork.epoch:  # a copy of who waits there, in a child; the socket is the parent's
                fork.cut(connection)
                raise psycopg2.OperationalError("this process was forked: the connection is the parent's")
        connection.heard = monotonic()
    except BaseException as error:
        connection.interrupted(error)
        raise
    finally:
        connection.waiting = False


def _wait_for_another(connection: Any) -> None:
    if (before := _before[0]) is not None:
        before(connection)
    else:  # as it would without us
        while (wanted := connection.poll()) != POLL_OK:
            await_in_thread(connection.fileno(), wanted, None)


waits_by: Callable[[Any], None] = _wait
"""The callback that is set as psycopg2's."""


def await_in_thread(descriptor: int, wanted: int, seconds: float | None) -> None:
    """Wait in this thread, whatever is patched. Raises TooLate."""
    look = _poll()
    look.register(descriptor, _POLLED[wanted])
    if not look.poll(None if seconds is None else max(seconds, 0.0) * 1000):
        raise TooLate


class Waits(KeepsReader, extensions.connection):
    """The socket of one connection. Lives as it does."""

    # Class attributes, so that they are there while psycopg2's __init__ connects.
    read_timeout_s: float | None = None
    write_timeout_s: float | None = None
    _epoch: int
    waiting = False
    """Somebody waits for its answer, with psycopg2's lock, for which another greenlet would stop the thread."""
    _connect_by: float | None = None
    heard = 0.0
    """When the last answer came, by the clock monotonic()."""
    _look: Any = None  # a poll object that knows the socket

    def interrupted(self, error: BaseException) -> None:
        """Take note that `error` has come in the middle of an answer; psycopg2 closes the connection after it."""
        raise NotImplementedError

    def await_socket(self, wanted: int) -> None:
        """Wait until the socket is ready for what psycopg2 wants to do: to read a piece of an answer as long as
        `read_timeout_s`, to send as long as `write_timeout_s`, while it connects until `_connect_by`. Switches."""
        seconds = self.read_timeout_s if wanted == POLL_READ else self.write_timeout_s
        here: Any = hub.here()
        try:
            if here is not None and wanted == POLL_READ and self._connect_by is None:  # nearly always
                self._await_readable(here, self.fileno(), seconds)
                return
            if self._connect_by is not None:
                seconds = max(self._connect_by - monotonic(), 0.001)
            if here is None:  # without a hub yet nobody else has to run
                await_in_thread(self.fileno(), wanted, seconds)
                return
            with closing(here.loop.io(self.fileno(), _READ if wanted == POLL_READ else _WRITE)) as watcher:
                self._in_time(seconds, here.wait, watcher)
        except TooLate:
            if self._connect_by is not None:
                raise
            raise too_late(seconds) from None

    def happened(self) -> int:
        """What poll() knows of the socket, of POLLIN and HUNG_UP: 0 if nothing has come and it is open. Never waits."""
        look = self._look
        if look is None:
            look = self._look = _poll()
            look.register(self.fileno(), select.POLLIN | HUNG_UP)
        found = look.poll(0)
        return int(found[0][1]) if found else 0

    def cut_off(self) -> None:
        """Have whoever waits for an answer find the connection closed, from any greenlet or thread."""
        with suppress(OSError, psycopg2.Error):
            mine = _socket.socket(fileno=os.dup(self.fileno()))  # its own type: a gevent socket would want a hub
            try:
                mine.shutdown(socket.SHUT_RDWR)
            finally:
                mine.close()


def open_within(factory: Callable[[str, float], Any], seconds: float, arguments: dict[str, Any]) -> Any:
    """Open a connection from arguments of psycopg2's connect(), within `seconds`, all addresses of all hosts together.
    `factory` is given a DSN, and until when it has to be there by the clock monotonic(). Switches.

    Raises:
        psycopg2.Error: the server cannot be reached, refuses, or does not answer in time.
    """
    blocks = not take_part()
    until = monotonic() + seconds
    dsn = extensions.make_dsn(arguments.pop("dsn", None), **arguments)
    try:
        attempts = list(_attempts(extensions.parse_dsn(dsn), until))
    except socket.gaierror as error:
        raise psycopg2.OperationalError(f"the server's name cannot be resolved: {error}") from error
    failed: list[tuple[str, Exception]] = []
    for n, attempt in enumerate(attempts):
        left = until - monotonic()
        by = monotonic() + max(left, 0.0) / (len(attempts) - n)  # a silent address leaves their time to the others
        bound = {"connect_timeout": max(2, math.ceil(by - monotonic()))} if blocks else {}  # libpq's, whole seconds
        try:
            return factory(extensions.make_dsn(**{**attempt, **bound}), by)
        except TooLate:
            text = f"no connection within {seconds:g} s, the handshake included"
            failed.append((attempt.get("hostaddr", ""), psycopg2.OperationalError(text)))
        except psycopg2.Error as error:
            failed.append((attempt.get("hostaddr", ""), error))
    last = failed[-1][1]
    if len(failed) == 1:
        raise last.with_traceback(None)
    each = "; ".join(f"{address}: {str(error).strip()}" for address, error in failed)
    raise type(last)(f"None of {len(failed)} addresses could be connected to: {each}")


def _attempts(given: dict[str, Any], until: float) -> Iterator[dict[str, Any]]:
    """Yield what to connect with, one address each: libpq would resolve names itself, which stops the thread."""
    given.pop("connect_timeout", None)
    hosts = str(given.get("host") or "").split(",")
    if (
        "hostaddr" in given
        or any(not host or host[0] in "/@" for host in hosts)
        or given.get("load_balance_hosts", "disable") != "disable"
        or given.get("target_session_attrs") == "prefer-standby"
    ):
        yield given
        return
    ports = str(given.get("port") or os.environ.get("PGPORT") or 5432).split(",")
    for n, host in enumerate(hosts):
        port = ports[n] if len(ports) > 1 else ports[0]
        for address in _addresses(host, int(port), until):
            yield {**given, "host": host, "hostaddr": address, "port": port}


def _addresses(host: str, port: int, until: float) -> list[str]:
    with suppress(ValueError):
        return [str(ipaddress.ip_address(host))]
    found: list[Any] = []

    def resolve() -> None:
        found.extend(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))

    if monkey.is_module_patched("socket"):
        gevent.get_hub()  # resolving makes one, but too late for the bound
    try:
        hub.call_within(until - monotonic(), resolve)
    except hub.BoundExceeded:
        raise psycopg2.OperationalError(f"the address of {host!r} was not found in time") from None
    return list(dict.fromkeys(str(each[4][0]) for each in found))
