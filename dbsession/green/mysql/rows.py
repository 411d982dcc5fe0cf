"""The rows of an answer, as PyMySQL reads them, without an object for each packet.

A reader takes the rows of which what has been received has the whole packet, and stops in front of anything else: half
a packet, a row in several packets, the EOF or error packet, a value that is not as the server writes it. PyMySQL's own
code goes on from there. So whatever is not ordinary is treated by one piece of code, which is not ours.
"""

from __future__ import annotations

import datetime
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

_datetime_of, _date_of, _timedelta = datetime.datetime.fromisoformat, datetime.date.fromisoformat, datetime.timedelta


def _datetime(text: str) -> Any:
    try:
        return _datetime_of(text)
    except ValueError:
        return converters.convert_datetime(text)


def _date(text: str) -> Any:
    try:
        return _date_of(text)
    except ValueError:
        return converters.convert_date(text)


def _time(text: str) -> Any:
    if len(text) != 8 or text[0] == "-":
        return converters.convert_timedelta(text)
    return _timedelta(0, int(text[:2]) * 3600 + int(text[3:5]) * 60 + int(text[6:]))


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
_COLUMN = """
        n = data[p]
        p += 1
        if n < 251:
            q = p + n
            v{i} = {value}
            p = q
        elif n == 251:
            v{i} = None
        elif n < 255:
            size = n - 250 if n < 254 else 8
            q = p + size + int.from_bytes(data[p : p + size], "little")
            p += size
            v{i} = {value}
            p = q
        else:
            break
"""


@lru_cache(maxsize=1024)
def _code(values: tuple[str, ...]) -> CodeType:
    each = "".join(_COLUMN.format(i=i, value=value) for i, value in enumerate(values))
    row = "".join(f"v{i}, " for i in range(len(values)))
    return compile(_ROWS.format(columns=each, row=row), "<rows>", "exec")


def generated(types: list[int], found: list[tuple[str | None, Any]]) -> Read:
    names: dict[str, Any] = {"HEAD": HEAD, "datetime_of": _datetime, "date_of": _date, "time_of": _time}
    values = []
    for i, (kind, (encoding, converter)) in enumerate(zip(types, found, strict=True)):
        value = "data[p:q]"
        if converter in (int, float):
            value = f"{converter.__name__}({value})"
        elif kind in (FIELD_TYPE.DATETIME, FIELD_TYPE.TIMESTAMP) and converter is converters.convert_datetime:
            value = f"datetime_of({value}.decode())"
        elif kind == FIELD_TYPE.DATE and converter is converters.convert_date:
            value = f"date_of({value}.decode())"
        elif kind == FIELD_TYPE.TIME and converter is converters.convert_timedelta:
            value = f"time_of({value}.decode())"
        else:
            if encoding is not None:
                value += f".decode({encoding!r})"
            if converter is not None:
                names[f"c{i}"] = converter
                value = f"c{i}({value})"
        values.append(value)
    exec(_code(tuple(values)), names)
    read: Read = names["read"]
    return read
