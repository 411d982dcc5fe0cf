"""A session's state at the server: what a connection is given at first, and how it gets that back."""

from __future__ import annotations

from typing import Any

import pymysql.cursors
from pymysql import err

from dbsession.green.mysql.connection import Connection

_COM_RESET_CONNECTION = 0x1F  # MySQL 5.7.3, MariaDB 10.2.4; PyMySQL has no name for it


def reset(connection: Connection) -> None:
    """Take back what the session has set: COM_RESET_CONNECTION, then what PyMySQL sets at connect. The connection is
    closed if it is in another database or role than at first, which that command keeps."""
    connection.command(_COM_RESET_CONNECTION)
    connection.set_character_set(connection.charset, connection.collation)
    with connection.cursor(pymysql.cursors.Cursor) as cursor:
        if connection.sql_mode is not None:
            cursor.execute("SET sql_mode = %s", (connection.sql_mode,))
        if connection.init_command is not None:
            cursor.execute(connection.init_command)
    if connection.autocommit_at_first is not None:
        connection.autocommit(connection.autocommit_at_first)
    if connection.place != _place(connection):
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
