"""What a sweep asks the database itself, beside the engines that it tests: an `Admin` for each kind."""

from __future__ import annotations

import sqlite3
import threading

import pymysql

from support.innodb import INNODB_STATUS, open_transactions

TABLE = "CREATE TABLE unit (id INTEGER PRIMARY KEY {}, token VARCHAR(40), payload LONGTEXT)"


class MariaDBAdmin:
    """Lives as long as the sweep."""

    def __init__(self, url: str, root_socket: str) -> None:
        self._database = url.rpartition("/")[2]
        root = pymysql.connect(unix_socket=root_socket, user="root", autocommit=True, database=self._database)
        self._cursor = root.cursor()
        self._cursor.execute(TABLE.format("AUTO_INCREMENT"))
        self._cursor.execute("CREATE INDEX token ON unit (token)")

    def stored(self, token: str) -> int:
        """How often the row of `token` is there."""
        self._cursor.execute("SELECT COUNT(*) FROM unit WHERE token = %s", (token,))
        return int(self._cursor.fetchone()[0])

    def open_transactions(self) -> int:
        self._cursor.execute(INNODB_STATUS)
        return open_transactions(self._cursor.fetchone()[2])

    def connections(self) -> int:
        """How many there are of the database, ours aside."""
        self._cursor.execute(
            "SELECT COUNT(*) FROM information_schema.processlist WHERE db = %s AND user = 'app'", (self._database,)
        )
        return int(self._cursor.fetchone()[0])


class SQLiteAdmin:
    """The same of a file that aiosqlite opens."""

    def __init__(self, url: str) -> None:
        self._connection = sqlite3.connect(url.partition("///")[2], timeout=0, isolation_level=None)
        self._connection.execute(TABLE.format(""))

    def stored(self, token: str) -> int:
        return int(self._connection.execute("SELECT COUNT(*) FROM unit WHERE token = ?", (token,)).fetchone()[0])

    def open_transactions(self) -> int:
        """Those that write; there is at most one."""
        try:
            self._connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            return 1
        self._connection.execute("ROLLBACK")
        return 0

    def connections(self) -> int:
        """A thread each."""
        return threading.active_count() - 1
