"""dbsession.green.mysql.rows, columns and parser: rows are those of stock PyMySQL by type and repr, whoever reads them,
however they come, and whatever comes in between."""

from __future__ import annotations

import contextlib
import decimal
import itertools
import sys
import types

import gevent
import pymysql
import pytest
from pymysql.constants import CLIENT, FIELD_TYPE
from pymysql.cursors import Cursor, DictCursor, SSCursor, SSDictCursor
from sqlalchemy.engine import make_url

from dbsession.green.mysql import columns, parser
from dbsession.green.mysql.connection import Connection
from support.processes import run_python
from support.proxy import Proxy

MOMENTS = [
    "'2024-02-29 23:59:58.000120'",
    "'1000-01-01'",
    "'9999-12-31 23:59:59.999999'",
    "'0000-00-00'",
    "'2024-00-00'",
    "'2024-05-00'",
    "'2024-02-31 01:02:03.4'",
    "'0000-01-01'",
    "NULL",
]
TIMES = ["'-838:59:59'", "'838:59:59.999999'", "'00:00:00'", "'-00:00:00.000001'", "'1:2:3.4'", "'99:59:59'", "NULL"]
NUMBERS = ["0", "-1", "1", "42", "127", "-128", "NULL"]
TEXTS = ["''", "'a'", "'é€ß'", "CONVERT(x'F09F9088' USING utf8mb4)", "'x\\\\0y'", "' '", "NULL", "'12'", "'2024-01-02'"]
BYTES = ["x''", "x'00'", "x'FF'", "x'FBFCFDFEFF'", "REPEAT(x'FE', 255)", "NULL"]
# A column's type, and what is put in it.
TABLE: dict[str, list[str]] = {
    "TINYINT": NUMBERS,
    "BOOL": ["0", "1", "NULL"],
    "SMALLINT UNSIGNED ZEROFILL": ["0", "65535", "7", "NULL"],
    "MEDIUMINT": [*NUMBERS, "-8388608"],
    "INT": [*NUMBERS, "-2147483648"],
    "BIGINT": [*NUMBERS, "9223372036854775807", "-9223372036854775808"],
    "BIGINT UNSIGNED": ["0", "18446744073709551615", "9223372036854775808", "NULL"],
    "FLOAT": ["0", "-0.0", "1.5", "3.4e38", "1e-38", "NULL"],
    "DOUBLE": ["0", "-0e0", "1e300", "-1.7976931348623157e308", "0.1", "NULL"],
    "DECIMAL(65, 30)": ["0", "-99999999999999999999999999999999999.999999999999999999999999999999", "0.10", "NULL"],
    "DECIMAL(5, 0) UNSIGNED ZEROFILL": ["0", "99999", "NULL"],
    "YEAR": ["0", "1901", "2155", "NULL"],
    "DATETIME": MOMENTS,
    "DATETIME(1)": MOMENTS,
    "DATETIME(6)": MOMENTS,
    "TIMESTAMP(3) NULL": ["'2024-02-29 23:59:58.123'", "'1970-01-02 00:00:01'", "'0000-00-00'", "NULL"],
    "DATE": MOMENTS,
    "TIME": TIMES,
    "TIME(6)": TIMES,
    "CHAR(9)": TEXTS,
    "VARCHAR(99)": TEXTS,
    "VARCHAR(99) CHARACTER SET latin1": ["''", "'é€ß'", "NULL"],
    "TEXT": TEXTS,
    "LONGTEXT": TEXTS,
    "BINARY(3)": ["x''", "x'00FF'", "NULL"],
    "VARBINARY(300)": BYTES,
    "BLOB": BYTES,
    "BIT(1)": ["0", "1", "NULL"],
    "BIT(64)": ["0", "18446744073709551615", "256", "NULL"],
    "JSON": ["'{}'", "'[1, \"é€\", null]'", "NULL"],
    "GEOMETRY": ["ST_GeomFromText('POINT(1 2)')", "NULL"],
    "UUID": ["'123e4567-e89b-12d3-a456-426655440000'", "NULL"],
    "INET6": ["'2001:db8::ff00:42:8329'", "'::ffff:192.0.2.1'", "NULL"],
    "ENUM('a', 'é', '')": ["'a'", "'é'", "''", "NULL"],
    "SET('a', 'b', 'c')": ["''", "'a,c'", "NULL"],
}
LENGTHS = [*range(249, 257), *range(65533, 65539), 2**18 - 3, 2**18]
# Every border of a length, as the only column, first, in the middle and last; and rows that are none of a table.
STATEMENTS = [
    "SELECT * FROM cells",
    "SELECT * FROM cells WHERE n < 0",
    *(f"SELECT REPEAT('x', {n}), 1, REPEAT('é', {n}), NULL, REPEAT(x'FE', {n})" for n in LENGTHS),
    *(f"SELECT REPEAT('x', {n}) UNION ALL SELECT 'y'" for n in LENGTHS),
    "SELECT seq, seq * 1.5, REPEAT('€', seq MOD 90), MAKEDATE(2024, seq) + INTERVAL 1500 MICROSECOND, IF(seq MOD 3, NULL, seq) FROM seq_1_to_3000",
    "SELECT NULL FROM seq_1_to_300",
    "SELECT ''",
    "SELECT JSON_COMPACT('[\"€\"]'), CAST(1 AS UNSIGNED), TRUE, 1e10, 0.5, x'00', _latin1 x'E9', b'101'",
    "SELECT SEC_TO_TIME(-1), TIMEDIFF('10:00:00.5', '12:00'), MAKEDATE(2024, 60), CURDATE() > 0, MAKETIME(800, 0, 0)",
    "SHOW COLUMNS FROM cells",
    "SHOW VARIABLES LIKE 'max%'",
    f"SELECT {', '.join(f'{i} AS c{i}' for i in range(300))}",
]


