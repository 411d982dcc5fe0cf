"""What a request of the benchmarks does, whoever serves it, and the tables it does it to: see `apps` for who serves.

    WORK   path -> what is done with a SQLAlchemy session
    RAW    path -> what is done with a PyMySQL connection, without the commit

A row has eight columns, one of each kind that applications have most: int, bigint, varchar, text, decimal, datetime,
JSON, bool.
"""

from __future__ import annotations

import datetime
import json
import random
from collections.abc import Callable
from decimal import Decimal
from typing import Any

from sqlalchemy import JSON, BigInteger, Numeric, String, Text, insert, select, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

ROWS = 10_000
MANY = 5000
"""So many rows has the largest list."""

ADDED = 1000
"""So many rows are inserted at once."""

_COLUMNS = """number BIGINT NOT NULL, name VARCHAR(40) NOT NULL, body TEXT NOT NULL, price DECIMAL(12, 2) NOT NULL,
at DATETIME(6) NOT NULL, doc JSON NOT NULL, flag BOOL NOT NULL"""
SCHEMA = [
    "CREATE TABLE item (id INT PRIMARY KEY, name VARCHAR(40) NOT NULL)",
    f"INSERT INTO item SELECT seq, CONCAT('item ', seq) FROM seq_1_to_{ROWS}",
    "CREATE TABLE entry (id INT PRIMARY KEY AUTO_INCREMENT, text VARCHAR(40) NOT NULL)",
    f"CREATE TABLE line (id INT PRIMARY KEY, {_COLUMNS})",
    """INSERT INTO line SELECT seq, 3000000000 + seq, CONCAT('line ', seq), REPEAT('some text ', 6), seq / 100,
    '2026-01-01 12:00:00.5' + INTERVAL seq SECOND, JSON_OBJECT('n', seq, 'tags', JSON_ARRAY('a', 'b')), seq % 2
    """
    f"FROM seq_1_to_{MANY}",
    f"CREATE TABLE added (id INT PRIMARY KEY AUTO_INCREMENT, {_COLUMNS})",
]

_POSTGRESQL_COLUMNS = _COLUMNS.replace("DATETIME(6)", "TIMESTAMP")
POSTGRESQL_SCHEMA = [
    "CREATE TABLE item (id INT PRIMARY KEY, name VARCHAR(40) NOT NULL)",
    f"INSERT INTO item SELECT n, 'item ' || n FROM generate_series(1, {ROWS}) n",
    "CREATE TABLE entry (id SERIAL PRIMARY KEY, text VARCHAR(40) NOT NULL)",
    f"CREATE TABLE line (id INT PRIMARY KEY, {_POSTGRESQL_COLUMNS})",
    """INSERT INTO line SELECT n, 3000000000 + n, 'line ' || n, repeat('some text ', 6), n / 100.0,
    timestamp '2026-01-01 12:00:00.5' + n * interval '1 second',
    json_build_object('n', n, 'tags', json_build_array('a', 'b')), n % 2 = 1 """
    f"FROM generate_series(1, {MANY}) n",
    f"CREATE TABLE added (id SERIAL PRIMARY KEY, {_POSTGRESQL_COLUMNS})",
    "ANALYZE",
]


class Base(DeclarativeBase):
    pass


class Item(Base):
    __tablename__ = "item"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


class Entry(Base):
    __tablename__ = "entry"
    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


class Columns:
    id: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(BigInteger)
    name: Mapped[str] = mapped_column(String(40))
    body: Mapped[str] = mapped_column(Text)
    price: Mapped[Decimal] = mapped_column(Numeric(12, 2))
    at: Mapped[datetime.datetime]
    doc: Mapped[Any] = mapped_column(JSON)
    flag: Mapped[bool]


class Line(Columns, Base):
    """What lists are read of."""

    __tablename__ = "line"


class Added(Columns, Base):
    __tablename__ = "added"


def values(number: int) -> dict[str, Any]:
    """One row to insert."""
    return {
        "number": 3_000_000_000 + number,
        "name": f"line {number}",
        "body": "some text " * 6,
        "price": Decimal(number) / 100,
        "at": datetime.datetime(2026, 1, 1, 12, 0, number % 60, 500_000),
        "doc": {"n": number, "tags": ["a", "b"]},
        "flag": bool(number % 2),
    }


def _one(session: Any) -> str:
    return session.get(Item, random.randint(1, ROWS)).name


def _line(session: Any) -> None:
    session.get(Line, random.randint(1, MANY))


