"""How the parameters of a statement become its text: PyMySQL's literals, letter for letter, in less time.

Stock PyMySQL asks a table about each character of a string that has something to escape or is not ASCII, and puts a
bulk INSERT together row by row.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from itertools import chain, islice
from operator import itemgetter
from typing import Any

from pymysql import converters, err
from pymysql.constants import SERVER_STATUS

_AT_ONCE = 100  # rows of a bulk INSERT that are put together in one step
_BY_POSITION = {tuple, list}
_NAME = re.compile(r"%\(([^)]+)\)s")  # as in PyMySQL's RE_INSERT_VALUES


def _string(value: str) -> str:
    # Seven looks for what mostly is not there. Not for a subclass of str: markupsafe's has a replace() of its own.
    if "\\" in value:  # first: the others bring some
        value = value.replace("\\", "\\\\")
    if "'" in value:
        value = value.replace("'", "\\'")
    if '"' in value:
        value = value.replace('"', '\\"')
    if "\n" in value:
        value = value.replace("\n", "\\n")
    if "\r" in value:
        value = value.replace("\r", "\\r")
    if "\0" in value:
        value = value.replace("\0", "\\0")
    if "\032" in value:
        value = value.replace("\032", "\\Z")
    return f"'{value}'"


def _null(_: object) -> str:
    return "NULL"


def _datetime(value: datetime.datetime) -> str:
    # isoformat() would show a time zone, which PyMySQL leaves out; a subclass may have one of its own.
    if type(value) is datetime.datetime and value.tzinfo is None:
        return f"'{value.isoformat(' ')}'"
    return converters.escape_datetime(value)


def _date(value: datetime.date) -> str:
    return f"'{value.isoformat()}'" if type(value) is datetime.date else converters.escape_date(value)


_OURS: dict[Any, Callable[[Any], str]] = {
    converters.escape_int: str,
    converters.escape_None: _null,
    converters.escape_datetime: _datetime,
    converters.escape_date: _date,
    converters.Decimal2Literal: partial(converters.Decimal2Literal, d=None),
    **{each: each for each in (converters.escape_bool, converters.escape_float, converters.escape_timedelta)},
}
"""{PyMySQL's encoder: what gives its text}"""


def _literals(connection: Any, values: Iterable[Any]) -> list[str]:
    """Make literals of `values`: what `connection.escape()` gives for each, by the connection's encoders."""
    escape = connection.escape
    if connection.server_status & SERVER_STATUS.SERVER_STATUS_NO_BACKSLASH_ESCAPES:
        return list(map(escape, values))
    encoder_of, ours_for, kind_of = connection.encoders.get, _OURS.get, type
    return [
        _string(value)
        if (kind := kind_of(value)) is str
        else ours(value)
        if (ours := ours_for(encoder_of(kind))) is not None
        else escape(value)
        for value in values
    ]


class WritesLiterals:
    """A cursor whose statements are put together here. Mixed into each of PyMySQL's; lives as it does."""

    rowcount: Any
    execute: Callable[..., Any]
    _get_db: Callable[[], Any]

    def _mogrify(self, query: Any, args: Any) -> Any:
        kind = type(args)
        literals: Any
        if kind is dict:
            literals = dict(zip(args, _literals(self._get_db(), args.values()), strict=True))
        elif kind in _BY_POSITION:
            literals = tuple(_literals(self._get_db(), args))
        else:
            return super()._mogrify(query, args)  # type: ignore[misc]  # PyMySQL's
        try:
            return query % literals
        except TypeError as error:
            raise err.ProgrammingError(str(error)) from error

    def _do_execute_many(
        self, prefix: Any, values: Any, postfix: Any, args: Any, max_stmt_length: int, encoding: str
    ) -> int:
        # The statements that PyMySQL's would send: each as long as it may be, of whole rows.
        encoding = self._get_db().encoding
        head, tail = (text.encode(encoding) if isinstance(text, str) else text for text in (prefix, postfix))
        room = max_stmt_length - len(tail) - 1
        sql, rest = bytearray(head), iter(args)
        affected: int = 0
        while rows := list(islice(rest, _AT_ONCE)):
            for piece in self._pieces(values, rows, encoding, room - len(sql)):
                if len(sql) > len(head):
                    if len(sql) + len(piece) > room:
                        affected += self.execute(sql + tail)
                        sql = bytearray(head)
                    else:
                        sql += b","
                sql += piece
        if len(sql) > len(head):  # without a row there is nothing to send
            affected += self.execute(sql + tail)
        self.rowcount = affected
        return affected

    def _pieces(self, values: Any, rows: list[Any], encoding: str, room: int) -> Iterator[bytes]:
        """Yield the rows as they stand behind VALUES: together if they are no more than `room` bytes, or one by one."""
        found = _in_order(values, rows)
        if found is not None:
            with suppress(UnicodeEncodeError):  # raised for its own row, below
                together = self._mogrify(",".join([_NAME.sub("%s", values)] * len(rows)), found)
                encoded = together.encode(encoding)
                if len(encoded) <= room:
                    yield encoded
                    return
        for row in rows:
            yield self._mogrify(values, row).encode(encoding)


def _in_order(values: str, rows: list[Any]) -> list[Any] | None:
    """List the values of all rows in the order of their places in the text `values`; None: the rows are not alike."""
    kinds, names = set(map(type, rows)), _NAME.findall(values)
    if kinds == {dict} and len(names) > 1 and len(names) == values.count("%"):
        return list(chain.from_iterable(map(itemgetter(*names), rows)))
    # Of one length: with a value too many in one row and one too few in the next, all would move.
    if kinds <= _BY_POSITION and not names and len(set(map(len, rows))) == 1:
        return list(chain.from_iterable(rows))
    return None
