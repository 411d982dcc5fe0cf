"""psycopg_cursors: what a cursor tells of its columns, whoever looks and whenever."""

from __future__ import annotations

import psycopg
import pytest

import dbsession

pytestmark = pytest.mark.postgresql


def test_description_is_that_of_psycopg_and_of_its_own_result(postgresql_url):
    """It is made late, when the cursor may have another result already."""
    statement = "SELECT 1 AS n, 'x'::varchar(7) AS s, 1.5::numeric(4, 2) AS d"
    with psycopg.connect(postgresql_url.replace("+psycopg", "")) as stock:
        expected = stock.execute(statement).description
    manager = dbsession.SessionManager({"default": postgresql_url})
    raw = manager.engine("default").raw_connection()
    try:
        cursor = raw.cursor()
        assert cursor.description is None
        cursor.execute(statement)
        description = cursor.description
        cursor.execute("SELECT 2 AS other")
        assert [tuple(column) for column in description] == [tuple(column) for column in expected]
        assert len(description) == 3 and description[1].name == "s" and description == description
        assert [column.name for column in cursor.description[:1]] == ["other"]
        cursor.execute("SELECT")
        assert list(cursor.description) == []
        cursor.execute("SET application_name = 'x'")
        assert cursor.description is None
    finally:
        raw.close()
        manager.dispose()


def test_psycopgs_columns_ask_their_cursor_for_its_encoding_result_and_adapters(postgresql):
    """What `Columns` has in a cursor's place; private in part."""
    with postgresql.root() as cursor:
        cursor.execute("SELECT 1 AS n")
        asked = type("Asked", (), {name: getattr(cursor, name) for name in ("_encoding", "pgresult", "adapters")})
        assert psycopg.Column(asked(), 0).name == "n"
