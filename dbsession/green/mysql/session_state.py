"""A session's state at the server: what a connection is given at first, and how it gets that back."""

from __future__ import annotations

from typing import Any

import pymysql.cursors
from pymysql import err

from dbsession.core.backends.mysql_sent import RESET_CONNECTION
from dbsession.green.mysql.connection import Connection


def reset(connection: Connection) -> None:
    """Take back what the session has set: COM_RESET_CONNECTION, then whatever was set as it was opened, by PyMySQL,
    SQLAlchemy, us or a `connect` listener of the user's. The connection is closed where that is not enough: it has
    another role than at first, or another database and had none."""
    sent = connection.sent
    moved = sent.moved and connection.place is None
    if sent.settings is None or sent.unsettable or (moved and not connection.db):
        connection.close()
        return
    before = sent.count
    connection.command(RESET_CONNECTION)
    sent.ended(before)
    if moved:
        connection.select_db(connection.db)
    if (connection.charset, connection.collation) != connection.charset_at_first:  # by PyMySQL's own method
        connection.set_character_set(*connection.charset_at_first)
    init = connection.init_command
    init = init.encode(connection.encoding) if isinstance(init, str) else init
    if init is not None and init not in sent.settings.values():
        connection.query(init)
    for statement in list(sent.settings.values()):
        connection.query(statement)
    if sent.mode_at_first is not None:
        connection.autocommit(sent.mode_at_first)
    if connection.place is not None and connection.place != _place(connection):
        connection.close()


def note_place(connection: Connection) -> None:
    """Remember the current database and role, before the first reset()."""
    connection.place = _place(connection)
    connection.used = False


def _place(connection: Connection) -> Any:
    with connection.cursor(pymysql.cursors.Cursor) as cursor:
        try:
            cursor.execute("SELECT DATABASE(), CURRENT_ROLE()")
        except err.DatabaseError:  # a server without roles
            cursor.execute("SELECT DATABASE()")
        return cursor.fetchone()
