"""OK packets: the answers that have no rows."""

from __future__ import annotations

import struct
from functools import lru_cache

from pymysql import err
from pymysql.constants import CR
from pymysql.protocol import MysqlPacket, OKPacketWrapper

STATUS = struct.Struct("<HH")
"""An OK packet's server status, and count of warnings."""


@lru_cache(maxsize=256)
def ok_packet(data: bytes, encoding: str) -> OKPacketWrapper:
    """Return an OK packet that is no statement's: nearly every COMMIT is answered with the same bytes, which are taken
    apart once.

    Raises:
        OperationalError: it is none.
    """
    packet = MysqlPacket(data, encoding)
    if not packet.is_ok_packet():
        raise err.OperationalError(CR.CR_COMMANDS_OUT_OF_SYNC, "Command Out of Sync")
    return OKPacketWrapper(packet)


def number_at(data: bytes, at: int) -> tuple[int, int]:
    """Return the length-encoded number at a position, and the position behind it."""
    first = data[at]
    if first < 251:
        return first, at + 1
    end = at + 1 + (first - 250 if first < 254 else 8)
    return int.from_bytes(data[at + 1 : end], "little"), end
