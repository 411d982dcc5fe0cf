"""The addresses of a server's name, and a socket to one of them, within the time that there is.

A name may have several addresses, and the first may be silent. So each has its share of the time, and the question for
the addresses has its part in it: a resolver may hang as well.
"""

from __future__ import annotations

import errno
import socket
import sys
from collections.abc import Callable
from typing import Any

import gevent
from gevent import monkey

from dbsession.green import hub

_getaddrinfo: Callable[..., list[Any]] = monkey.get_original("socket", "getaddrinfo")  # by a number it waits for nobody


def addresses(host: str, port: int, seconds: float) -> list[Any]:
    """Return the addresses of a host, as `socket.getaddrinfo()` does, within so many seconds. Switches greenlets.

    Raises:
        OSError: the host is not known; TimeoutError: nobody has said so in time.
    """
    try:
        return _getaddrinfo(host, port, 0, socket.SOCK_STREAM, 0, socket.AI_NUMERICHOST)
    except socket.gaierror:
        found = _within(seconds, lambda: socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM))
    if not found:
        raise socket.gaierror(socket.EAI_NONAME, "the name has no address")
    return found


def _within(seconds: float, ask: Callable[[], list[Any]]) -> list[Any]:
    found: list[Any] = []
    if monkey.is_module_patched("socket"):
        gevent.get_hub()  # which the socket is going to need
        try:
            hub.call_within(seconds, lambda: found.extend(ask()))
        except hub.BoundExceeded:
            raise _late(seconds) from None
        return found
    waiter, failed = hub.Waiter(), []

    def work() -> None:
        try:
            found.extend(ask())
        except Exception as error:
            failed.append(error)
        waiter.wake()

    if sys.is_finalizing():
        work()  # no thread starts any more
    else:
        hub.run_in_thread(work)
    if not waiter.wait(seconds) and not found and not failed:
        raise _late(seconds)
    if failed:
        raise failed[0]
    return found


def _late(seconds: float) -> TimeoutError:
    return TimeoutError(f"timed out: the name was not resolved within {seconds:.3g} s")


def dial(address: Any, seconds: float, bind_address: str | None) -> socket.socket:
    """Return a socket that is connected to one of `addresses()`, as PyMySQL makes it. Switches greenlets."""
    family, kind, protocol, _, target = address
    made = socket.socket(family, kind, protocol)
    try:
        if seconds <= 0:
            raise TimeoutError(errno.ETIMEDOUT, "timed out")
        made.settimeout(seconds)
        if bind_address is not None:
            made.bind((bind_address, 0))
        made.connect(target)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    except BaseException:
        made.close()
        raise
    return made
