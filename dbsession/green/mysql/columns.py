"""The columns of an answer: described by the server each time, and taken apart once."""

from __future__ import annotations

import decimal
import itertools
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from pymysql import converters
from pymysql.protocol import FieldDescriptorPacket

from dbsession.core import fork
from dbsession.green.mysql.parser import compiled
from dbsession.green.mysql.rows import HEAD, Read, generated

_EOF = 0xFE
WORTH_IT = 50  # rows, read by PyMySQL; then a function is made for them, which takes as long as reading a hundred
_SEVERAL = 0xFFFFFF  # bytes in a packet that another one continues

# What PyMySQL's own converters raise of a value that they cannot take, and a reader of a row that is none.
_ODD = (ValueError, TypeError, ArithmeticError, LookupError)
_STOCK = (
    None,
    int,
    float,
    decimal.Decimal,
    converters.convert_datetime,
    converters.convert_date,
    converters.convert_timedelta,
    converters.convert_time,
)

_StockField: Any = FieldDescriptorPacket  # its stub leaves private names out


class _Field(_StockField):  # type: ignore[misc]  # of Any
    def __init__(self, data: bytes, encoding: str) -> None:
        super().__init__(data, encoding)
        # Asked of each column of each answer: a function of C's, which gives the same tuple again and again.
        self.description = itertools.repeat(super().description()).__next__


@lru_cache(maxsize=1024)
def field(data: bytes, encoding: str) -> Any:
    """A column's description. Each answer to a statement brings the same bytes: they are taken apart once."""
    return _Field(data, encoding)


class Columns:
    """A description of columns, taken apart. Lives in `_known`, and as long as the result that it is of.

    Args:
        fields, description: PyMySQL's.
        found: for each column its encoding, if it has one, and its converter.
    """

    def __init__(self, fields: list[Any], description: Any, found: list[tuple[str | None, Any]]) -> None:
        self.fields = fields
        self.description = description
        self.converters = found
        self.foreign = any(converter not in _STOCK for _, converter in found)
        """A converter is the user's own: whatever it raises is raised at once, and it runs when its row is fetched."""
        self.types = [each.type_code for each in fields]
        parser = compiled()
        self._read: Read | None = None if parser is None else parser(self.types, found)
        self._had = 0  # rows, while it has no reader

    def take(self, wire: Any, rows: list[Any]) -> None:
        """Append the rows that the connection `wire` has received as a whole."""
        data, at, number = wire._ahead, wire._at, wire._next_seq_id
        if at >= len(data) or wire._epoch != fork.epoch:
            return
        read, before = self._read, len(rows)
        if read is None:
            self._had += 1
            if self._had < WORTH_IT:
                return
            self._read = read = generated(self.types, self.converters)
        try:
            # A packet of the longest kind is never in it as a whole.
            at, number = read(data, at, min(len(data), at + _SEVERAL), number, rows)
        except BaseException as error:
            for _ in range(len(rows) - before):
                at += 4 + int.from_bytes(data[at : at + 3], "little")
                number = number + 1 & 0xFF
            if self.foreign or not isinstance(error, _ODD):
                raise
        finally:
            if wire._ahead is data:  # not closed meanwhile, by a converter that let others run
                wire._at, wire._next_seq_id = at, number


# By a description's packets, the encoding and whether text is wanted: its columns' types, and by its converters what it
# means. Each change is one operation.
_known: dict[Any, tuple[list[int], dict[Any, Columns]]] = {}


def columns(wire: Any, count: int, stock: Callable[[], Columns]) -> Columns:
    """Return what the next packets, the description of so many columns, mean, and leave them behind. `stock` reads them
    as PyMySQL does: where they have not come as a whole, or were not seen before."""
    data, start, number = wire._ahead, wire._at, wire._next_seq_id
    # Up to the first bytes that look like the EOF packet that ends it. What looks so within it was never read as one.
    last = number + count & 0xFF
    end = data.find(HEAD.pack(5 + (last << 24), _EOF), start)
    if end < 0 or len(data) < end + 9 or wire._epoch != fork.epoch:
        return stock()
    key = data[start:end], wire.encoding, wire.use_unicode
    converter_of = wire.decoders.get
    known = _known.get(key)
    if known is not None:
        types, by_converters = known
        found = by_converters.get(tuple(map(id, map(converter_of, types))))
        if found is not None and len(types) == count and data[start + 3] == number:
            wire._at, wire._next_seq_id = end + 9, last + 1 & 0xFF
            return found
    found = stock()
    if wire._ahead is not data or wire._at != end + 9:
        return found
    types = [each.type_code for each in found.fields]
    if len(_known) >= 1024:
        _known.clear()
    _, by_converters = _known.setdefault(key, (types, {}))
    if len(by_converters) >= 8:
        by_converters.clear()
    # `found` keeps the converters, so that no other object gets their ids.
    by_converters[tuple(map(id, map(converter_of, types)))] = found
    return found
