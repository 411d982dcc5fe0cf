"""What a statement gets: the answer's last word, its rows, and cursors that leave a stream unread.

Stock PyMySQL reads a server-side stream to its end, which may take minutes, when the cursor is closed or collected; and
whoever reads on in a stream that something else has ended gets no row more, as at its end.
"""

from __future__ import annotations

import ssl
import struct
import time
from collections.abc import Sequence
from typing import Any

import pymysql.connections
import pymysql.cursors
from pymysql import err
from pymysql.constants import ER, SERVER_STATUS

from dbsession.core.backends.mysql_errors import is_from_socket
from dbsession.core.pool import callsites
from dbsession.errors import ResultCut, describe
from dbsession.green.mysql.columns import Columns, columns
from dbsession.green.mysql.ok_packets import STATUS, number_at
from dbsession.green.mysql.parameters import WritesLiterals
from dbsession.green.mysql.rows import HEAD

_EOF = struct.Struct("<xHH")  # an EOF packet's count of warnings, and status
ROLLED_BACK = "its transaction was rolled back"
_AT_HAND = 2**16  # bytes of a stream's rest that are worth reading to keep its connection
_AT_HAND_S = 0.05

# Their stubs leave the private names out.
_StockResult: Any = pymysql.connections.MySQLResult
_StockCursor: Any = pymysql.cursors.Cursor
_StockDictCursor: Any = pymysql.cursors.DictCursor
_StockSSCursor: Any = pymysql.cursors.SSCursor
_StockSSDictCursor: Any = pymysql.cursors.SSDictCursor


class LeavesUnread(WritesLiterals):
    """A cursor over a server-side stream whose close() reads nothing: the next statement on the connection reads what
    is left, and a rollback gives the connection up instead."""

    connection: Any
    _result: Any

    def close(self) -> None:
        if self._result is not None:
            self._result.left = True
        self.connection = None

    __del__ = close


class _Cursor(WritesLiterals, _StockCursor):  # type: ignore[misc]  # of Any
    pass


class _DictCursor(WritesLiterals, _StockDictCursor):  # type: ignore[misc]  # of Any
    pass


class _SSCursor(LeavesUnread, _StockSSCursor):  # type: ignore[misc]  # of Any
    def fetchmany(self, size: int | None = None) -> Any:
        self._check_executed()
        result = self._result
        rows = result.read_rows(self.arraysize if size is None else size)
        self.rownumber += len(rows)
        self.warning_count = result.warning_count
        return rows or ()  # as PyMySQL's


class _SSDictCursor(LeavesUnread, _StockSSDictCursor):  # type: ignore[misc]  # of Any
    pass


OURS: dict[Any, Any] = {
    pymysql.cursors.Cursor: _Cursor,
    pymysql.cursors.DictCursor: _DictCursor,
    pymysql.cursors.SSCursor: _SSCursor,
    pymysql.cursors.SSDictCursor: _SSDictCursor,
}


