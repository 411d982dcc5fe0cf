"""The text of a statement: letter for letter what PyMySQL makes of it."""

from __future__ import annotations

import datetime
import decimal
import enum
import random
from collections import OrderedDict

import pymysql
import pytest
from pymysql import converters, cursors
from pymysql.constants import SERVER_STATUS
from sqlalchemy import text

from dbsession import SessionManager
from dbsession.green.mysql import results
from dbsession.green.mysql.connection import Connection

INSERT = "INSERT INTO t (a, b) VALUES (%s, %s)"
AWKWARD = ["", "'", '"', "\\", "\\'", "\n\r\0\032", "%s %(a)s %%", "ж漢😀", "\x80\xff", "\udc80", "a" * 9000 + "'"]


class Markup(str):
    """As markupsafe's, which escapes what it is given."""

    def replace(self, old, new, count=-1):
        return Markup(str.replace(self, old, new.replace("'", "&#39;"), count))


class Colour(enum.IntEnum):
    RED = 1


class Late(datetime.datetime):
    def isoformat(self, *_):
        return "nanoseconds"


class Today(datetime.date):
    def isoformat(self):
        return "today"


def connections(**arguments):
    """PyMySQL's connection and ours, neither of which is open."""
    found = [kind(defer_connect=True, **arguments) for kind in (pymysql.connections.Connection, Connection)]
    for each in found:
        each.server_status = 0
    return found


def text_of(connection, value, cursor=cursors.Cursor):
    return connection.cursor(cursor).mogrify("%s", (value,))


def assert_same(values, stock, ours):
    for value in values:
        assert text_of(ours, value) == text_of(stock, value)


def random_values(count):
    source = random.Random(15)
    for _ in range(count):
        moment = datetime.datetime(
            *(source.randint(1, most) for most in (9999, 12, 28)), microsecond=source.choice([0, 1, 10**5])
        )
        moment += datetime.timedelta(seconds=source.randint(0, 86_399))
        yield "".join(source.choices("ab'\"\\\n\r\0\032%яж漢😀\x80\xff", k=source.randrange(40)))
        yield from (moment, moment.date(), moment.time(), moment.replace(tzinfo=datetime.UTC), moment - moment.min)
        yield from (
            source.randint(-(2**70), 2**70),
            source.uniform(-1e20, 1e20),
            decimal.Decimal(source.randint(0, 10**6)) / 100,
        )


@pytest.mark.parametrize("status", [0, SERVER_STATUS.SERVER_STATUS_NO_BACKSLASH_ESCAPES])
def test_a_value_becomes_pymysqls_literal(status):
    stock, ours = connections()
    stock.server_status = ours.server_status = status
    assert_same([*AWKWARD, *random_values(120)], stock, ours)
    assert_same([None, True, False, 0, -1, b"a'", bytearray(b"x"), (1, "a'"), [None, "b"], {1}], stock, ours)
    assert_same([Markup("a'b"), Colour.RED, datetime.time(1, 2, 3), object], stock, ours)
    assert_same([Late(2026, 1, 2), Today(2026, 1, 2)], stock, ours)


def test_users_encoders_are_honoured_whenever_they_are_set():
    own = {**converters.conversions, datetime.datetime: lambda *_: "'mine'", Late: converters.escape_datetime}
    own |= {Today: converters.escape_date, Colour: converters.escape_int}
    stock, ours = connections(conv=own)
    values = [datetime.datetime(2026, 1, 2), Late(2026, 1, 2), Today(2026, 1, 2), Colour.RED, 5, "a'"]
    assert_same(values, stock, ours)
    for each in (stock, ours):
        each.encoders[int] = lambda *_: "'number'"
    assert_same(values, stock, ours)
    assert text_of(ours, 5) == "'number'"


def error_of(work, *arguments):
    try:
        return work(*arguments)
    except Exception as error:
        return type(error), str(error)


@pytest.mark.parametrize("value", [float("nan"), decimal.Decimal("Infinity"), {"a": 1}])
def test_a_value_that_has_no_literal_is_refused_as_by_pymysql(value):
    stock, ours = connections()
    assert error_of(text_of, ours, value) == error_of(text_of, stock, value)


@pytest.mark.parametrize("cursor", [cursors.Cursor, cursors.DictCursor, cursors.SSCursor, cursors.SSDictCursor])
@pytest.mark.parametrize(
    "statement, arguments",
    [("%s %s", ("a'", 1)), ("%s", [None]), ("%(a)s", {"a": "b'"}), ("%s", (1, 2)), ("%s %s", [1]), ("%%", ())],
)
def test_a_statement_is_put_together_as_by_pymysql(cursor, statement, arguments):
    stock, ours = (error_of(each.cursor(cursor).mogrify, statement, arguments) for each in connections())
    assert ours == stock


