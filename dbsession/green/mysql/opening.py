"""How a connection is opened: to the first address that greets us in its share of the time, with the engine's TLS.

PyMySQL gives each address of a name the whole time to connect, and a silent first one leaves nothing to the others.
"""

from __future__ import annotations

import time
from typing import Any

from pymysql import err
from pymysql.constants import CR

from dbsession.core.backends import mysql_errors
from dbsession.core.backends.mysql_errors import is_from_socket
from dbsession.core.backends.mysql_tls import TLSContexts
from dbsession.green.mysql.address import addresses, dial
from dbsession.green.mysql.wire import Wire

_SILENT = (CR.CR_CONN_HOST_ERROR, CR.CR_SERVER_GONE_ERROR, CR.CR_SERVER_LOST)


class _IfOffered:
    """The context of a connection that takes TLS where the server has it: made as it is needed. Lives as long as the
    connection."""

    def __init__(self, contexts: TLSContexts) -> None:
        self._contexts = contexts

    def wrap_socket(self, *arguments: Any, **more: Any) -> Any:
        return self._contexts.of({}, err.OperationalError).wrap_socket(*arguments, **more)


class Opening(Wire):
    """A connection, as far as it is about to be opened. Lives as it does."""

    # Class attributes, so that they are there while PyMySQL's __init__ connects.
    local: Any = None
    peer: Any = None
    _tls: TLSContexts
    _end = 0.0  # of the time to connect
    _greeted = False

    def _create_ssl_ctx(self, sslp: Any) -> Any:
        if not isinstance(sslp, dict):
            return super()._create_ssl_ctx(sslp)  # a context of the user's
        if sslp:
            return self._tls.of(sslp, err.OperationalError)
        return _IfOffered(self._tls)

    def connect(self, sock: Any = None) -> None:
        self._ahead, self._at = b"", 0
        self._cooperative = False
        timeouts = self._read_timeout, self._write_timeout
        self._read_timeout = self._write_timeout = self.connect_timeout
        self._end = time.monotonic() + self.connect_timeout
        try:
            if sock is None and not self.unix_socket:
                self._connect_to_any()
            else:
                self._connect(sock, self.connect_timeout)
            if not self.unix_socket:
                self.local, self.peer = self._sock.getsockname(), self._sock.getpeername()
        finally:
            self._connect_by = None
            self._read_timeout, self._write_timeout = timeouts
        self._take_over_timeouts()

    def _connect_to_any(self) -> None:
        """Connect to the first address of the host that greets us within its share of the time."""
        try:
            found = addresses(self.host, self.port, self.connect_timeout)
            for number, address in enumerate(found, 1):
                try:
                    self._connect_to(address, (self._end - time.monotonic()) / (len(found) - number + 1))
                    return
                except (OSError, err.OperationalError) as error:
                    silent = is_from_socket(error) or mysql_errors.number(error) in _SILENT
                    if self._greeted or not silent or number == len(found):
                        raise
        except OSError as error:
            if not is_from_socket(error):
                raise  # somebody's timeout
            raise err.OperationalError(
                CR.CR_CONN_HOST_ERROR, f"Can't connect to MySQL server on {self.host!r} ({error})"
            ) from error

    def _connect_to(self, address: Any, seconds: float) -> None:
        by = time.monotonic() + seconds
        self._greeted = False
        self._connect(dial(address, seconds, self.bind_address), by - time.monotonic())
        self.host_info = f"socket {self.host}:{self.port}"

    def _connect(self, sock: Any, seconds: float) -> None:
        """Connect over a socket, or the Unix socket. The server has `seconds` to greet us, and then what is left."""
        self._connect_by = time.monotonic() + seconds
        try:
            super().connect(sock)
        except err.OperationalError as error:
            original = getattr(error, "original_exception", None)
            if isinstance(original, OSError) and not is_from_socket(original):
                raise original from None  # somebody's timeout, which PyMySQL takes for the socket's
            raise

    def _get_server_information(self) -> None:
        super()._get_server_information()
        self._greeted = True
        self._connect_by = self._end
