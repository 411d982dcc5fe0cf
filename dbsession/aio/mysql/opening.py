"""How asyncmy and aiomysql open a connection: to the first address that lets us in within its share of the time, with
the engine's TLS context in place of one for each connection, and never without TLS where it was asked for.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from dbsession.aio.mysql.connection import transport_of
from dbsession.core.backends import mysql_errors
from dbsession.core.backends.mysql_tls import (
    SSL_CONNECTION_ERROR,
    TRUSTED_BY_THE_MACHINE,
    TLSContexts,
    with_option_file,
)

_CANNOT_CONNECT = 2003
_SILENT = (_CANNOT_CONNECT, 2006, 2013)

_OTHER_WAYS = ("unix_socket", "sock", "read_default_file", "read_default_group")
"""Arguments that say, or may say, where the server is."""


def tls_argument(contexts: TLSContexts, module: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return `{"ssl": context}` for connect() of the driver whose DBAPI `module` is this; `{}` where `arguments` ask
    for no TLS, or bring a context of their own."""
    given = arguments.get("ssl")
    if isinstance(given, ssl.SSLContext) or arguments.get("sock") is not None:
        return {}
    if given is True:  # aiomysql passes it on to asyncio, where it means more
        options = {} if module.driver.__name__ == "asyncmy" else TRUSTED_BY_THE_MACHINE
    else:
        if given is not None and not isinstance(given, Mapping):
            return {}  # the driver refuses it in its own words
        options = with_option_file(arguments) if module.driver.__name__ == "asyncmy" else dict(given or {})
        if not options:
            return {}
    return {"ssl": contexts.of(options, module.OperationalError)}


def require_tls(connection: Any, arguments: Mapping[str, Any], module: Any) -> None:
    """Close the new connection and raise the driver's error, if TLS was asked for and the server has none: aiomysql
    goes on without."""
    if arguments.get("ssl") and transport_of(connection).get_extra_info("ssl_object") is None:
        connection.close()
        raise module.OperationalError(
            SSL_CONNECTION_ERROR, "SSL connection error: TLS is required, but the server does not support it"
        )


class _Named(ssl.SSLContext):
    """A context by which a server at an address is asked for the certificate of its name. Lives for one connection."""

    def __new__(cls, context: ssl.SSLContext, host: str) -> _Named:
        return super().__new__(cls, ssl.PROTOCOL_TLS_CLIENT)

    def __init__(self, context: ssl.SSLContext, host: str) -> None:
        self._context = context
        self._host = host

    def wrap_bio(
        self,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        server_side: bool = False,
        server_hostname: str | bytes | None = None,
        session: ssl.SSLSession | None = None,
    ) -> ssl.SSLObject:
        return self._context.wrap_bio(incoming, outgoing, server_side, self._host, session)


def at(address: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return a driver's `arguments` with an address in place of the host's name."""
    context = arguments.get("ssl")
    named = {"ssl": _Named(context, arguments["host"])} if isinstance(context, ssl.SSLContext) else {}
    return {**arguments, "host": address, **named}


async def opened(
    connect: Callable[..., Awaitable[Any]], arguments: Mapping[str, Any], module: Any, seconds: float
) -> Any:
    """Return the connection that a driver's `connect` opens to the first address of the host that lets us in within its
    share of `seconds`; the drivers wait for the first one as long as the system does."""
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    host, port = arguments.get("host"), arguments.get("port") or 3306
    if not host or any(arguments.get(key) for key in _OTHER_WAYS) or _is_address(host):
        return await connect(**arguments)
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        if not found:
            raise socket.gaierror(socket.EAI_NONAME, "the name has no address")
    except OSError as error:
        text = f"Can't connect to MySQL server on {host!r} ({error})"
        raise module.OperationalError(_CANNOT_CONNECT, text) from error
    for number, address in enumerate(found, 1):
        try:
            async with asyncio.timeout((end - loop.time()) / (len(found) - number + 1)):
                return await connect(**at(str(address[4][0]), arguments))
        except (TimeoutError, module.OperationalError) as error:
            silent = isinstance(error, TimeoutError) or mysql_errors.number(error) in _SILENT
            if not silent or number == len(found):
                raise
    raise AssertionError("a host has no address")


def _is_address(host: str) -> bool:
    try:
        socket.getaddrinfo(host, None, flags=socket.AI_NUMERICHOST)  # asks nobody
    except socket.gaierror:
        return False
    return True
