"""mysql_sent: what the text of a statement tells of a transaction and of the session."""

from __future__ import annotations

import time

import pytest

from dbsession.core.backends.mysql_sent import (
    EXECUTE,
    INIT_DB,
    PING,
    PREPARE,
    QUERY,
    SET_OPTION,
    Sent,
    sets_autocommit_on,
)


class Driver:
    told_autocommit = False


def used(several=False, autocommit=None):
    """Of a connection whose user has it, in no transaction, and in the `autocommit` mode that we have set."""
    sent = Sent(several)
    if autocommit is not None:
        before = sent.count
        sent.command(QUERY, "SET AUTOCOMMIT = 1")
        sent.autocommit_set(autocommit, before, told=autocommit)
    sent.taken(Driver())
    before = sent.count
    sent.command(QUERY, "COMMIT")
    sent.ended(before)
    assert sent.ended_at == sent.count
    return sent


READS = [
    "SELECT 1",
    "  select 'SET autocommit = 0'",
    "/* a */ (SELECT 1)",
    "-- a\nINSERT INTO t VALUES (1)",
    "WITH a AS (SELECT 1) SELECT 1",
]
BEGINS = [
    "BEGIN",
    "/*! BEGIN */",
    "SELECT 1 /*M!100000 */",
    "CALL p()",
    "SET autocommit = 0",
    "XA START 'a'",
    "",
    "SELEC",
]


@pytest.mark.parametrize("text", READS)
def test_only_in_autocommit_that_was_set_by_us_a_whole_statement_leaves_nothing_open(text):
    for mode in (None, False, True):
        sent = used(autocommit=mode)
        sent.command(QUERY, text.encode())
        assert (sent.ended_at == sent.count) == (mode is True)


@pytest.mark.parametrize("text", BEGINS)
def test_what_may_begin_a_transaction_leaves_it_open_in_autocommit_too(text):
    sent = used(autocommit=True)
    sent.command(QUERY, text.encode())
    assert sent.ended_at != sent.count


def test_several_statements_in_one_text_are_believed_only_where_the_server_takes_none():
    for several in (True, False):
        sent = used(several, autocommit=True)
        sent.command(QUERY, b"SELECT 1; BEGIN")
        assert (sent.ended_at == sent.count) is not several
    sent.command(SET_OPTION, b"\0\0")
    sent.command(QUERY, b"SELECT 1; SET @a = 1")
    assert sent.changed


def test_ping_changes_nothing_and_what_was_sent_meanwhile_leaves_the_end_unknown():
    sent = used()
    sent.command(PING, "")
    assert sent.ended_at == sent.count
    before = sent.count
    sent.command(QUERY, "COMMIT")
    sent.command(QUERY, b"INSERT INTO t VALUES (1)")
    sent.ended(before)
    assert sent.ended_at != sent.count


CHANGES = [
    *("SET @a = 1", "set names latin1", "SET@@time_zone='+01:00'", "/*!40101 SET NAMES utf8 */", "/* x */ USE b"),
    *(
        "LOCK TABLES t READ",
        "FLUSH TABLES WITH READ LOCK",
        "PREPARE s FROM 'SELECT 1'",
        "EXECUTE IMMEDIATE 'SET @a = 1'",
    ),
    *("create or replace temporary table t (n INT)", "HANDLER t OPEN", "SELECT GET_LOCK('a', 1)", "SELECT @a := 1"),
    *(
        "SELECT 1 INTO @a",
        "SELECT 1 INTO/**/@a",
        "SELECT 1 INTO -- x\n@a",
        "DO get_lock('a', 1)",
        "BEGIN NOT ATOMIC SET @a = 1; END",
        "(SELECT 1 INTO @a)",
        "SET ROLE r",
    ),
]
KEEPS = [
    *("SELECT 1", "INSERT INTO t VALUES ('; SET @a = 1')", "UPDATE t SET n = 1", "SET TRANSACTION READ ONLY"),
    *("SET STATEMENT max_statement_time = 1 FOR SELECT 1", "CREATE TABLE t (n INT)", "BEGIN", "COMMIT", "SAVEPOINT a"),
    *("SELECT n INTO OUTFILE 'x' FROM t", "SELECT 'set' FROM lock_tables", "settle", "CALL p()", "UNLOCK TABLES"),
]


