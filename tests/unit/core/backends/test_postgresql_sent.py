"""postgresql_sent: a text that changes its session is seen, and one that does not costs no reset."""

from __future__ import annotations

from time import process_time

import pytest

from dbsession.core.backends import postgresql_sent
from dbsession.core.backends.postgresql_sent import Sent, kind_of
from dbsession.core.connection_info import USED

CHANGES = [
    "SET statement_timeout = 1",
    "  set session time zone 'UTC'",
    "/* why */ SET search_path TO shop",
    "-- why\nSET role reader",
    "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY",
    "RESET ALL",
    "LISTEN orders",
    "UNLISTEN *",
    "PREPARE p AS SELECT 1",
    "DEALLOCATE p",
    "DISCARD TEMP",
    "LOAD 'auto_explain'",
    "CREATE TEMP TABLE t (id int)",
    "create local temporary table t as select 1",
    "CREATE OR REPLACE TEMP VIEW v AS SELECT 1",
    "CREATE TABLE pg_temp.t (id int)",
    "SELECT 1 INTO TEMP t",
    "WITH a AS (SELECT 1) SELECT * INTO TEMPORARY t FROM a",
    "DECLARE c CURSOR WITH HOLD FOR SELECT 1",
    "DO $$ BEGIN PERFORM 1; END $$",
    "CALL something()",
    "SELECT set_config('app.user', %s, false)",
    "SELECT pg_catalog.\"set_config\" ('a.b', 'c', false)",
    "WITH a AS (SELECT pg_advisory_lock(7)) SELECT * FROM a",
    "SELECT pg_try_advisory_lock_shared(1)",
    "SELECT 1; SET x.y = 1",
    "EXPLAIN ANALYZE SELECT set_config('a.b', 'c', false)",
]
CHANGES_NOTHING = [
    "SELECT id FROM t WHERE name = 'x'",
    "INSERT INTO settings (a) VALUES (%s)",
    "UPDATE t SET a = 1",
    "SET LOCAL statement_timeout = 1",
    "SET TRANSACTION ISOLATION LEVEL SERIALIZABLE",
    "SET CONSTRAINTS ALL DEFERRED",
    "PREPARE TRANSACTION 'a'",
    "CREATE TABLE t (id int)",
    "DECLARE c CURSOR FOR SELECT 1",
    "SELECT pg_advisory_xact_lock(7)",
    "SELECT 1 INTO t",
    "NOTIFY orders",
    "SAVEPOINT a",
    "SELECT offset_config(1)",
]


@pytest.mark.parametrize("text", CHANGES)
def test_text_that_changes_the_session_is_seen(text):
    assert kind_of(text.encode()).changes


@pytest.mark.parametrize("text", CHANGES_NOTHING)
def test_text_that_changes_nothing_of_the_session_costs_no_reset(text):
    assert not kind_of(text.encode()).changes


@pytest.mark.parametrize("text", ["BEGIN", " start transaction read only", "/* a */ begin"])
def test_begin_of_the_users_own_is_seen(text):
    assert kind_of(text.encode()).begins


@pytest.mark.parametrize(
    ("text", "rows_only"),
    [
        ("SELECT 1", True),
        ("with a as (select 1) select * from a", True),
        ("INSERT INTO t VALUES (1)", True),
        ("SAVEPOINT a", True),
        ("CREATE TABLE t (id int)", False),
        ("ALTER TABLE t ADD b int", False),
        ("DROP TABLE t", False),
        ("SELECT 1; DROP TABLE t", False),
    ],
)
def test_only_what_makes_or_drops_nothing_keeps_prepared_statements_over_a_rollback(text, rows_only):
    assert kind_of(text.encode()).rows_only is rows_only


@pytest.mark.parametrize("line", [b";\nSELECT a, b FROM t WHERE c = 'd'", b"\n" + b"(" * 10, b"/* a", b"\n \n;;"])
def test_long_text_is_looked_through_in_the_time_of_its_length(line):
    began = process_time()
    assert not kind_of(b"SELECT 1;" + line * 10_000).changes  # 90 s of them, where each line is looked at to the end
    assert process_time() - began < 10


def test_long_texts_are_not_kept():
    before = postgresql_sent._known.cache_info().currsize
    for number in range(3):
        assert kind_of(b"SELECT %d, '%s'" % (number, b"x" * 5_000)).rows_only
    assert postgresql_sent._known.cache_info().currsize == before


@pytest.mark.parametrize(("text", "copies"), [("COPY t TO STDOUT", True), ("-- a\n(copy t", True), ("SELECT 1", False)])
def test_copy_is_seen(text, copies):
    assert kind_of(text.encode()).copies is copies


def test_what_is_set_while_opening_is_kept_and_what_the_user_sets_is_a_change():
    sent = Sent()
    for text in (b"SET a.b = 1", b"SET a.c = 2", b"SET a.b = 1"):
        sent.note_change(text)
    assert sent.settings == [b"SET a.c = 2", b"SET a.b = 1"] and not sent.changed  # in their last order
    sent.taken(None)
    assert sent.phase is USED
    sent.note_change(b"SET a.d = 3")
    assert sent.changed and len(sent.settings) == 2
    sent.returned()
    assert not sent.changed and len(sent.settings) == 2


def test_more_settings_than_can_be_done_again_are_not_kept():
    sent = Sent()
    for number in range(60):
        sent.note_change(f"SET a.b{number} = 1".encode())
    assert sent.settings is None