def statements(connection, rows, statement=INSERT, most=None, cursor=cursors.Cursor):
    """What executemany() sends, and what it tells of it."""
    made = connection.cursor(cursor)
    sent = []

    def execute(sql, *_):
        sent.append(bytes(sql) if isinstance(sql, bytearray) else sql)
        return 7

    made.execute = execute
    if most is not None:
        made.max_stmt_length = most
    return error_of(made.executemany, statement, rows), sent, made.rowcount


ROWS = [(number, f"it's {number}" + "ж" * (number % 50)) for number in range(400)]


@pytest.mark.parametrize("cursor", [cursors.Cursor, cursors.SSCursor])
@pytest.mark.parametrize("encoding", ["utf8mb4", "latin1"])
@pytest.mark.parametrize("most", [1, 50, 300, 5000, 5001, 5002, 5003, 20_000, None])
def test_a_bulk_insert_is_sent_in_pymysqls_statements(cursor, encoding, most):
    rows = ROWS if encoding == "utf8mb4" else [(number, name.replace("ж", "é")) for number, name in ROWS]
    stock, ours = connections(charset=encoding)
    after = INSERT + " ON DUPLICATE KEY UPDATE b = VALUES(b)"
    for statement in (INSERT, after):
        assert statements(ours, rows, statement, most, cursor) == statements(stock, rows, statement, most, cursor)


@pytest.mark.parametrize(
    "rows",
    [
        [(1, "a")],
        [(1, "a"), [2, "b"]],
        ({"a": 1}, {"a": 2}),
        [(1, "a", 3), (2,), (3, "c")],  # as many values as places, in the wrong rows
        [(1,), (2,)],
        [(1, "a", 3), (2, "b", 3)],
        [(1, "a"), (2, "\udc80")],
        [(1, "a"), (2, {})],
        [(1, "a")] * 150 + [(1,)],
        [],
    ],
    ids=str,
)
def test_rows_of_any_form_are_taken_or_refused_as_by_pymysql(rows):
    stock, ours = (statements(each, rows) for each in connections())
    assert ours == stock


NAMED = "INSERT INTO t (a, b) VALUES (%(b)s, %(a)s)"


@pytest.mark.parametrize(
    "rows",
    [
        [{"a": number, "b": name} for number, name in ROWS],
        [{"a": 1, "b": "x", "more": 2}, {"b": "y", "a": 3}],
        [{"a": 1, "b": "x"}, {"a": 1}],
        [{"a": 1, "b": "x"}, (1, 2)],
        [{"a": 1, "b": Markup("'")}, OrderedDict(a=1, b=2)],
    ],
    ids=["many", "more", "missing", "mixed", "another mapping"],
)
@pytest.mark.parametrize("most", [300, None])
def test_rows_by_name_are_taken_or_refused_as_by_pymysql(rows, most):
    stock, ours = (statements(each, rows, NAMED, most) for each in connections())
    assert ours == stock
    one = "INSERT INTO t (a) VALUES (%(a)s)"
    stock, ours = (statements(each, rows, one, most) for each in connections())
    assert ours == stock
    twice = "INSERT INTO t (a, b, c) VALUES (%(a)s, %(b)s, %(a)s)"
    stock, ours = (statements(each, rows, twice, most) for each in connections())
    assert ours == stock


def test_rows_from_a_generator_are_taken():
    stock, ours = (statements(each, (row for row in ROWS)) for each in connections())
    assert ours == stock


def test_a_cursor_class_of_the_users_own_is_left_as_it_is():
    class Mine(cursors.Cursor):
        pass

    assert type(connections()[1].cursor(Mine)) is Mine and Mine not in results.OURS


def test_nothing_is_sent_for_an_iterator_without_rows():
    _, ours = connections()
    cursor = ours.cursor()
    assert cursor.executemany(INSERT, iter(())) == cursor.rowcount == 0  # it is not open


@pytest.mark.parametrize("mode", ["", "NO_BACKSLASH_ESCAPES", "ANSI_QUOTES"])
def test_what_is_stored_is_what_was_given(mariadb_url, mode):
    manager = SessionManager({"default": mariadb_url})
    values = [each for each in AWKWARD if each != "\udc80"]
    with manager.scope(), manager.engine().connect() as connection:
        connection.exec_driver_sql(f"SET sql_mode = '{mode}'")
        connection.execute(text("CREATE TABLE t (id INT PRIMARY KEY, b TEXT CHARACTER SET utf8mb4, c DATETIME(6))"))
        rows = [
            {"id": number, "b": values[number % len(values)], "c": datetime.datetime(2026, 1, 2, 3, 4, 5, number)}
            for number in range(300)
        ]
        connection.execute(text("INSERT INTO t (id, b, c) VALUES (:id, :b, :c)"), rows)
        found = connection.execute(text("SELECT id, b, c FROM t ORDER BY id")).mappings().all()
        assert [dict(row) for row in found] == rows
    manager.dispose()
