"""Rows by asyncmy's compiled parser, where it is installed: a function over bytes, which needs no event loop."""

from __future__ import annotations

import datetime
import decimal
import importlib
import struct
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from pymysql import converters
from pymysql.constants import FIELD_TYPE

from dbsession.green.mysql.rows import Read

_CODES = {None: 0, "utf8": 1, "ascii": 2}  # how it is told what to decode; 3: by the encoding's name


@lru_cache(maxsize=1)
def compiled() -> Callable[[list[int], list[tuple[str | None, Any]]], Read] | None:
    """Return what makes a reader of asyncmy's parser; None: there is none, or it does not read as PyMySQL does."""
    try:
        parse = importlib.import_module("asyncmy.protocol").parse_rows_from_buffer
        fast = importlib.import_module("asyncmy.converters")
        odd = importlib.import_module("asyncmy.errors").InternalError
        by_type = {
            FIELD_TYPE.DATETIME: (converters.convert_datetime, fast.convert_datetime),
            FIELD_TYPE.TIMESTAMP: (converters.convert_datetime, fast.convert_datetime),
            FIELD_TYPE.DATE: (converters.convert_date, fast.convert_date),
            FIELD_TYPE.TIME: (converters.convert_timedelta, fast.convert_timedelta),
        }
    except Exception:  # not installed, another version, broken
        return None

    def made(types: list[int], found: list[tuple[str | None, Any]]) -> Read:
        columns: list[tuple[int, str | None, Any]] = []
        for kind, (encoding, converter) in zip(types, found, strict=True):
            stock, faster = by_type.get(kind, (None, None))
            if converter in (int, float):
                columns.append((0, None, converter))
            elif stock is not None and converter is stock:
                columns.append((0, None, faster))
            else:
                columns.append((_CODES.get(encoding, 3), encoding, converter))
        specs = tuple(columns)

        def read(data: bytes, at: int, end: int, number: int, rows: list[Any]) -> tuple[int, int]:
            try:
                stop, number = parse(bytearray(memoryview(data)[at:end]), 0, end - at, specs, number, rows)
            except odd as error:
                raise ValueError(*error.args) from None
            return at + stop, number

        return read

    return made if _reads_alike(made) else None


# A row that each reader must read alike, by type and repr: column type, bytes, what becomes of them.
_SAMPLE: tuple[tuple[int, bytes | None, Any], ...] = (
    (FIELD_TYPE.LONGLONG, b"18446744073709551615", 2**64 - 1),
    (FIELD_TYPE.LONGLONG, b"-9223372036854775808", -(2**63)),
    (FIELD_TYPE.DOUBLE, b"-1.5e300", -1.5e300),
    (FIELD_TYPE.NEWDECIMAL, b"0.10", decimal.Decimal("0.10")),
    (FIELD_TYPE.DATETIME, b"2024-02-29 23:59:58.000120", datetime.datetime(2024, 2, 29, 23, 59, 58, 120)),
    (FIELD_TYPE.TIMESTAMP, b"2024-00-00 00:00:00", "2024-00-00 00:00:00"),
    (FIELD_TYPE.DATE, b"2024-02-30", "2024-02-30"),
    (FIELD_TYPE.DATE, b"9999-12-31", datetime.date(9999, 12, 31)),
    (FIELD_TYPE.TIME, b"-838:59:59.999999", -datetime.timedelta(0, 3020399, 999999)),
    (FIELD_TYPE.VAR_STRING, "a\u20ac\U0001f40d".encode() * 40, "a\u20ac\U0001f40d" * 40),
    (FIELD_TYPE.BLOB, bytes(range(256)), bytes(range(256))),
    (FIELD_TYPE.VAR_STRING, None, None),
    (FIELD_TYPE.STRING, b"", ""),
)


def _reads_alike(made: Callable[..., Read]) -> bool:
    decode = {FIELD_TYPE.VAR_STRING: "utf8", FIELD_TYPE.STRING: "utf8", FIELD_TYPE.BLOB: None}
    types = [each for each, _, _ in _SAMPLE]
    of = {each: None if each in decode else converters.decoders[each] for each in types}
    packed = b""
    for _, value, _ in _SAMPLE:
        size = 0 if value is None else len(value)
        packed += (b"\xfb" if value is None else bytes([size]) if size < 251 else b"\xfc" + struct.pack("<H", size)) + (
            value or b""
        )
    heads = [struct.pack("<I", len(packed) | number << 24) for number in (255, 0)]
    last = b"\x05\x00\x00\x01\xfe\x00\x00\x02\x00"
    data = b"....." + heads[0] + packed + heads[1] + packed + last
    rows: list[Any] = []
    try:
        read = made(types, [(decode.get(each, "ascii"), of[each]) for each in types])
        stopped = read(data, 5, len(data), 255, rows)
    except Exception:
        return False
    right = tuple(value for _, _, value in _SAMPLE)
    return stopped == (len(data) - len(last), 1) and repr(rows) == repr([right, right])
