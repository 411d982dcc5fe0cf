"""Rows of a server-side cursor that nobody reads on: the connection goes on or is closed, never read to the end."""

from __future__ import annotations

import warnings

import pymysql
import pytest
from sqlalchemy import text

from support.waiting import wait_until


@pytest.mark.parametrize("cursorclass", [pymysql.cursors.SSCursor, pymysql.cursors.SSDictCursor])
def test_stream_closed_early_keeps_the_transaction_when_it_goes_on(managed, cursorclass):
    manager = managed()
    with manager.engine().begin() as connection:
        connection.execute(text("CREATE TABLE t (n INT) ENGINE=InnoDB"))
    with manager.scope():
        session = manager.get()
        session.execute(text("INSERT INTO t VALUES (4)"))
        cursor = session.connection().connection.dbapi_connection.cursor(cursorclass)
        cursor.execute("SELECT seq FROM seq_1_to_5000")
        assert cursor.fetchone()
        cursor.close()
        assert session.scalar(text("SELECT count(*) FROM t")) == 1
        result = session.execute(text("SELECT seq FROM seq_1_to_5000"), execution_options={"stream_results": True})
        assert result.fetchone() == (1,)
        result.close()
        session.commit()
    with manager.scope():
        assert manager.get().scalar(text("SELECT count(*) FROM t")) == 1


def test_raw_connection_with_an_unread_stream_is_not_kept(managed):
    manager = managed(options={"pool_pre_ping": False})
    raw = manager.engine().raw_connection()
    cursor = raw.cursor(pymysql.cursors.SSCursor)
    cursor.execute("SELECT seq FROM seq_1_to_1000000")
    assert cursor.fetchone() == (1,)
    raw.close()
    wait_until(lambda: manager.engine().pool.checkedin() + manager.engine().pool._open == 0, 5)
    with manager.scope():
        assert manager.get().scalar(text("SELECT 7")) == 7


def test_stream_that_another_statement_cuts_short_is_warned_about(managed):
    manager = managed()
    with manager.scope():
        stream = manager.get().execute(
            text("SELECT seq FROM seq_1_to_5000"), execution_options={"stream_results": True, "max_row_buffer": 1}
        )
        stream.fetchone()
        with pytest.warns(UserWarning, match="left incomplete"):
            manager.get().execute(text("SELECT 1"))
    with manager.scope(), warnings.catch_warnings():
        warnings.simplefilter("error")
        stream = manager.get().execute(text("SELECT seq FROM seq_1_to_9"), execution_options={"stream_results": True})
        stream.close()
        manager.get().execute(text("SELECT 1"))


@pytest.mark.parametrize("detached", [False, True], ids=["pooled", "detached"])
def test_core_connection_goes_on_after_the_rollback_of_an_unread_stream(managed, detached):
    manager = managed()
    with manager.engine().connect() as connection:
        if detached:
            connection.detach()
        stream = connection.execution_options(stream_results=True).execute(text("SELECT seq FROM seq_1_to_1000000"))
        stream.fetchone()
        connection.rollback()
        assert connection.scalar(text("SELECT 7")) == 7


class OwnStream(pymysql.cursors.SSCursor):
    pass


def test_connection_goes_on_after_a_rollback_over_a_stream_of_the_users_own_cursor_class(managed):
    manager = managed(options={"connect_args": {"cursorclass": OwnStream}})
    with manager.engine().connect() as connection:
        result = connection.execute(text("SELECT seq FROM seq_1_to_100000"))
        assert result.fetchone() == (1,)
        connection.rollback()
        assert connection.execute(text("SELECT 'after'")).fetchall() == [("after",)]
