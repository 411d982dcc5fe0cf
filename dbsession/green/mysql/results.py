"""What a connection reads: answers whose last word is kept, and cursors that leave a stream unread.

Each OK and EOF packet says whether a transaction is open. Stock PyMySQL drops it after a SELECT, so that its
`server_status` is wrong whenever it matters. And it reads a server-side stream to its end, which may take minutes, when
the cursor is closed or collected.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import Any

import pymysql.connections
import pymysql.cursors
from pymysql.constants import SERVER_STATUS
from pymysql.protocol import FieldDescriptorPacket

_EOF = struct.Struct("<xHH")  # an EOF packet's count of warnings, and status

# Their stubs leave the private names out.
_StockResult: Any = pymysql.connections.MySQLResult
_StockField: Any = FieldDescriptorPacket
_StockSSCursor: Any = pymysql.cursors.SSCursor
_StockSSDictCursor: Any = pymysql.cursors.SSDictCursor


class Result(_StockResult):  # type: ignore[misc]
    """The answer to one statement. Lives until the next one."""

    left = False
    """Its cursor was closed before its end."""

    def _check_packet_is_eof(self, packet: Any) -> bool:
        if not packet.is_eof_packet():
            return False
        self.warning_count, status = _EOF.unpack_from(packet.get_all_data())
        self.has_next = status & SERVER_STATUS.SERVER_MORE_RESULTS_EXISTS
        self.server_status = status
        if self.unbuffered_active:
            self.connection.server_status = status
            self.connection._settled = True
        return True

    def __del__(self) -> None:
        pass  # stock reads a stream to its end here, wherever the collector found it


class LeavesUnread:
    """A cursor over a server-side stream whose close() reads nothing: the next statement on the connection reads what
    is left, and a rollback gives the connection up instead."""

    connection: Any
    _result: Any

    def close(self) -> None:
        if self._result is not None:
            self._result.left = True
        self.connection = None

    __del__ = close


class _SSCursor(LeavesUnread, _StockSSCursor):  # type: ignore[misc]
    pass


class _SSDictCursor(LeavesUnread, _StockSSDictCursor):  # type: ignore[misc]
    pass


LAZY: dict[Any, Any] = {
    pymysql.cursors.SSCursor: _SSCursor,
    pymysql.cursors.SSDictCursor: _SSDictCursor,
}


class _Field(_StockField):  # type: ignore[misc]
    def __init__(self, data: bytes, encoding: str) -> None:
        super().__init__(data, encoding)
        self._description = super().description()

    def description(self) -> Any:
        return self._description


@lru_cache(maxsize=1024)
def field(data: bytes, encoding: str) -> Any:
    """A column's description. Each answer to a statement brings the same bytes: they are taken apart once."""
    return _Field(data, encoding)
