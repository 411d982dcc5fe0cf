"""dbsession.green.mysql.rows, columns and parser: rows are those of stock PyMySQL by type and repr, whoever reads them,
however they come, and whatever comes in between."""

from __future__ import annotations

import contextlib
import decimal
import struct
import types

import pymysql
import pytest
from pymysql.constants import FIELD_TYPE
from pymysql.cursors import Cursor, DictCursor, SSCursor, SSDictCursor
from pymysql.protocol import MysqlPacket

from dbsession.green.mysql import columns
from dbsession.green.mysql.connection import Connection
from dbsession.green.mysql.results import Result
from support.mariadb import connected

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
    "SELECT seq, seq * 1.5, REPEAT('€', seq MOD 90), "
    "MAKEDATE(2024, seq) + INTERVAL 1500 MICROSECOND, IF(seq MOD 3, NULL, seq) FROM seq_1_to_3000",
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


@pytest.fixture(scope="module")
def url(mariadb):
    """The URL of a database that has the table `cells`."""
    url = mariadb.create_database("test_rows")
    rows = max(map(len, TABLE.values()))
    with connected(pymysql.connect, url, autocommit=True) as connection, connection.cursor() as cursor:
        cursor.execute("SET sql_mode = 'ALLOW_INVALID_DATES'")
        cursor.execute(f"CREATE TABLE cells (n INT, {', '.join(f'c{i} {kind}' for i, kind in enumerate(TABLE))})")
        for n in range(rows):
            values = ", ".join(values[n % len(values)] for values in TABLE.values())
            cursor.execute(f"INSERT IGNORE INTO cells VALUES ({n}, {values})")
    yield url
    mariadb.drop_database("test_rows")


def everything(connection, statement, cursorclass=Cursor, size=None):
    with connection.cursor(cursorclass) as cursor:
        count = cursor.execute(statement)
        rows = list(cursor.fetchall()) if size is None else list(cursor.fetchmany(size))
        while size is not None and (more := cursor.fetchmany(size)):
            rows += more
        return count, cursor.description, repr(rows), cursor.rownumber, cursor.rowcount, cursor.warning_count


SLOW = ("no unicode", "no decoders", "odd decoders")


@pytest.mark.parametrize(
    "how", [pytest.param(how, marks=pytest.mark.slow if how in SLOW else ()) for how in CONNECTIONS]
)
def test_rows_are_those_of_stock_pymysql(url, parser, how):
    with (
        connected(pymysql.connect, url, **CONNECTIONS[how]) as stock,
        connected(Connection, url, **CONNECTIONS[how]) as ours,
    ):
        for statement in STATEMENTS:
            wanted = everything(stock, statement)
            streamed = everything(stock, statement, SSCursor)
            for _ in range(2):  # the second time its columns are known
                assert everything(ours, statement) == wanted
            assert everything(ours, statement, SSCursor) == streamed


@pytest.mark.parametrize("cursorclass", [DictCursor, SSDictCursor])
def test_rows_of_dict_cursors_are_those_of_stock_pymysql(url, parser, cursorclass):
    with connected(pymysql.connect, url) as stock, connected(Connection, url) as ours:
        for statement in STATEMENTS[:2] * 2:
            assert everything(ours, statement, cursorclass) == everything(stock, statement, cursorclass)


@pytest.mark.parametrize("size", [1, 7, 3000, 5000])
def test_streams_rows_are_those_of_stock_pymysql_in_whatever_numbers_they_are_fetched(url, parser, size):
    statement = "SELECT seq, REPEAT('x', seq MOD 100) FROM seq_1_to_3000"
    with connected(pymysql.connect, url) as stock, connected(Connection, url) as ours:
        for _ in range(2):
            assert everything(ours, statement, SSCursor, size) == everything(stock, statement, SSCursor, size)
        answers = []
        for connection in (stock, ours):
            with connection.cursor(SSCursor) as cursor:
                cursor.execute(statement)
                got = [cursor.fetchone(), cursor.fetchmany(2), cursor.fetchmany(0), cursor.fetchmany()]
                cursor.scroll(10)
                got += [cursor.fetchone(), len(cursor.fetchall()), cursor.fetchone(), cursor.fetchmany(3)]
                answers.append(got)
        assert answers[0] == answers[1]


def test_nearly_all_rows_are_read_without_a_packet(url, parser, monkeypatch):
    """Else the tests above would compare PyMySQL with itself."""
    read_by_pymysql = []
    stock = pymysql.connections.MySQLResult._read_row_from_packet

    def noted(result, packet):
        read_by_pymysql.append(packet)
        return stock(result, packet)

    monkeypatch.setattr(pymysql.connections.MySQLResult, "_read_row_from_packet", noted)
    with connected(Connection, url) as connection:
        for cursorclass in (Cursor, SSCursor):
            everything(connection, "SELECT seq, NOW(), 'text' FROM seq_1_to_3000", cursorclass)
    assert len(read_by_pymysql) < 20


