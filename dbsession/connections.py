"""What we know of an engine's connections: whose they are, and whether something was written on them."""

from __future__ import annotations

import re
import weakref
from collections import deque
from functools import lru_cache
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine

from dbsession import fork, sqlite
from dbsession.config import DatabaseConfig
from dbsession.pool import HOME, home_of

WROTE = "dbsession.wrote"
"""Key in a connection's `info`: something was written since its checkout."""


class ConnectionLinks:
    """What we know of an engine's open connections. Lives as long as the engine, through forks. Written only by the
    pool's events, one operation each, and `closing` by whoever retires the engine."""

    def __init__(self, config: DatabaseConfig) -> None:
        self.closing = False
        self._config = config
        self._line: deque[sqlite.Connection] = deque()
        self._records: weakref.WeakKeyDictionary[Any, weakref.ref[Any]] = weakref.WeakKeyDictionary()

    def listen(self, engine: Engine) -> None:
        event.listen(engine, "connect", self._connected)
        event.listen(engine, "checkin", self._returned)
        event.listen(engine, "before_cursor_execute", self._note_write)

    def _connected(self, connection: Any, record: Any) -> None:
        try:
            self._records[connection] = weakref.ref(record)
        except TypeError:
            pass  # a driver without weak references: after a fork its pool is replaced, and that is all
        fork.prepare()
        record.info[HOME] = home_of(connection)
        if self._config.backend == "sqlite":
            sqlite.set_up(connection, self._config.busy_timeout_s, self._line)

    def _returned(self, connection: Any, record: Any) -> None:
        if connection is None:
            return  # invalidated while it was out
        record.info.pop(WROTE, None)
        if self.closing:
            record.close()

    def _note_write(self, connection: Connection, _cursor: Any, statement: str, *_: object) -> None:
        """Remember that something was written, so that `release_dbsession()` does not throw it away."""
        verb = _reading_verb(statement[:200])
        if not verb or (verb == "with" and _WRITES.search(statement)):
            level = connection.get_execution_options().get("isolation_level") or self._config.options.get(
                "isolation_level"
            )
            if level != "AUTOCOMMIT":  # there it is committed already
                connection.info[WROTE] = True

    def abandon(self) -> None:
        inherited = [(connection, record()) for connection, record in self._records.items()]
        self._records = weakref.WeakKeyDictionary()
        self._line = deque()
        fork.abandon(inherited)


_READS = re.compile(
    r"(?:\s|\(|--[^\n]*\n|#[^\n]*\n|/\*.*?\*/)*+"  # white space, parentheses and comments come first
    r"(select|with|show|explain|describe|desc|pragma|values|table|set|use|savepoint|release|rollback)\b",
    re.IGNORECASE | re.DOTALL,
)
_WRITES = re.compile(r"\b(?:insert|update|delete|replace|merge)\b", re.IGNORECASE)


@lru_cache(maxsize=2048)
def _reading_verb(beginning: str) -> str:
    """The verb of a statement that begins so, if it changes no row; "" for what is not known to only read."""
    match = _READS.match(beginning)
    return match[1].lower() if match else ""
