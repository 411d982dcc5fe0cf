"""What a sweep asks the database itself, beside the engines that it tests: an `Admin` for each kind."""

from __future__ import annotations

import sqlite3
import threading
from typing import Any

from support.dialects import dialect_of
from support.steering import ServerControl


class ServerAdmin:
    """Asks a server, through the test's process. Lives as long as the sweep."""

    TABLE = "CREATE TABLE unit (id {0.serial}, token VARCHAR(40), payload {0.payload}, UNIQUE (token, id))"

    def __init__(self, url: str, control_port: int) -> None:
        self._database = url.rpartition("/")[2]
        self.control = ServerControl(control_port)
        self.sql(self.TABLE.format(dialect_of(url)))

    def sql(self, statement: str, *args: Any) -> list[dict[str, Any]]:
        return self.control.sql(statement, *args, database=self._database)

    def stored(self, token: str) -> int:
        """How often the row of `token` is there."""
        return int(self.sql("SELECT COUNT(*) AS n FROM unit WHERE token = %s", token)[0]["n"])

    def open_transactions(self) -> int:
        return int(self.control.open_transactions())

    def connections(self) -> int:
        """How many of `app` there are of the database."""
        return sum(process["db"] == self._database for process in self.control.processlist())


class SQLiteAdmin:
    """The same of a file that aiosqlite opens."""

    def __init__(self, url: str) -> None:
        self._connection = sqlite3.connect(url.partition("///")[2], timeout=0, isolation_level=None)
        self._connection.execute("CREATE TABLE unit (id INTEGER PRIMARY KEY, token VARCHAR(40), payload LONGTEXT)")

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