def test_function_is_made_for_columns_that_many_rows_have(url, parser, monkeypatch):
    """In Python: making it takes as long as reading a hundred rows."""
    made = []
    generated = columns.generated

    def noted(types, found):
        made.append(types)
        return generated(types, found)

    monkeypatch.setattr(columns, "generated", noted)
    monkeypatch.setattr(columns, "WORTH_IT", 50)
    with connected(Connection, url) as connection:
        for _ in range(20):
            assert everything(connection, "SELECT 1, 'a'")[2] == "[(1, 'a')]"
        assert not made
        for cursorclass in (Cursor, SSCursor):
            for _ in range(2):
                rows = everything(connection, "SELECT seq, 'a' FROM seq_1_to_1000", cursorclass)[2]
                assert rows == repr([(n, "a") for n in range(1, 1001)])
    assert len(made) == (parser == "python")


# -- in whatever pieces they come ----------------------------------------------------------------------------


class Pieces:
    """A connection's file, which gives what was received in two pieces: up to `border`, and the rest."""

    def __init__(self, data, border):
        self._pieces = [data[:border], data[border:]]

    def read1(self, size):
        piece = next((each for each in self._pieces if each), b"")
        self._pieces = [piece[size:], *self._pieces[self._pieces.index(piece) + 1 :]] if piece else []
        return piece[:size]

    def close(self):
        pass


@contextlib.contextmanager
def replaying(data, border):
    """A connection that receives `data` in answer to a statement that nobody gets."""
    connection = Connection(host="127.0.0.1", defer_connect=True)
    connection._epoch = columns.fork.epoch
    connection._sock, connection._rfile = types.SimpleNamespace(close=lambda: None), Pieces(data, border)
    connection._current_timeout, connection.server_status = None, 0
    connection._write_bytes = lambda sent: None
    yield connection
    connection._sock = connection._rfile = None


def replayed(data, border, cursorclass):
    """Return what a cursor makes of `data`."""
    got = []
    with replaying(data, border) as connection:
        with connection.cursor(cursorclass) as cursor:
            try:
                cursor.execute("SELECT")
                got.append(cursor.description)
                while (row := cursor.fetchone()) is not None:
                    got.append(row)
                got += [cursor.warning_count, connection.server_status, connection._result.has_next]
            except pymysql.MySQLError as error:
                got.append(repr(error))
        got.append(connection.open)
    return got


def packets(*payloads, first=1):
    return b"".join(len(each).to_bytes(3, "little") + bytes([n % 256]) + each for n, each in enumerate(payloads, first))


def column(name, kind, charset=45):
    names = b"".join(bytes([len(each)]) + each for each in (b"def", b"", b"", b"", name, b""))
    return names + b"\x0c" + charset.to_bytes(2, "little") + b"\xff\0\0\0" + bytes([kind]) + b"\0\0\0\0\0"


DESCRIBED = [
    b"\x03",
    column(b"n", FIELD_TYPE.LONG, 63),
    column(b"s", FIELD_TYPE.VAR_STRING),
    column(b"d", FIELD_TYPE.DATETIME, 63),
    b"\xfe\0\0\x02\0",
]
ROWS = [b"\x011\x02\xc3\xa9\x132024-01-02 03:04:05", b"\xfb\xfb\xfb", b"\x02-7\0\x130000-00-00 00:00:00"]
ENDS = {
    "eof": b"\xfe\x02\0\x23\0",
    "error": b"\xff" + (1317).to_bytes(2, "little") + b"#70100Query execution was interrupted",
}
# What no server sends, but in the middle of other rows: PyMySQL decides what it is.
ODD_ROWS = {
    "short": b"\x011",
    "long": b"\x011\x01a\xfb\x01b",
    "cut": b"\x011\x09a",
    "cut before a header": b"\x011\x05a",
    "no length": b"\xfa",
    "no number": b"\x01x\x01a\xfb",
    "no text": b"\x011\x01\xff\xfb",
    "no marker": b"\x011\xff\xfb",
    "wide": b"\x011\xfe\x01\0\0\0\0\0\0\0a\xfb",
    "empty": b"",
}


