"""Who may see the dashboard: whoever asks on loopback, or whoever has the token."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import time
from collections import OrderedDict, deque
from collections.abc import Callable

LEAST_TOKEN = 16
"""Characters; whoever gives fewer is warned. Guessing is limited, but not for somebody with many addresses and much
time."""

FAILURES, FAILURES_S = 5, 60.0
"""So many wrong tokens from one address within so many seconds, and it has to wait."""

_ADDRESSES = 1000

_LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server on `host`. Of a name other than localhost nobody knows."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_local_name(host_header: str) -> bool:
    """Whether a browser that sends this `Host` was asked for this machine. A page of somebody else's may give its own
    name the address 127.0.0.1 and read what is served there; the name gives it away."""
    name, colon, port = host_header.rpartition(":")
    if not colon or "]" in port:
        name, port = host_header, "0"
    return name.lower() in _LOCAL_NAMES and port.isascii() and port.isdecimal()


class Token:
    """The secret of one dashboard. Lives as long as it."""

    def __init__(self, token: str) -> None:
        self._token = token.encode(errors="surrogatepass")

    def __repr__(self) -> str:
        return "Token(...)"

    def matches(self, given: str) -> bool:
        """Takes as long for a nearly right one as for a wrong one."""
        return hmac.compare_digest(self._token, given.encode(errors="surrogatepass"))

    def key(self) -> bytes:
        """What signs the cookies: the same for the same token, so that a restart logs nobody out. Slow to make, so that
        a cookie is of little use for guessing the token."""
        return hashlib.scrypt(self._token, salt=b"dbsession dashboard", n=2**14, r=8, p=1)


class FailedLogins:
    """The wrong tokens of the last minute, by address. Lives as long as the dashboard; used by one greenlet at a time,
    as no method switches."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._times: OrderedDict[str, deque[float]] = OrderedDict()

    def wait_s(self, address: str) -> float:
        """The seconds until this address may try again; 0: now."""
        times = self._times.get(address, deque())
        return max(0.0, times[0] + FAILURES_S - self._clock()) if len(times) == FAILURES else 0.0

    def add(self, address: str) -> None:
        """It has sent a wrong one."""
        self._times.setdefault(address, deque(maxlen=FAILURES)).append(self._clock())
        self._times.move_to_end(address)
        while len(self._times) > _ADDRESSES:
            self._times.popitem(last=False)
