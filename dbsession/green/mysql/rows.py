"""The rows of an answer, as PyMySQL reads them, without an object for each packet.

A reader takes the rows of which what has been received has the whole packet, and stops in front of anything else: half
a packet, a row in several packets, the EOF or error packet, a value that is not as the server writes it. PyMySQL's own
code goes on from there. So whatever is not ordinary is treated by one piece of code, which is not ours.
"""

from __future__ import annotations

import datetime
import decimal
import struct
from collections.abc import Callable
from functools import lru_cache
from types import CodeType
from typing import Any

from pymysql import converters
from pymysql.constants import FIELD_TYPE

HEAD = struct.Struct("<IB")
"""A packet's length (3 bytes) and number, and the first byte of what is in it."""

Read = Callable[[bytes, int, int, int, list[Any]], tuple[int, int]]
"""Appends the rows in the packets of `data[at:end]`, of which the first has the number given; returns where it has
stopped, and the number due there. What it raises, it raises when all rows before have been appended."""

_ROWS = """
def read(data, at, end, number, rows):
    append, unpack = rows.append, HEAD.unpack_from
    while at + 4 < end:
        head, first = unpack(data, at)
        stop = at + 4 + (head & 0xFFFFFF)
        if stop > end or head >> 24 != number or first >= 0xFE:
            break
        p = at + 4
{columns}
        if p != stop:
            break
        append(({row}))
        at, number = stop, number + 1 & 0xFF
    return at, number
"""
# A column whose values are short, as numbers are; any other; and one of moments, which are no day of the calendar if
# PyMySQL gives them as text.
_SHORT = """
        n = data[p]
        p += 1
        if n < 251:
            v{i} = {value}
        elif n == 251:
            v{i} = None
        else:
            break
"""
_ANY = """
        n = data[p]
        p += 1
        if n < 251:
            v{i} = {value}
        elif n == 251:
            v{i} = None
        elif n < 255:
            n = int.from_bytes(data[p : (p := p + (n - 250 if n < 254 else 8))], "little")
            v{i} = {value}
        else:
            break
"""
_MOMENT = """
        n = data[p]
        p += 1
        if n < 251:
            try:
                v{i} = {value}
            except ValueError:
                v{i} = c{i}(data[p - n : p].decode())
        elif n == 251:
            v{i} = None
        else:
            break
"""
_BYTES = "data[p : (p := p + n)]"
_MOMENTS = {
    FIELD_TYPE.DATETIME: (converters.convert_datetime, "datetime_of"),
    FIELD_TYPE.TIMESTAMP: (converters.convert_datetime, "datetime_of"),
    FIELD_TYPE.DATE: (converters.convert_date, "date_of"),
    FIELD_TYPE.TIME: (converters.convert_timedelta, "time_of"),
}


def _time(text: str) -> datetime.timedelta:
    """Return the time of "HH:MM:SS"; of whatever else the server writes a part is no number: ValueError."""
    return datetime.timedelta(0, int(text[:2]) * 3600 + int(text[3:5]) * 60 + int(text[6:]))


@lru_cache(maxsize=1024)
def _code(columns: tuple[str, ...]) -> CodeType:
    row = "".join(f"v{i}, " for i in range(len(columns)))
    return compile(_ROWS.format(columns="".join(columns), row=row), "<rows>", "exec")


def generated(types: list[int], found: list[tuple[str | None, Any]]) -> Read:
    """Return a reader for columns of these types, with these encodings and converters: a function made for them."""
    names: dict[str, Any] = {
        "HEAD": HEAD,
        "datetime_of": datetime.datetime.fromisoformat,
        "date_of": datetime.date.fromisoformat,
        "time_of": _time,
    }
    columns = []
    for i, (kind, (encoding, converter)) in enumerate(zip(types, found, strict=True)):
        names[f"c{i}"] = converter
        stock, fast = _MOMENTS.get(kind, (None, ""))
        shape, value = _ANY, _BYTES
        if converter is int or converter is float:
            shape, value = _SHORT, f"{converter.__name__}({_BYTES})"
        elif stock is not None and converter is stock:
            shape, value = _MOMENT, f"{fast}({_BYTES}.decode())"
        else:
            if encoding == "utf8" or converter is decimal.Decimal:  # whose digits are ASCII
                value += ".decode()"  # without a name it takes half the time
            elif encoding is not None:
                value += f".decode({encoding!r})"
            if converter is not None:
                value = f"c{i}({value})"
        columns.append(shape.format(i=i, value=value))
    exec(_code(tuple(columns)), names)
    read: Read = names["read"]
    return read
