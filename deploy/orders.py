"""The order desk's two databases, and the rules for what may be stored in them. Nothing here knows Flask.

asgi.py imports this, too: `dbsession` loads its gevent half when `create_tables` first asks for it."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import URL, BigInteger, DateTime, Integer, String
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

import dbsession

DATA = Path(__file__).resolve().parent / "data"


def databases() -> dict[str, dict[str, Any]]:
    """What `dbsession.configure` takes: the databases of the environment, else SQLite files beside this module."""

    def entry(variable: str, file: str) -> dict[str, Any]:
        url: str | URL | None = os.environ.get(variable)
        if not url:
            DATA.mkdir(exist_ok=True)
            url = URL.create("sqlite", database=str(DATA / file))
        return {
            "url": url,
            "options": {"hide_parameters": True},  # no customer's name in a log
            "guard": "warn",
            "session": {"expire_on_commit": False},  # an order may be shown after its commit without a query
        }

    return {
        "default": entry("DBSESSION_URL", "orders.db"),
        "audit": entry("DBSESSION_AUDIT_URL", "audit.db"),
    }


# -- the tables: one metadata for each database, so that each gets its own tables and no others ----------------


def now() -> datetime:
    """UTC, to the second: what DATETIME holds on every database."""
    return datetime.now(UTC).replace(tzinfo=None, microsecond=0)


# Whatever the server's default is, any name can be stored, and a search finds the same rows as on SQLite.
_MYSQL = {
    f"{dialect}_{key}": value
    for dialect in ("mysql", "mariadb")
    for key, value in (("engine", "InnoDB"), ("charset", "utf8mb4"), ("collate", "utf8mb4_bin"))
}
_ID = BigInteger().with_variant(Integer, "sqlite")  # only an INTEGER primary key counts up by itself there


class Orders(DeclarativeBase):
    """The tables of the database `default`."""


class Audit(DeclarativeBase):
    """The tables of the database `audit`."""


class Order(Orders):
    __tablename__ = "orders"
    __table_args__ = _MYSQL

    id: Mapped[int] = mapped_column(_ID, primary_key=True)
    customer: Mapped[str] = mapped_column(String(80), index=True)
    item: Mapped[str] = mapped_column(String(120))
    quantity: Mapped[int]
    price_cents: Mapped[int]
    created_at: Mapped[datetime] = mapped_column(DateTime, default=now)

    def as_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "customer": self.customer,
            "item": self.item,
            "quantity": self.quantity,
            "price_cents": self.price_cents,
            "created_at": f"{self.created_at.isoformat()}Z",
        }


class Entry(Audit):
    """Who did what. `order_id` cannot be a foreign key: the order is in another database."""

    __tablename__ = "entries"
    __table_args__ = _MYSQL

    id: Mapped[int] = mapped_column(_ID, primary_key=True)
    at: Mapped[datetime] = mapped_column(DateTime, default=now)
    action: Mapped[str] = mapped_column(String(40))
    order_id: Mapped[int | None] = mapped_column(BigInteger, index=True)
    detail: Mapped[str] = mapped_column(String(255))


METADATA = {"default": Orders.metadata, "audit": Audit.metadata}


def create_tables() -> None:
    """Create what is missing. Several workers may do so at once; leaves no connection open.

    For the first start only: an existing table is not changed. A migration tool does that, per named engine.
    """
    try:
        for name, metadata in METADATA.items():
            try:
                metadata.create_all(dbsession.get_engine(name))
            except DBAPIError as error:
                if not made_by_another(error):
                    raise
    finally:
        dbsession.dispose()  # under --preload this is the master, which has no use for connections


def made_by_another(error: DBAPIError) -> bool:
    """Whether another worker was quicker, between create_all's look and its CREATE. One table a database: done."""
    return "already exists" in str(error.orig)


# -- the rules -------------------------------------------------------------------------------------------------

TEXTS = {"customer": 80, "item": 120}  # field -> the most characters, as the columns have
NUMBERS = {"quantity": (1, 1_000_000), "price_cents": (0, 1_000_000_000)}  # field -> least, most: both fit INTEGER
FIELDS = (*TEXTS, *NUMBERS)
MAX_ID = 2**63 - 1
MAX_RECORD_CHARACTERS = 2000  # of one CSV record, its quotes included; the longest sensible one has 450


class BadInput(ValueError):
    """What a client sent cannot be used. `errors` maps field to message; `line` is that of a CSV body."""

    def __init__(self, errors: Mapping[str, str], line: int | None = None) -> None:
        super().__init__(errors)
        self.errors = errors
        self.line = line

    def as_json(self) -> dict[str, Any]:
        field, message = next(iter(self.errors.items()))
        if self.line is None:
            return {"error": {"field": field, "message": message}}
        where = f"line {self.line}, column {field}: {message}"
        return {"error": {"field": field, "line": self.line, "column": field, "message": where}}