@pytest.mark.parametrize(("texts", "changed"), [(CHANGES, True), (KEEPS, False)])
def test_change_of_the_session_is_seen_by_the_text(texts, changed):
    for text in texts:
        sent = used()
        sent.command(QUERY, text.encode())
        assert sent.changed is changed, text


def test_what_is_set_while_it_is_opened_is_kept_to_be_set_again_and_not_taken_back():
    sent = Sent(several=False)
    for text in ("SET NAMES utf8mb4", "SET @a = 1", "SELECT 1", "SET autocommit = 0", "SET @a = 2"):
        sent.command(QUERY, text)
    assert list(sent.settings.values()) == [b"SET NAMES utf8mb4", b"SET @a = 2"] and not sent.changed
    for number in range(60):
        sent.command(QUERY, f"USE tenant_{number}")
        sent.command(QUERY, f"SET ROLE tenant_{number}")
    sent.command(INIT_DB, "a`b")
    assert list(sent.settings.values())[2:] == [b"USE `a``b`", b"SET ROLE tenant_59"]
    for number in range(60):
        sent.command(QUERY, f"SET @a{number} = 1")
    assert sent.settings is None  # too much to be done again


def test_other_commands_are_seen_too():
    sent = used()
    sent.command(INIT_DB, "other")
    assert sent.changed and sent.moved
    sent = used(autocommit=True)
    sent.command(PREPARE, b"SELECT ?")
    sent.command(EXECUTE, b"")
    assert sent.autocommit and sent.ended_at != sent.count
    sent.command(PREPARE, b"SET autocommit = ?")
    sent.command(EXECUTE, b"")
    assert sent.autocommit is None and sent.changed


@pytest.mark.parametrize("text", ["SET autocommit=1", "set session autocommit = ON;", "SET @@local.autocommit := true"])
def test_mode_that_a_text_sets_is_believed_until_the_server_changes_its_word(text):
    sent = used(autocommit=False)
    for told in (False, True):  # what a server that lies says is always the same
        sent.command(QUERY, text.encode())
        assert sent.autocommits(told) and sent.autocommits(told) and sent.kept
        assert sent.autocommits(not told) is not told
    assert sets_autocommit_on(text) and not sets_autocommit_on("SET autocommit = 0")


def changed(text, several=True):
    sent = used(several)
    sent.command(QUERY, text)
    return sent.changed


@pytest.mark.parametrize(
    "text",
    [
        "SELECT 1; SET @a = 1",
        "SELECT 1;;\n (set @a = 1)",
        "SELECT 1; /* why */ -- so\n\tset @a = 1",
        "SELECT 1; # why\nUSE other",
        "SELECT 1; /* a */ /* b */ LOCK TABLES t READ",
        "SELECT ';/*'; SET @a = 1",
        "INSERT INTO t VALUES (';'); CREATE OR REPLACE TEMPORARY TABLE u (n INT)",
        "/*!50000 SET @a = 1 */",
        "SELECT 1 /*! ; */ ; /*M!100100 SET @a = 1 */",
    ],
)
def test_text_changes_the_session_when_a_later_statement_does(text):
    assert changed(text)


@pytest.mark.parametrize(
    "text",
    [
        "SELECT 1; SELECT 2",
        "UPDATE t SET a = ';'",
        "UPDATE t\nSET a = ';'\nWHERE n = 1",
        "INSERT INTO t VALUES (';')",
        "SELECT 1; SET TRANSACTION READ ONLY",
    ],
)
def test_text_leaves_the_session_when_no_statement_changes_it(text):
    assert not changed(text)


@pytest.mark.parametrize("several", [True, False])
@pytest.mark.parametrize("unit", [";", "; ", "/*!", ";/*", ";--\n", "\n", "/*! ("])
def test_text_is_looked_at_once_when_somebody_has_uploaded_separators(unit, several):
    began = time.monotonic()
    changed("INSERT INTO t VALUES ('/*! " + unit * 40_000 + "')", several)
    assert time.monotonic() - began < 5