@pytest.mark.parametrize("cursorclass", [Cursor, SSCursor])
@pytest.mark.parametrize("end", ENDS)
def test_answers_are_the_same_wherever_they_are_cut_in_two(parser, end, cursorclass):
    data = packets(*DESCRIBED, *ROWS * 90, ENDS[end])  # the packets' numbers begin anew
    whole = replayed(data, len(data), cursorclass)
    assert len(whole) == {"eof": 275, "error": 273 if cursorclass is SSCursor else 2}[end]
    few = packets(*DESCRIBED, *ROWS, ENDS[end])
    wanted = replayed(few, len(few), cursorclass)
    for border in range(len(few) + 1):
        assert replayed(few, border, cursorclass) == wanted, border
    for border in range(0, len(data), 71):
        assert replayed(data, border, cursorclass) == whole, border


@pytest.mark.parametrize("cursorclass", [Cursor, SSCursor])
@pytest.mark.parametrize("what", ODD_ROWS)
def test_rows_that_no_server_sends_are_what_they_are_to_stock_pymysql(parser, monkeypatch, what, cursorclass):
    data = packets(*DESCRIBED, *ROWS, ODD_ROWS[what], ROWS[1], *ROWS, ENDS["eof"])

    def read():
        try:
            return replayed(data, len(data), cursorclass)
        except Exception as error:
            return repr(error)

    ours = [read(), read()]
    monkeypatch.setattr(columns.Columns, "take", lambda *_: None)
    assert ours == [read()] * 2


def test_answer_that_ends_early_is_an_error(parser):
    data = packets(*DESCRIBED, *ROWS)
    for border in (1, len(data) - 1, len(data)):
        for cursorclass in (Cursor, SSCursor):
            *_, error, still_open = replayed(data, border, cursorclass)
            assert "Lost connection" in error and not still_open


def test_packet_out_of_turn_in_the_middle_of_rows_is_an_error(parser):
    data = packets(*DESCRIBED, *ROWS) + packets(ROWS[1], first=11) + packets(*ROWS, ENDS["eof"], first=10)
    for cursorclass in (Cursor, SSCursor):
        *_, error, still_open = replayed(data, len(data), cursorclass)
        assert "sequence number wrong" in error and not still_open


def test_known_columns_out_of_turn_are_an_error(parser):
    data = packets(*DESCRIBED, ROWS[1], b"\xfe\0\0\x0a\0")  # there are more results
    data += packets(DESCRIBED[0], first=8)
    data += packets(*DESCRIBED[1:-1], first=2)
    data += packets(DESCRIBED[-1], ROWS[1], ENDS["eof"], first=12)
    with replaying(data, len(data)) as connection:
        cursor = connection.cursor()
        cursor.execute("SELECT")
        assert cursor.fetchall() == ((None, None, None),)
        with pytest.raises(pymysql.InternalError, match="sequence number wrong"):
            cursor.nextset()


def length_encoded(number):
    for most, head, size in ((250, b"", 1), (2**16 - 1, b"\xfc", 2), (2**24 - 1, b"\xfd", 3), (2**64 - 1, b"\xfe", 8)):
        if number <= most:
            return head + number.to_bytes(size, "little")
    raise ValueError(number)


@pytest.mark.parametrize("number", [0, 1, 250, 251, 255, 256, 2**16 - 1, 2**16, 2**24 - 1, 2**24, 2**64 - 1])
@pytest.mark.parametrize("message", [b"", b"Rows matched: 1"])
def test_an_ok_packet_of_a_statement_is_read_as_by_pymysql(number, message):
    numbers = length_encoded(number) + length_encoded(2**64 - 1 - number)
    data = b"\0" + numbers + struct.pack("<HH", 0x800A, 40_000) + message
    ours, stock = Result(None), pymysql.connections.MySQLResult(None)
    for each in (ours, stock):
        each._read_ok_packet(MysqlPacket(data, "utf8"))
    assert vars(ours) == vars(stock) and ours.affected_rows == number and ours.has_next


def test_a_description_that_seems_to_end_within_is_read_by_pymysql_and_not_remembered(monkeypatch):
    monkeypatch.setattr(columns, "_known", {})
    head = struct.Struct("<IB")
    seeming, end = (head.pack(5 | 2 << 24, 0xFE) + b"\0\0\2\0" for _ in range(2))
    packet = b"name" + seeming + b"rest"
    data = (len(packet) | 1 << 24).to_bytes(4, "little") + packet + end
    wire = types.SimpleNamespace(_ahead=data, _at=0, _next_seq_id=1, _epoch=columns.fork.epoch, encoding="utf8")
    wire.use_unicode, wire.decoders = True, {}
    read = types.SimpleNamespace(fields=[])

    def stock():
        wire._at = len(data)
        return read

    assert columns.columns(wire, 1, stock) is read and not columns._known
    whole = data.replace(seeming, b"", 1)
    wire._ahead, wire._at = whole, 0

    def stock_of_whole():
        wire._at = len(whole)
        return read

    assert columns.columns(wire, 1, stock_of_whole) is read and len(columns._known) == 1