def check_text(value: object, most: int) -> str:
    """`value` as text that every database can store, without white space around it, or ValueError."""
    if not isinstance(value, str):
        raise ValueError("must be text")
    value = value.strip()
    if not value:
        raise ValueError("must not be empty")
    if len(value) > most:
        raise ValueError(f"must have at most {most} characters, not {len(value)}")
    if re.search(r"[\ud800-\udfff]", value):  # half a surrogate pair in JSON, a byte that is no UTF-8 in CSV
        raise ValueError("must be valid Unicode text (UTF-8)")
    if re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", value):
        raise ValueError("must not contain NUL or other control characters")
    return value


def check_number(value: object, least: int, most: int) -> int:
    """`value` as an integer of that range, or ValueError."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError("must be a whole number")
    if not least <= value <= most:
        raise ValueError(f"must be from {least} to {most}")
    return value


def number(text: str) -> object:
    """The integer that `text` is; anything else is returned as it is, for check_number to refuse."""
    # The length first: int() refuses more than 4300 digits with an error of its own.
    return int(text) if re.fullmatch(r"\s*[+-]?[0-9]{1,20}\s*", text) else text


def check_order(values: Mapping[str, object]) -> dict[str, Any]:
    """The order that `values` describe, ready for `Order(**order)`. Raises BadInput, with all that is wrong."""
    order: dict[str, Any] = {}
    errors: dict[str, str] = {}
    for field in FIELDS:
        try:
            if field not in values:
                raise ValueError("is missing")
            if field in TEXTS:
                order[field] = check_text(values[field], TEXTS[field])
            else:
                order[field] = check_number(values[field], *NUMBERS[field])
        except ValueError as error:
            errors[field] = str(error)
    for field in [field for field in values if field not in FIELDS]:
        errors[str(field)[:80]] = f"is unknown: the fields are {', '.join(FIELDS)}"
    if errors:
        raise BadInput(errors)
    return order


def check_text_order(values: Mapping[str, str]) -> dict[str, Any]:
    """As check_order, for a form or a CSV line, where numbers are text."""
    return check_order({field: number(text) if field in NUMBERS else text for field, text in values.items()})


def read_csv(pieces: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The orders of a CSV body that arrives in pieces of any size; holds one piece and one record in memory.

    Raises:
        BadInput: the first bad line, with its number and column.
    """
    lines: list[str] = []  # of the record that is being read: a quoted field may hold line ends
    start = 1  # its first line

    def take(line: bytes) -> str:
        # What is no UTF-8 becomes a lone surrogate, which check_text refuses under its column's name.
        lines.append(line.decode("utf-8", "surrogateescape"))
        if sum(map(len, lines)) > MAX_RECORD_CHARACTERS:
            refuse(f"the record has more than {MAX_RECORD_CHARACTERS} characters")
        return lines[-1]

    def refuse(message: str) -> None:
        column = _open_column("".join(lines)[:MAX_RECORD_CHARACTERS])
        raise BadInput({column: message}, start) from None

    def arriving() -> Iterator[str]:
        rest = b""
        for piece in pieces:
            *complete, rest = (rest + piece).split(b"\n")
            for line in complete:
                yield take(line + b"\n")
            if len(rest) > 4 * MAX_RECORD_CHARACTERS:
                take(rest)
        if rest:
            yield take(rest)

    reader = csv.reader(arriving(), strict=True)
    header = None
    while True:
        lines.clear()
        start = reader.line_num + 1
        try:
            record = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            refuse(f"the quoting is wrong: {error}")
        if header is None:
            header = [record[0].removeprefix("\ufeff"), *record[1:]] if record else []  # Excel's byte order mark
            for index, column in enumerate(FIELDS):
                if header[index : index + 1] != [column]:
                    raise BadInput({column: f"the header must be {','.join(FIELDS)}"}, start)
            _check_width(header, start)
        elif record:  # an empty line is none
            _check_width(record, start)
            try:
                yield check_text_order(dict(zip(FIELDS, record, strict=True)))
            except BadInput as error:
                raise BadInput(error.errors, start) from None
    if header is None:
        raise BadInput({FIELDS[0]: f"the body is empty: it must begin with the header {','.join(FIELDS)}"}, 1)


def _check_width(record: list[str], line: int) -> None:
    if len(record) != len(FIELDS):
        raise BadInput({_column(len(record)): f"there are {len(record)} columns instead of {len(FIELDS)}"}, line)


def _open_column(record: str) -> str:
    """The column in which `record`, broken somewhere, breaks: the one after the last that ends as it should."""
    ended = 0
    for comma in re.finditer(",", record):
        try:
            ended = len(next(csv.reader([record[: comma.start()]], strict=True), [""]))
        except csv.Error:
            continue
        if ended > len(FIELDS):
            break
    return _column(ended)


def _column(index: int) -> str:
    return FIELDS[index] if index < len(FIELDS) else str(len(FIELDS) + 1)
