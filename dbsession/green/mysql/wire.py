"""What a connection sends and reads: never out of step with its server, closed by whatever interrupts it half-way.

PyMySQL keeps its socket open when an exception ends a write, and a ROLLBACK then goes into the middle of a packet.
The methods through which every byte goes are private, and there is no public way. tests/unit/test_private_names.py
fails loudly when one of these names goes.
"""

from __future__ import annotations

import socket
import struct
import time
import warnings
from contextlib import suppress
from typing import Any

from pymysql import err
from pymysql.constants import CR
from pymysql.protocol import FieldDescriptorPacket, MysqlPacket

from dbsession.core import fork
from dbsession.core.backends.mysql_errors import is_from_socket, is_loss
from dbsession.core.backends.mysql_sent import Sent
from dbsession.core.fork import KNOWN
from dbsession.errors import describe
from dbsession.green.mysql.columns import field
from dbsession.green.mysql.ok_packets import ok_packet
from dbsession.green.mysql.results import Result
from dbsession.green.mysql.rows import HEAD
from dbsession.green.mysql.waits import Waits

_ERROR = 0xFF
_ONE_PACKET = 2**24 - 2  # bytes of a command that need another one
_COMMAND = struct.Struct("<iB")  # the head of packet 0, which is its length, and the command
_AHEAD, _PIECE = 2**16, 2**18  # bytes asked for at once; of large packets