def _add_line(session: Any) -> None:
    session.add(Added(**values(1)))
    session.commit()


def _insert(session: Any) -> None:
    session.add(Entry(text="entry"))
    session.commit()


def _twenty(session: Any) -> None:
    for key in range(1, 21):
        session.get(Item, key)


def _objects(count: int) -> Callable[[Any], None]:
    def read(session: Any) -> None:
        assert len(session.scalars(select(Line).limit(count)).all()) == count

    return read


def _rows(count: int) -> Callable[[Any], None]:
    def read(session: Any) -> None:
        assert len(session.execute(select(*Line.__table__.c).limit(count)).all()) == count

    return read


def _sequence(session: Any) -> None:
    """Rows of no table of InnoDB's: the server begins no transaction."""
    assert len(session.execute(text(f"SELECT seq FROM seq_1_to_{MANY}")).all()) == MANY


def _streamed(*what: Any) -> Callable[[Any], None]:
    def read(session: Any) -> None:
        statement = select(*what).limit(MANY).execution_options(yield_per=500)
        assert sum(1 for _ in session.execute(statement)) == MANY

    return read


def _add_objects(session: Any) -> None:
    session.add_all([Added(**values(number)) for number in range(ADDED)])
    session.commit()


def _add_rows(session: Any) -> None:
    session.execute(insert(Added.__table__), [values(number) for number in range(ADDED)])
    session.commit()


WORK: dict[str, Callable[[Any], object]] = {
    "/select": _one,
    "/insert": _insert,
    "/nothing": lambda session: None,
    "/line": _line,
    "/line/add": _add_line,
    "/twenty": _twenty,
    "/objects/50": _objects(50),
    "/objects/500": _objects(500),
    "/objects/5000": _objects(MANY),
    "/rows/50": _rows(50),
    "/rows/500": _rows(500),
    "/rows/5000": _rows(MANY),
    "/sequence/5000": _sequence,
    "/streamed/objects": _streamed(Line),
    "/streamed/rows": _streamed(*Line.__table__.c),
    "/add/objects": _add_objects,
    "/add/rows": _add_rows,
}

WRITES = ("/insert", "/line/add", "/add/objects", "/add/rows")

_BY_KEY = "SELECT name FROM item WHERE id = %s"
_NAMES = [column.name for column in Added.__table__.c if column.name != "id"]
_ADD = f"INSERT INTO added ({', '.join(_NAMES)}) VALUES ({', '.join(f'%({name})s' for name in _NAMES)})"


def _raw_one(connection: Any) -> str:
    with connection.cursor() as cursor:
        cursor.execute(_BY_KEY, (random.randint(1, ROWS),))
        return cursor.fetchone()[0]


def _raw_line(connection: Any) -> None:
    with connection.cursor() as cursor:
        cursor.execute("SELECT * FROM line WHERE id = %s", (random.randint(1, MANY),))
        cursor.fetchone()


def _raw_add_line(connection: Any) -> None:
    with connection.cursor() as cursor:
        cursor.execute(_ADD, _values_for_the_driver(1))


def _values_for_the_driver(number: int) -> dict[str, Any]:
    row = values(number)
    return row | {"doc": json.dumps(row["doc"])}


def _raw_insert(connection: Any) -> None:
    with connection.cursor() as cursor:
        cursor.execute("INSERT INTO entry (text) VALUES (%s)", ("entry",))


def _raw_twenty(connection: Any) -> None:
    with connection.cursor() as cursor:
        for key in range(1, 21):
            cursor.execute(_BY_KEY, (key,))
            cursor.fetchone()


def _raw_rows(count: int) -> Callable[[Any], None]:
    def read(connection: Any) -> None:
        with connection.cursor() as cursor:
            cursor.execute(f"SELECT * FROM line LIMIT {count}")
            rows = [(*row[:6], json.loads(row[6]), bool(row[7])) for row in cursor.fetchall()]
        assert len(rows) == count

    return read


def _raw_add(connection: Any) -> None:
    with connection.cursor() as cursor:
        cursor.executemany(_ADD, [_values_for_the_driver(number) for number in range(ADDED)])


RAW: dict[str, Callable[[Any], object]] = {
    "/select": _raw_one,
    "/insert": _raw_insert,
    "/line": _raw_line,
    "/line/add": _raw_add_line,
    "/twenty": _raw_twenty,
    "/rows/50": _raw_rows(50),
    "/rows/500": _raw_rows(500),
    "/rows/5000": _raw_rows(MANY),
    "/add/rows": _raw_add,
}
