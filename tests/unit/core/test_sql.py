"""How people see a statement: without the values written into its text."""

from __future__ import annotations

import random

import pytest

from dbsession.core.sql import STATEMENT_CHARS, masked

EVERY = ("mysql", "mariadb", "sqlite", "postgresql", "mssql", "oracle")


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize(
    "statement",
    [
        "SELECT 'secret'",
        "SELECT 'it''s secret'",
        "SELECT '', 'secret'",
        "SELECT '''', 'secret'",
        "SELECT '\nsecret\n'",
        "SELECT 'secret",
        "SELECT 'secret\\",
        "SELECT 'a\\\\', 'secret'",
        # A backslash before a quote: the end of a text, or not, as the server's settings say.
        "SELECT 'a\\', 'secret'",
        "SELECT 'a\\' secret'",
        "SELECT 'a\\\\\\' secret', 'b'",
        "SELECT 1 /* it's */ + 'secret'",
        "SELECT 1 /* secret */",
        "SELECT 1 /* secret",
        "SELECT 1 /* a /* b */ it's */ WHERE x = 'secret'",
        "SELECT 1 -- it's\n, 'secret'",
        "SELECT 1 -- it's\r\n, 'secret'",
        "SELECT 1 -- secret",
        "SELECT 1 --\n, 'of two\nsecret lines'",
        "SELECT x'secret', N'secret', _utf8'secret', E'secret', U&'secret'",
    ],
)
def test_text_is_not_shown(backend, statement):
    assert "secret" not in masked(statement, backend)


@pytest.mark.parametrize(
    "backend, statement",
    [
        *[(backend, 'SELECT "secret", "a""secret"') for backend in ("mysql", "mariadb", "sqlite", "mssql")],
        *[(backend, 'SELECT "a\\", "secret"') for backend in ("mysql", "sqlite")],
        ("mysql", "SELECT 1 # it's\n, 'secret'"),
        ("mysql", "SELECT `it's`, 'secret'"),
        ("mysql", "SELECT 5--'secret'"),  # two minus signs: a comment needs white space after them
        ("mysql", "SELECT 1 --\x01it's\n, 'secret'"),
        ("sqlite", "SELECT [it's], 'secret'"),
        ("sqlite", "SELECT 1 --it's\n, 'secret'"),
        ("sqlite", "SELECT `it's`, 'secret'"),
        ("postgresql", "SELECT \"it's\", 'secret'"),
        ("postgresql", "SELECT 1 --it's\n, 'secret'"),
        ("postgresql", "SELECT 1 --it's\r, 'secret'"),
        ("postgresql", "SELECT $$it's secret$$"),
        ("postgresql", "SELECT $a$ $b$ secret $a$"),
        ("postgresql", "SELECT $a$ secret"),
        ("postgresql", "SELECT $$x$$, $$secret$$"),
        ("postgresql", "SELECT ARRAY['secret']"),
        ("oracle", "SELECT q'[it's secret]' FROM dual"),
    ],
)
def test_text_is_not_shown_in_what_only_one_backend_has(backend, statement):
    assert "secret" not in masked(statement, backend)


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize(
    "number",
    [
        *("4711", "-4711", "47.11", ".4711", "4711.", "4711e5", "4.7e-11", "0x4711", "0b1011", "0o4711"),
        "4_711",
        "4711E+5",
    ],
)
def test_number_is_not_shown(backend, number):
    shown = masked(f"SELECT t1.c2, {number},x=({number}) WHERE id={number} AND id%{number} = 1 LIMIT {number}", backend)
    assert not set(shown.replace("t1.c2", "").replace("= 1", "")) & set("0123456789"), shown


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("statement", ["SELECT 1", "SELECT SLEEP(5)", "SELECT a FROM t LIMIT 9 OFFSET 5"])
def test_number_of_one_digit_stays(backend, statement):
    assert masked(statement, backend) == statement


@pytest.mark.parametrize("backend", EVERY)
def test_number_is_not_shown_when_letters_follow_it(backend):
    shown = masked("SELECT * FROM t WHERE a=4711AND b=0x4711OR c[471:4711] LIMIT 4711OFFSET 4711.5x", backend)
    assert not set(shown) & set("0123456789"), shown


@pytest.mark.parametrize("backend", EVERY)
def test_names_and_parameters_stay(backend):
    statement = "SELECT t1.c2, utf8mb4_x FROM a_1 WHERE b = %s AND c = %(p_1)s AND d = :p_2 AND e = ? AND f = :3 AND $4"
    assert masked(statement, backend) == statement


@pytest.mark.parametrize(
    "backend, name", [("mysql", "`it's 5`"), ("sqlite", "`it's 5`"), ("sqlite", "[order]"), ("postgresql", '"it\'s 5"')]
)
def test_quoted_name_stays(backend, name):
    assert masked(f"SELECT {name} FROM t WHERE a = 'secret'", backend) == f"SELECT {name} FROM t WHERE a = ?"


def test_statement_is_on_one_line_and_cut():
    assert masked("SELECT a,\n\t  b\r\nFROM t", "mysql") == "SELECT a, b FROM t"
    exact = "SELECT " + "a" * (STATEMENT_CHARS - 7)
    assert masked(exact, "mysql") == exact
    assert masked(exact + "b", "mysql") == exact[:-1] + "…"
    assert len(masked("SELECT 'secret', " * 100_000, "mysql")) == STATEMENT_CHARS


def test_value_is_not_shown_when_the_part_that_is_read_ends_in_it():
    for before in range(4080, 4100):
        statement = "/*" + "x" * (before - 4) + "*/'secret'"
        assert "secret" not in masked(statement, "mysql") and masked(statement, "postgresql") in ("?", "")


def test_masking_takes_no_longer_than_its_length_asks_for_whatever_the_text():
    """A pattern that tries again from each place would not come to an end for some of these."""
    pieces = [
        "'",
        '"',
        "\\",
        "/*",
        "*/",
        "--",
        "#",
        "`",
        "[",
        "]",
        "$",
        "$a$",
        "1",
        "1_",
        "0x",
        ".",
        "e",
        "a",
        "q'",
        "\n",
    ]
    rng = random.Random(5)
    texts = [piece * 5000 for piece in pieces] + ["1" * 4000 + "a", "1_" * 2000 + "a"]
    texts += ["".join(rng.choices(rng.sample(pieces, 3), k=4000)) for _ in range(200)]
    for text in texts:
        for backend in ("mysql", "sqlite", "postgresql"):
            assert len(masked(text, backend)) <= STATEMENT_CHARS