class Result(_StockResult):  # type: ignore[misc]  # of Any
    """The answer to one statement, whose last word is kept. Lives until the next one; of a server-side stream, as long
    as its cursor.

    Each OK and EOF packet says whether a transaction is open. Stock PyMySQL drops it after a SELECT, so that its
    `server_status` is wrong whenever it matters.
    """

    # PyMySQL's own, whose first values say too little of their types.
    connection: Any
    unbuffered_active: Any

    left = False
    """Its cursor was closed before its end."""
    cut: str | None = None
    """What has kept rows of a stream from whoever may still fetch them."""
    columns: Columns
    _taken: Sequence[Any] = ()  # rows of a stream that came with one that was fetched
    _given = 0  # how many of them have been fetched, too

    def _read_ok_packet(self, packet: Any) -> None:
        data = packet.get_all_data()
        self.affected_rows, at = number_at(data, 1)
        self.insert_id, at = number_at(data, at)
        self.server_status, self.warning_count = STATUS.unpack_from(data, at)
        self.message = data[at + 4 :]
        self.has_next = self.server_status & SERVER_STATUS.SERVER_MORE_RESULTS_EXISTS

    def _get_descriptions(self) -> None:
        self.columns = found = columns(self.connection, self.field_count, self._read_descriptions)
        self.fields, self.description, self.converters = found.fields, found.description, found.converters

    def _read_descriptions(self) -> Columns:
        super()._get_descriptions()
        return Columns(self.fields, self.description, self.converters)

    def _read_rowdata_packet(self) -> None:
        wire, take = self.connection, self.columns.take
        rows: list[Any] = []
        while True:
            take(wire, rows)
            packet = wire._read_packet()
            if self._check_packet_is_eof(packet):
                break
            rows.append(self._read_row_from_packet(packet))
        self.connection = None
        self.affected_rows = len(rows)
        self.rows = tuple(rows)

    def end_early(self, why: str) -> None:
        """Note that nobody gets the rest of this stream, because of `why`."""
        self.unbuffered_active = False
        self.connection = None
        self._taken = ()
        call = callsites.call()
        self.cut = why if call is None else f"{why} ({call})"

    def read_away(self, why: str) -> None:
        """Read a stream to its end, and drop the rows because of `why`."""
        dropped = self._given < len(self._taken)
        self._taken = ()
        while self.unbuffered_active:
            try:
                packet = self.connection._read_packet()
            except err.MySQLError as error:
                if not self.unbuffered_active:  # the server has ended it so
                    self.end_early(f"{why}, and the server ended it with {describe(error)}")
                    if error.args[0] in (ER.QUERY_TIMEOUT, ER.STATEMENT_TIMEOUT):
                        return  # as PyMySQL has it: nobody waits for these rows any more
                raise
            if self._check_packet_is_eof(packet):
                self.unbuffered_active = False
                self.connection = None
            else:
                dropped = True
        if dropped:
            self.end_early(why)

    def _finish_unbuffered_query(self) -> None:
        self.read_away("its cursor was closed")

    def _read_rowdata_packet_unbuffered(self) -> Any:
        """Return a stream's next row; None at its end. Those that came with it are kept for the next calls."""
        given = self._given
        if given < len(self._taken):
            self._given = given + 1
            return self._taken[given]
        if self.cut is not None:
            raise ResultCut.because(self.cut)
        if self.unbuffered_active and not self.columns.foreign:
            rows: list[Any] = []
            self.columns.take(self.connection, rows)
            if rows:
                self._taken, self._given = rows, 1
                return rows[0]
        try:
            return super()._read_rowdata_packet_unbuffered()
        except err.MySQLError as error:
            if not self.unbuffered_active and self.cut is None:
                self.cut = f"the server ended it with {describe(error)}"
            raise
        except StopIteration as error:  # whoever iterates would take it for the end (PEP 479)
            raise RuntimeError("A converter of this result's columns raised StopIteration.") from error

    def read_rows(self, count: int) -> list[Any]:
        """Return the next rows of a stream, at most so many; fewer at its end."""
        rows: list[Any] = []
        while (missing := count - len(rows)) > 0:
            given = self._given
            if given < len(self._taken):
                rows += self._taken[given : given + missing]
                self._given = given + missing
                continue
            row = self._read_rowdata_packet_unbuffered()
            if row is None:
                break
            rows.append(row)
        return rows

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


def finish_at_hand(wire: Any) -> bool:
    """Read what is left of a connection's stream if it has come already, or comes within a moment, and is little;
    return whether it was. Nothing is read if somebody waits for it just now."""
    if wire._sock is None or wire._reading:
        return False
    end = time.monotonic() + _AT_HAND_S
    wait_s = 0.0
    while not _has_last_packet(wire._ahead, wire._at):
        piece = _piece_within(wire, wait_s) if len(wire._ahead) - wire._at < _AT_HAND else b""
        if piece:
            wire._ahead, wire._at = wire._ahead[wire._at :] + piece, 0
        elif piece is None and wait_s == 0.0:
            wait_s = _AT_HAND_S
        else:
            return False
        if wait_s:
            wait_s = end - time.monotonic()
            if wait_s <= 0:
                return False
    try:
        wire._result.read_away(ROLLED_BACK)
    except err.MySQLError:
        pass  # the server has ended it so
    return wire._sock is not None


def _has_last_packet(data: bytes, at: int) -> bool:
    """Whether `data`, packets of rows from the position `at`, has the one that ends them: EOF, or an error."""
    while len(data) > at + 4:
        head, first = HEAD.unpack_from(data, at)
        size = head & 0xFFFFFF
        at += 4 + size
        if at > len(data):
            return False
        if first == 0xFF or (first == 0xFE and size < 9):
            return True
    return False


def _piece_within(wire: Any, seconds: float) -> bytes | None:
    """Return what has come, or None if that is nothing within so many seconds; b"" at the end."""
    sock = wire._sock
    sock.settimeout(seconds)
    wire._reading = True
    try:
        piece: bytes = sock.recv(2**13)
    except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
        return None
    except OSError as error:
        if is_from_socket(error):
            return None if isinstance(error, TimeoutError) else b""
        raise  # somebody's own, thrown in here
    finally:
        wire._reading = False
        if wire._sock is sock:
            sock.settimeout(None if wire._cooperative else wire._read_timeout)
            wire._current_timeout = wire._read_timeout
    return piece