def shout(value):
    return None if value is None else (type(value).__name__, value)


CONNECTIONS = {
    "utf8mb4": {},
    "latin1": {"charset": "latin1"},
    # bytes make no Decimal
    "no unicode": {"use_unicode": False, "conv": {**pymysql.converters.conversions, FIELD_TYPE.NEWDECIMAL: bytes}},
    "no decoders": {"conv": pymysql.converters.encoders},
    "own decoders": {
        "conv": {
            **pymysql.converters.conversions,
            FIELD_TYPE.LONG: shout,
            FIELD_TYPE.NEWDECIMAL: float,
            FIELD_TYPE.VAR_STRING: shout,
            FIELD_TYPE.BLOB: shout,
            FIELD_TYPE.JSON: shout,
            FIELD_TYPE.DATETIME: pymysql.converters.through,
            FIELD_TYPE.TIME: pymysql.converters.convert_time,
            FIELD_TYPE.DATE: shout,
        }
    },
    "odd decoders": {
        "conv": {
            **pymysql.converters.conversions,
            FIELD_TYPE.DATE: pymysql.converters.convert_datetime,
            FIELD_TYPE.TIME: pymysql.converters.convert_date,
            FIELD_TYPE.DATETIME: pymysql.converters.convert_timedelta,
            FIELD_TYPE.YEAR: decimal.Decimal,
            FIELD_TYPE.LONGLONG: float,
        }
    },
}


@contextlib.contextmanager
def connected(to, url, **more):
    parts = make_url(url)
    login = {"host": "127.0.0.1", "user": parts.username, "password": parts.password, "database": parts.database}
    connection = to(port=more.pop("port", parts.port), **login, **more)
    try:
        yield connection
    finally:
        connection.close()


@pytest.fixture
def table(mariadb_url):
    rows = max(map(len, TABLE.values()))
    with connected(pymysql.connect, mariadb_url, autocommit=True) as connection, connection.cursor() as cursor:
        cursor.execute("SET sql_mode = 'ALLOW_INVALID_DATES'")
        cursor.execute(f"CREATE TABLE cells (n INT, {', '.join(f'c{i} {kind}' for i, kind in enumerate(TABLE))})")
        for n in range(rows):
            values = ", ".join(values[n % len(values)] for values in TABLE.values())
            cursor.execute(f"INSERT IGNORE INTO cells VALUES ({n}, {values})")
    return mariadb_url


def everything(connection, statement, cursorclass=Cursor, size=None):
    with connection.cursor(cursorclass) as cursor:
        count = cursor.execute(statement)
        rows = list(cursor.fetchall()) if size is None else list(cursor.fetchmany(size))
        while size is not None and (more := cursor.fetchmany(size)):
            rows += more
        return count, cursor.description, repr(rows), cursor.rownumber, cursor.rowcount, cursor.warning_count


@pytest.mark.parametrize("how", CONNECTIONS)
def test_rows_are_those_of_stock_pymysql(table, parser, how):
    with (
        connected(pymysql.connect, table, **CONNECTIONS[how]) as stock,
        connected(Connection, table, **CONNECTIONS[how]) as ours,
    ):
        for statement in STATEMENTS:
            wanted = everything(stock, statement)
            streamed = everything(stock, statement, SSCursor)
            for _ in range(2):  # the second time its columns are known
                assert everything(ours, statement) == wanted
            assert everything(ours, statement, SSCursor) == streamed
