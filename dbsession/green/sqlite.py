"""What only SQLite needs: a file and not memory, WAL, and waiting for its write lock without stopping the hub."""

from __future__ import annotations

import fcntl
import os
import random
import sqlite3
import time
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

from dbsession.core import fork
from dbsession.core.backends.sqlite import SQLite, is_busy, is_memory
from dbsession.core.config import DatabaseConfig
from dbsession.core.fork import KNOWN
from dbsession.green import hub

T = TypeVar("T")

# Between two tries of the first in the queue, and between two looks of the others at it. Random, so that two processes,
# which know nothing of each other's queues, do not ask in step.
_RETRY_S = (0.001, 0.003)
_LOOK_S = 0.005

_WRITES = ("INSERT", "UPDATE", "DELETE", "REPLACE")


def _until_free(connection: Connection, attempt: Callable[[], T], sql: str = "") -> T:
    """Call `attempt()`, again while another connection holds the lock, for up to `busy_timeout_s`. Switches greenlets.

    Writers of one engine wait in a queue: only the first one asks, and a newcomer that would begin to write joins the
    end, so that nobody is overtaken. (A connection in the middle of its transaction may hold the lock that the others
    wait for; it never joins before it was refused.)

    SQLite undoes a busy statement and leaves its transaction open, so the statement alone may be tried again; not
    after SQLITE_BUSY_SNAPSHOT, where the transaction has read what is no longer true (sqlite.org/rescode.html#busy).
    """
    connection.refuse_inherited()
    queue = connection.queue
    if not queue or connection.in_transaction or sql[:20].lstrip()[:7].rstrip().upper() not in _WRITES:
        try:
            return attempt()
        except sqlite3.OperationalError as error:
            if not _is_busy(error):
                raise
    deadline = time.monotonic() + connection.busy_timeout_s
    changes = connection.total_changes
    # Every writer of this engine appends itself and removes itself, one step each; nobody else's place is touched.
    queue.append(connection)
    try:
        while True:
            late = time.monotonic() > deadline
            connection.refuse_inherited()  # a fork may have come while we slept, and this be the child's copy
            if queue[0] is connection or late:
                try:
                    return attempt()
                except sqlite3.OperationalError as error:
                    # Changed rows: an executemany() got stuck half-way (never under WAL); a second try would repeat
                    # them.
                    if not _is_busy(error) or late or connection.total_changes != changes:
                        raise
                hub.sleep(random.uniform(*_RETRY_S))
            else:
                hub.sleep(_LOOK_S)
    finally:
        queue.remove(connection)


def _is_busy(error: sqlite3.OperationalError) -> bool:
    return is_busy(error) and error.sqlite_errorcode != sqlite3.SQLITE_BUSY_SNAPSHOT


class Cursor(sqlite3.Cursor):
    """A cursor whose statements wait for the write lock. Lives as long as its result is read."""

    connection: Connection

    def execute(self, sql: str, parameters: Any = (), /) -> Cursor:
        execute = super().execute
        return _until_free(self.connection, lambda: execute(sql, parameters), sql)

    def executemany(self, sql: str, parameters: Any, /) -> Cursor:
        rows = list(parameters)  # an iterator could not be tried again
        executemany = super().executemany
        return _until_free(self.connection, lambda: executemany(sql, rows), sql)


class Connection(sqlite3.Connection):
    """A pooled SQLite connection of this process; in a forked child it refuses everything and touches nothing."""

    busy_timeout_s = 5.0
    queue: deque[Connection]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        fork.look()
        self.epoch = fork.epoch
        self.queue = deque()

    def refuse_inherited(self) -> None:
        if not KNOWN[0]:
            fork.found_out()
        if self.epoch != fork.epoch:
            raise sqlite3.ProgrammingError(
                "This SQLite connection was opened before this process was forked and belongs to the parent. "
                "Open a session anew: get_dbsession()."
            )

    def cursor(self, factory: Any = None) -> Any:
        return super().cursor(factory or Cursor)

    def commit(self) -> None:
        _until_free(self, super().commit)

    def rollback(self) -> None:
        fork.look()
        if self.epoch == fork.epoch:
            super().rollback()

    def close(self) -> None:
        fork.look()
        if self.epoch == fork.epoch:
            super().close()


def _is_open(connection: sqlite3.Connection) -> bool:
    try:
        return connection.total_changes >= 0
    except sqlite3.ProgrammingError:
        return False


class PySQLite(SQLite):
    """The rules of one engine's SQLite file by the sqlite3 module, and its connections. Lives as long as the engine."""

    in_process = True

    def __init__(self, config: DatabaseConfig) -> None:
        super().__init__(config)
        self.queue: deque[Connection] = deque()
        """The writers of the engine that wait; replaced in a forked child."""
        self._file = ""  # the path of the database, and what its -shm file is, as of the newest connection
        self._shm: tuple[int, int] | None = None
        self._lost = False  # the file cannot be used in this child

    def engine_options(self) -> dict[str, Any]:
        own = {"connect_args": {"timeout": 0, "factory": Connection}}
        return super().engine_options() | (own if self.config.url.get_driver_name() == "pysqlite" else {})

    def connected(self, connection: Any, info: dict[Any, Any]) -> None:
        if isinstance(connection, Connection):
            connection.busy_timeout_s = self.config.busy_timeout_s
            connection.queue = self.queue
            if self._lost:
                raise sqlite3.ProgrammingError(
                    f"Database {self.config.name!r}: this process was forked while its SQLite file was open, "
                    "and the parent has closed it since. Call dbsession.dispose() before the fork."
                )
        super().connected(connection, info)

    def _set_up(self, cursor: Any) -> None:
        super()._set_up(cursor)
        if isinstance(cursor, Cursor):
            cursor.execute("PRAGMA schema_version").fetchall()  # reads, which opens the WAL and its -shm file
            self._file = cursor.execute("PRAGMA database_list").fetchone()[2]
            self._shm = fork.what_is(f"{self._file}-shm")

    def close_before_fork(self) -> bool:
        # SQLite keeps its locks per process and file, and a child that inherits an open file would believe that it
        # holds what its parent holds (https://www.sqlite.org/howtocorrupt.html).
        return not is_memory(self.config.url)

    def abandon(self, inherited: list[Any]) -> None:
        self.queue = deque()
        if self._shm is not None and any(map(_is_open, inherited)):
            self._lost = not self._hold_what_was_held()

    def _hold_what_was_held(self) -> bool:
        """Take the locks that SQLite, whose memory in this process is the parent's, believes to have and asks for no
        more: without them, whoever closes the file last would remove its WAL, with what is committed here after that.
        Return whether the file is still the one that was open.

        Where they are, os_unix.c says; they are held as long as the process, as closing the descriptors would give
        back all locks of the process on these files.
        """
        try:
            file = os.open(self._file, os.O_RDONLY | os.O_CLOEXEC)
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB, 510, 0x40000002)  # SHARED
            shm = os.open(f"{self._file}-shm", os.O_RDONLY | os.O_CLOEXEC)
            fcntl.lockf(shm, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, 128)  # the "dead man's switch" of the WAL's index
        except OSError:
            return False
        return fork.what_is(shm) == self._shm
