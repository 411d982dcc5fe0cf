"""TLS of asyncmy and aiomysql: the engine's context in place of one for each connection, and no falling back."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from typing import Any

from dbsession.aio.mysql.connection import transport_of
from dbsession.core.backends.mysql_tls import (
    SSL_CONNECTION_ERROR,
    TRUSTED_BY_THE_MACHINE,
    TLSContexts,
    with_option_file,
)


def argument(contexts: TLSContexts, module: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
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


def require(connection: Any, arguments: Mapping[str, Any], module: Any) -> None:
    """Close the new connection and raise the driver's error, if TLS was asked for and the server has none: aiomysql
    goes on without."""
    if arguments.get("ssl") and transport_of(connection).get_extra_info("ssl_object") is None:
        connection.close()
        raise module.OperationalError(
            SSL_CONNECTION_ERROR, "SSL connection error: TLS is required, but the server does not support it"
        )
