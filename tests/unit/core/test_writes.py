"""What is known of a statement by its verb, and what is left of a write after a savepoint."""

from __future__ import annotations

import pytest
from sqlalchemy import text

from dbsession import SessionManager
from dbsession.core.backends.base import Backend
from dbsession.core.backends.mysql import MySQL
from dbsession.core.unsaved import unsaved, unsaved_write
from dbsession.core.writes import ENDS, READS, SAVEPOINT, WITH, WRITES, kind_of


@pytest.mark.parametrize(
    ("statement", "kind", "on_mysql"),
    [
        ("SELECT 1", READS, READS),
        ("  ((/* a */ select 1", READS, READS),
        ("-- why\nSHOW TABLES", READS, READS),
        ("# why\n# else\nDESC t", READS, READS),
        ("SELECT a FROM t FOR UPDATE", READS, READS),
        ("INSERT INTO t VALUES (1)", WRITES, WRITES),
        ("CALL p()", WRITES, WRITES),
        ("/**/" * 48 + "INSERT", WRITES, WRITES),
        ("/**/" * 40 + "SELECT 1", READS, READS),  # many comments take no time to speak of
        ("", WRITES, WRITES),
        ("WITH a AS (SELECT 1) SELECT 1", WITH, WITH),
        ("SAVEPOINT a", SAVEPOINT, SAVEPOINT),
        ("RELEASE SAVEPOINT a", SAVEPOINT, SAVEPOINT),
        ("ROLLBACK TO a", SAVEPOINT, SAVEPOINT),
        ("rollback work to savepoint a", SAVEPOINT, SAVEPOINT),
        ("ROLLBACK", ENDS, ENDS),
        ("COMMIT AND CHAIN", ENDS, ENDS),
        ("BEGIN", READS, ENDS),
        ("CREATE TABLE t (a INT)", WRITES, ENDS),
        ("CREATE TEMPORARY TABLE t (a INT)", WRITES, READS),
        ("create or replace temporary table t (a int)", WRITES, READS),
        ("DROP TEMPORARY TABLE t", WRITES, READS),
        ("TRUNCATE t", WRITES, ENDS),
        ("LOCK TABLES t READ", READS, ENDS),
        ("DO RELEASE_LOCK('a')", WRITES, READS),
        ("selection", WRITES, WRITES),
    ],
)
def test_statement_is_known_by_its_verb(statement, kind, on_mysql):
    assert kind_of(statement[:200], Backend) == kind and kind_of(statement[:200], MySQL) == on_mysql


@pytest.fixture
def session(tmp_path):
    manager = SessionManager({"default": f"sqlite:///{tmp_path}/a.db"})
    with manager.scope():
        session = manager.get()()
        session.execute(text("CREATE TABLE item (id INTEGER PRIMARY KEY)"))
        session.commit()
        yield session
        session.rollback()
    manager.dispose()


@pytest.mark.parametrize(
    ("statements", "left"),
    [
        (["SELECT 1"], None),
        (["INSERT INTO item VALUES (1)"], "INSERT INTO item VALUES (1)"),
        (["WITH a AS (SELECT 1 AS n) SELECT n FROM a"], None),
        (["BEGIN", "WITH a AS (SELECT 'b' AS n) SELECT REPLACE(n, 'b', 'c') FROM a /* for\nupdate */"], None),
        (["BEGIN", "WITH a AS (SELECT 1 AS n) REPLACE INTO item SELECT n FROM a"], "WITH a"),
        (["BEGIN", "WITH a AS (SELECT 1 AS n) INSERT INTO item SELECT n FROM a"], "WITH a"),
        (["WITH a AS (SELECT 1 AS n) INSERT INTO item SELECT n FROM a"], None),  # sqlite3 has begun no transaction
        (["INSERT INTO item VALUES (1)", "COMMIT"], None),
        (["INSERT INTO item VALUES (1)", "ROLLBACK"], None),
        (["CREATE TABLE other (id INTEGER)"], None),  # sqlite3 has begun no transaction
        (["SAVEPOINT a", "INSERT INTO item VALUES (1)", "ROLLBACK TO a"], None),
        (["BEGIN", "SAVEPOINT a", "INSERT INTO item VALUES (1)", "RELEASE a"], "INSERT"),
        (["SAVEPOINT a", "INSERT INTO item VALUES (1)", "RELEASE a"], None),  # SQLite's outermost: committed
        (["INSERT INTO item VALUES (1)", "SAVEPOINT a", "DELETE FROM item", "ROLLBACK TO SAVEPOINT a;"], "INSERT"),
        (["SAVEPOINT a", "SAVEPOINT b", "DELETE FROM item", "ROLLBACK TO b", "ROLLBACK TO a"], None),
        (["SAVEPOINT a", "DELETE FROM item", "SAVEPOINT b", "ROLLBACK TO b"], "DELETE"),
        (["SAVEPOINT a", "DELETE FROM item", "ROLLBACK TO a", "DELETE FROM item"], "DELETE"),
    ],
)
def test_write_that_a_rollback_would_undo_is_known(session, statements, left):
    for statement in statements:
        session.execute(text(statement))
    found = unsaved_write(session)
    assert (
        (found or "").startswith(left or "")
        and (found is None) is (left is None)
        and bool(unsaved(session)) is bool(left)
    )


def test_savepoint_of_the_session_that_was_rolled_back_leaves_no_write(session):
    with pytest.raises(ZeroDivisionError), session.begin_nested():
        session.execute(text("INSERT INTO item VALUES (1)"))
        raise ZeroDivisionError
    assert unsaved_write(session) is None
    with session.begin_nested():
        session.execute(text("INSERT INTO item VALUES (2)"))
    assert unsaved_write(session) is not None
