"""Which address asyncpg connects to: the first one that lets us in within its share of the time."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable, Sequence
from time import monotonic
from typing import Any

_BY_NAME = ("ssl", "sslmode", "dsn", "service", "passfile")
"""Arguments that may need the host's name, or say where it is."""


async def first_that_answers(
    connect: Callable[..., Awaitable[Any]], until: float, cargs: Sequence[Any], arguments: dict[str, Any]
) -> Any:
    """Return what `connect` opens by that time of the clock monotonic(), to the first host or address that answers; a
    silent one leaves their time to the others.

    Raises:
        TimeoutError: none did.
    """
    attempts = [arguments]
    async with asyncio.timeout(until - monotonic()):
        if not cargs and "target_session_attrs" not in arguments and "PGTARGETSESSIONATTRS" not in os.environ:
            attempts = await _attempts(arguments)
    for n, attempt in enumerate(attempts):
        share = (until - monotonic()) / (len(attempts) - n)
        try:
            async with asyncio.timeout(share):
                return await connect(*cargs, **attempt)
        except OSError:  # TimeoutError, too
            if n == len(attempts) - 1:
                raise
    raise AssertionError("there is no address")


async def _attempts(arguments: dict[str, Any]) -> list[dict[str, Any]]:
    host, port = arguments.get("host"), arguments.get("port")
    if isinstance(host, list | tuple):
        ports = port if isinstance(port, list | tuple) else [port] * len(host)
        pairs = [
            {"host": one, **({} if number is None else {"port": number})}
            for one, number in zip(host, ports, strict=False)
        ]
        return [{**arguments, **pair} for pair in pairs]
    if (
        not isinstance(host, str)
        or host.startswith("/")
        or _is_address(host)
        or "password" not in arguments
        or "PGSSLMODE" in os.environ
        or any(key in arguments for key in _BY_NAME)
    ):
        return [arguments]
    found = await asyncio.get_running_loop().getaddrinfo(host, port or 5432, type=socket.SOCK_STREAM)
    return [{**arguments, "host": str(address[4][0])} for address in found] or [arguments]


def _is_address(host: str) -> bool:
    try:
        socket.getaddrinfo(host, None, flags=socket.AI_NUMERICHOST)  # asks nobody
    except socket.gaierror:
        return False
    return True