class Wire(Waits):
    """The bytes of one connection. Lives as it does."""

    # PyMySQL's own, whose first values say too little of their types.
    _next_seq_id: Any
    _result: Any

    # Class attributes, so that they are there while PyMySQL's __init__ connects.
    gave_up = False
    """Closed by us, while the server may be well: no reason to mistrust the pool's other connections."""
    server_status: int
    sent: Sent
    used = False
    """Something was sent on it since it was connected or reset."""
    unsent = False
    """The socket has refused a part of what was to be sent last, so that the server cannot have had it as a whole."""
    _epoch = -1
    _heard = 0.0  # when the last answer came
    _settled = False  # everything sent was answered, and the last answer was no error
    _answering = False
    _killed_by: BaseException | None = None
    # What was read from the socket with an earlier packet, and where in it the next one begins.
    _ahead = b""
    _at = 0

    def _abandon(self) -> None:
        raise NotImplementedError

    def _force_close(self) -> None:
        self._cut("its connection was closed or lost")
        self._ahead = b""
        self._at = 0
        self._close_timers()
        self._look = None
        if self._reading and self._rfile is not None:
            # Somebody else waits for it, which keeps it from being closed; whoever that is closes it as the wait ends.
            self._left_open, self._sock, self._rfile = (self._rfile, self._sock), None, None
            with suppress(OSError):
                self._left_open[1].shutdown(socket.SHUT_RDWR)
        super()._force_close()

    # A statement, and its answer.

    def _execute_command(self, command: int, sql: Any) -> None:
        result = self._result
        if result is not None and result.unbuffered_active:
            self._read_rest("another statement was sent on its connection")
        if self._asked:  # by somebody whom a signal's handler has interrupted between the question and its answer
            self._abandon()
            self.unsent = True
            raise err.OperationalError(
                CR.CR_SERVER_LOST, "Lost connection to MySQL server: nobody has read its last answer"
            )
        self.used = True
        self.sent.command(command, sql)
        if isinstance(sql, str):
            sql = sql.encode(self.encoding)
        if len(sql) >= _ONE_PACKET or not self._sock or (self._result is not None and self._result.has_next):
            super()._execute_command(command, sql)
            return
        # As PyMySQL sends what needs one packet, when no other result is still to come.
        self._result = None
        self._write_bytes(_COMMAND.pack(len(sql) + 1, command) + sql)
        self._next_seq_id = 1

    def _cut(self, why: str) -> None:
        """Note that nobody gets the rest of the server-side stream under way, if there is one."""
        result = self._result
        if result is not None and result.unbuffered_active:
            result.end_early(why)

    def _read_rest(self, why: str) -> None:
        """Read what is left of a server-side stream, which somebody has stopped reading or is about to be cut off
        from."""
        if not self._result.left:
            warnings.warn("Previous unbuffered result was left incomplete", stacklevel=2)  # as PyMySQL does
        self._result.read_away(why)

    def _read_query_result(self, unbuffered: bool = False) -> Any:
        self._result = None
        result = Result(self)
        self._answering = True
        try:
            if unbuffered:
                result.init_unbuffered_query()
            else:
                result.read()
        except err.MySQLError:
            if self._killed_by is not None:  # by LOAD DATA LOCAL, which goes on writing
                raise self._killed_by from None
            raise  # an error packet, read in full
        except BaseException:
            if self.open:  # in the middle of the answer, where a converter failed, say
                self._abandon()
            raise
        finally:
            self._answering = False
            self._killed_by = None
        self._result = result
        self._heard = time.monotonic()
        if result.server_status is not None:
            self.server_status = result.server_status
            self._settled = True
        return result.affected_rows

    def _read_ok_packet(self) -> Any:
        packet = ok_packet(self._read_packet().get_all_data(), self.encoding)
        self.server_status = packet.server_status
        self._settled = True
        self._heard = time.monotonic()
        return packet

    # Its bytes.

    def _write_bytes(self, data: Any) -> None:
        self._settled = False
        if not KNOWN[0]:
            fork.found_out()
        if self._sock is None or self._epoch != fork.epoch:  # in a forked child it is the parent's
            raise err.InterfaceError(0, "")
        if self._at < len(self._ahead):
            self._force_close()
            raise err.OperationalError(CR.CR_SERVER_LOST, "Lost connection to MySQL server: it said what nobody asked")
        try:
            if self._cooperative:
                self._send_cooperatively(data)
            else:
                timeout_s = self._seconds_left() if self._connect_by else self._write_timeout
                if self._connect_by or self._current_timeout != timeout_s:
                    self._sock.settimeout(timeout_s)
                    self._current_timeout = timeout_s
                self._send(data)
            self._asked = True
        except BaseException as error:
            # Half a packet: the server waits for the rest, so it ends what it has as soon as the socket closes.
            self.gave_up = self.gave_up or not is_loss(error)
            self._force_close()
            self._note_kill(error)
            if is_from_socket(error):
                self.unsent = True
                raise err.OperationalError(
                    CR.CR_SERVER_GONE_ERROR, f"MySQL server has gone away ({error!r})"
                ) from error
            raise

    def _read_packet(self, packet_type: Any = MysqlPacket) -> Any:
        """Read a packet. One that came whole with the packet before it is taken without further ado."""
        if self._cooperative and self._at >= len(self._ahead):
            self._read_bytes(4)  # the head of the first packet, and what comes with it
            self._at -= 4
        ahead, at = self._ahead, self._at
        if len(ahead) > at + 4:
            head, first = HEAD.unpack_from(ahead, at)
            end = at + 4 + (head & 0xFFFFFF)
            if end <= len(ahead) and head >> 24 == self._next_seq_id and first != _ERROR and self._epoch == fork.epoch:
                self._at = end
                self._next_seq_id = (self._next_seq_id + 1) % 256
                read = field if packet_type is FieldDescriptorPacket else packet_type
                return read(ahead[at + 4 : end], self.encoding)
        if self._cooperative:
            self._current_timeout = self._read_timeout  # so that PyMySQL sets none on the socket
        return super()._read_packet(packet_type)

    def _read_bytes(self, num_bytes: int) -> bytes:
        if not KNOWN[0]:
            fork.found_out()
        if self._rfile is None or self._epoch != fork.epoch:
            raise err.InterfaceError(0, "")
        try:
            data = self._read_ahead(num_bytes)
        except BaseException as error:
            self._cut(f"{describe(error)} ended the wait for its rows")
            closed = self._sock is None and isinstance(error, OSError)  # by somebody else, who has seen to the rest
            if closed or is_loss(error) or self._connect_by:
                self._force_close()
            else:
                self._abandon()
            self._note_kill(error)
            if closed or is_from_socket(error):
                raise err.OperationalError(
                    CR.CR_SERVER_LOST, f"Lost connection to MySQL server during query ({error})"
                ) from error
            raise
        if len(data) < num_bytes:
            self._force_close()
            raise err.OperationalError(CR.CR_SERVER_LOST, "Lost connection to MySQL server during query")
        return data

    def _read_ahead(self, num_bytes: int) -> bytes:
        """Return so many bytes, or less at the end. What came with them is kept for the next packets."""
        data = self._ahead[self._at :]
        if not data and 0 < num_bytes <= _AHEAD and not self._connect_by:
            data = self._read_piece(_AHEAD)  # nearly always the whole answer
            if not data:
                return data
        if len(data) < num_bytes:
            pieces, missing = [data], num_bytes - len(data)
            while missing > 0:
                # Nothing is read ahead of the TLS handshake: whoever stands between may have added it.
                piece = self._read_piece(missing if self._connect_by else min(max(missing, _AHEAD), _PIECE))
                if not piece:
                    break
                pieces.append(piece)
                missing -= len(piece)
            data = b"".join(pieces)
        if num_bytes > _AHEAD:
            self._ahead, self._at = data[num_bytes:], 0
        else:
            self._ahead, self._at = data, num_bytes
        return data[:num_bytes]

    def _note_kill(self, error: BaseException) -> None:
        if self._answering and self._killed_by is None and not is_from_socket(error):
            self._killed_by = error
