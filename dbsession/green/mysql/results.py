"""What a statement gets: cursors that leave a stream unread, and columns that are taken apart once.

Stock PyMySQL reads a server-side stream to its end, which may take minutes, when the cursor is closed or collected.
"""

from __future__ import annotations

import itertools
from functools import lru_cache
from typing import Any

import pymysql.cursors
from pymysql.protocol import FieldDescriptorPacket

# Their stubs leave the private names out.
_StockField: Any = FieldDescriptorPacket
_StockSSCursor: Any = pymysql.cursors.SSCursor
_StockSSDictCursor: Any = pymysql.cursors.SSDictCursor


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
        # Asked of each column of each answer: a function of C's, which gives the same tuple again and again.
        self.description = itertools.repeat(super().description()).__next__


@lru_cache(maxsize=1024)
def field(data: bytes, encoding: str) -> Any:
    """A column's description. Each answer to a statement brings the same bytes: they are taken apart once."""
    return _Field(data, encoding)
