"""How transactions begin and end on a psycopg2 connection of ours: whatever does either is sent from here, as text."""

from __future__ import annotations

import select
from collections.abc import Callable
from typing import Any, NamedTuple

import psycopg2
from psycopg2 import extensions
from psycopg2.extensions import (
    STATUS_BEGIN,
    STATUS_READY,
    TRANSACTION_STATUS_IDLE,
    TRANSACTION_STATUS_INERROR,
)

from dbsession.core.backends.postgresql_sent import Sent
from dbsession.core.connection_info import OPENING
from dbsession.errors import RollbackRequired
from dbsession.green.postgresql.psycopg2_waits import Waits
from dbsession.green.postgresql.psycopg2_watch import call_watched

_Base: Any = extensions.connection
_LEVELS = {1: "READ COMMITTED", 2: "REPEATABLE READ", 3: "SERIALIZABLE", 4: "READ UNCOMMITTED"}
CLOSED_BEFORE_COMMIT = "the server has closed the connection before COMMIT was sent: nothing was committed"


class Characteristics(NamedTuple):
    """How transactions begin, as psycopg2's attributes of the same names say; None: as the server has it."""

    autocommit: bool = False
    isolation_level: int | None = None
    readonly: bool | None = None
    deferrable: bool | None = None

    def begin(self) -> str:
        """Return the statement that begins a transaction."""
        words = ["BEGIN"]
        if self.isolation_level is not None:
            words.append(f"ISOLATION LEVEL {_LEVELS[self.isolation_level]}")
        if self.readonly is not None:
            words.append("READ ONLY" if self.readonly else "READ WRITE")
        if self.deferrable is not None:
            words.append("DEFERRABLE" if self.deferrable else "NOT DEFERRABLE")
        return " ".join(words)

    def settings(self) -> dict[str, str]:
        """Return what the session has to be set to, where each statement is a transaction of its own."""
        if not self.autocommit:
            return {"isolation": "DEFAULT", "read_only": "DEFAULT", "deferrable": "DEFAULT"}
        level = "DEFAULT" if self.isolation_level is None else f"'{_LEVELS[self.isolation_level].lower()}'"
        on = {None: "DEFAULT", True: "on", False: "off"}
        return {"isolation": level, "read_only": on[self.readonly], "deferrable": on[self.deferrable]}


class Transactions(Waits):
    """The transactions of one connection: psycopg2's own attributes and methods, carried out here. Lives as it does."""

    database: str | None = None
    """Its name, for log lines."""
    commit_sent = False
    """Whether the last commit() got as far as sending COMMIT."""
    factory_at_first: Any = None
    """Its cursors' class where a user names none, as it was opened."""
    mark = 0
    """How many transactions have ended on it."""

    sent: Sent
    blocks: bool
    refuse_if_lost: Callable[[], None]

    _characteristics = _at_first = Characteristics()
    _begin = "BEGIN"  # what begins a transaction
    _ended = True  # nothing was sent since the last COMMIT or ROLLBACK was answered
    _refused = False  # the text that a BEGIN was in has failed by its syntax
    _entered = False  # in a `with` block, which is a transaction in autocommit mode, too
    _tpc = False  # in a two-phase transaction, which is psycopg2's own

    @property
    def in_transaction(self) -> bool:
        """Whether a transaction is open, by the server's last answer."""
        return self.get_transaction_status() != TRANSACTION_STATUS_IDLE

    @property
    def settled(self) -> bool:
        """Whether it is known that no transaction is open, by what was sent and answered. The server's word can only
        make us doubt it."""
        return self._ended and self.get_transaction_status() == TRANSACTION_STATUS_IDLE

    def send_no_begin(self) -> None:
        """Have psycopg2 begin no transactions of its own: to it this is the autocommit mode."""
        _Base.autocommit.__set__(self, True)

    def command(self, text: str) -> str:
        """Send a statement of ours; return what the server calls it."""
        cursor = extensions.cursor(self)
        if self.blocks:
            call_watched(self, cursor.execute, text)
        else:
            cursor.execute(text)
        return cursor.statusmessage or ""

    # How transactions begin: psycopg2's attributes, kept here.

    @property
    def characteristics(self) -> Characteristics:
        """How transactions begin on it now. Setting it sends something in autocommit mode only."""
        return self._characteristics

    @characteristics.setter
    def characteristics(self, wanted: Characteristics) -> None:
        before = self._characteristics
        if wanted != before:
            self.refuse_if_lost()
            if self.in_transaction:
                raise psycopg2.ProgrammingError("set_session cannot be used inside a transaction")
            settings = before.settings()
            for name, value in wanted.settings().items():
                if value != settings[name]:
                    self.command(f"SET default_transaction_{name} TO {value}")
            self._characteristics, self._begin = wanted, wanted.begin()
        if self.sent.phase is OPENING:
            self._at_first = wanted

    def forget_answer(self) -> None:
        """Be for the next user what the connection was for the first one. Sends nothing."""
        if self._characteristics != self._at_first:
            self._characteristics, self._begin = self._at_first, self._at_first.begin()
        if self.cursor_factory is not self.factory_at_first:
            self.cursor_factory = self.factory_at_first
        if self.notifies:
            del self.notifies[:]

    def set_session(
        self, isolation_level: Any = None, readonly: Any = None, deferrable: Any = None, autocommit: Any = None
    ) -> None:
        wanted = self._characteristics
        if isolation_level is not None:
            wanted = wanted._replace(isolation_level=_level(isolation_level))
        if readonly is not None:
            wanted = wanted._replace(readonly=_flag(readonly))
        if deferrable is not None:
            wanted = wanted._replace(deferrable=_flag(deferrable))
        if autocommit is not None:
            wanted = wanted._replace(autocommit=bool(autocommit))
        self.characteristics = wanted

    def set_isolation_level(self, level: int | None) -> None:
        if self.in_transaction:
            self.rollback()  # as psycopg2 does
        autocommit = level == extensions.ISOLATION_LEVEL_AUTOCOMMIT
        found = None if autocommit else _level(level)
        self.characteristics = self._characteristics._replace(autocommit=autocommit, isolation_level=found)

    @property
    def autocommit(self) -> bool:
        return self._characteristics.autocommit

    @autocommit.setter
    def autocommit(self, value: Any) -> None:
        self.characteristics = self._characteristics._replace(autocommit=bool(value))

    @property
    def isolation_level(self) -> int | None:
        return self._characteristics.isolation_level

    @isolation_level.setter
    def isolation_level(self, value: Any) -> None:
        self.characteristics = self._characteristics._replace(isolation_level=_level(value))

    @property
    def readonly(self) -> bool | None:
        return self._characteristics.readonly

    @readonly.setter
    def readonly(self, value: Any) -> None:
        self.characteristics = self._characteristics._replace(readonly=_flag(value))

    @property
    def deferrable(self) -> bool | None:
        return self._characteristics.deferrable

    @deferrable.setter
    def deferrable(self, value: Any) -> None:
        self.characteristics = self._characteristics._replace(deferrable=_flag(value))

    @property
    def status(self) -> int:
        found: int = _Base.status.__get__(self)
        return STATUS_BEGIN if found == STATUS_READY and self.in_transaction else found

    def commit(self) -> None:
        self.commit_sent = False
        self.refuse_if_lost()
        if self._tpc or self.closed:
            super().commit()  # which raises
        refused, self._refused = self._refused, False
        self._entered = False
        if not self.settled and (self.in_transaction or not self._characteristics.autocommit):
            if self.happened() & ~select.POLLIN:
                super().close()
                raise psycopg2.OperationalError(CLOSED_BEFORE_COMMIT)
            self.commit_sent = True
            answer = self._end("COMMIT")
            if answer == "ROLLBACK" or refused:
                self.commit_sent = False
                raise RollbackRequired(
                    f"Database {self.database!r}: the server has rolled the transaction back where it was to be "
                    "committed, since a statement of it had failed: nothing was committed. Roll back, to a savepoint "
                    "at least, where an error is caught."
                )

    def rollback(self) -> None:
        self.refuse_if_lost()
        if self._tpc or self.closed:
            super().rollback()  # which raises
        self._refused = self._entered = False
        if not self.settled:
            self._end("ROLLBACK")

    def _end(self, text: str) -> str:
        self.mark += 1
        if _Base.status.__get__(self) == STATUS_BEGIN:  # psycopg2 itself has begun: for a large object
            failed = self.get_transaction_status() == TRANSACTION_STATUS_INERROR
            getattr(_Base, text.lower())(self)
            self.send_no_begin()
            answer = "ROLLBACK" if failed else text
        else:
            answer = self.command(text)
        self._ended = self.get_transaction_status() == TRANSACTION_STATUS_IDLE
        return answer

    def __enter__(self) -> Any:
        self.refuse_if_lost()
        self._entered = True  # a transaction, also in autocommit mode
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            self.commit()
        else:
            self.rollback()

    def lobject(self, *args: Any, **kwargs: Any) -> Any:
        self.refuse_if_lost()
        self._ended = False
        if not self._characteristics.autocommit and not self.in_transaction:
            _Base.autocommit.__set__(self, False)  # psycopg2's own BEGIN
        return super().lobject(*args, **kwargs)

    # Two-phase: psycopg2's own, outside of its autocommit mode.

    def tpc_begin(self, xid: Any) -> None:
        self.refuse_if_lost()
        _Base.autocommit.__set__(self, False)
        super().tpc_begin(xid)
        self._tpc, self._ended = True, False
        if self._begin != "BEGIN":
            self.command(f"SET TRANSACTION{self._begin.removeprefix('BEGIN')}")

    def tpc_commit(self, *xid: Any) -> None:
        self.refuse_if_lost()
        self.commit_sent = True
        super().tpc_commit(*xid)
        self._tpc_ended()

    def tpc_rollback(self, *xid: Any) -> None:
        self.refuse_if_lost()
        super().tpc_rollback(*xid)
        self._tpc_ended()

    def _tpc_ended(self) -> None:
        self._tpc = False
        self.mark += 1
        self.send_no_begin()
        self._ended = self.get_transaction_status() == TRANSACTION_STATUS_IDLE


def _level(value: Any) -> int | None:
    if value in (None, extensions.ISOLATION_LEVEL_DEFAULT) or str(value).upper() == "DEFAULT":
        return None
    if isinstance(value, str):
        found = {name: number for number, name in _LEVELS.items()}.get(value.upper())
    else:
        found = value if value in _LEVELS else None
    if found is None:
        raise ValueError(f"there is no isolation level {value!r}")
    return found


def _flag(value: Any) -> bool | None:
    return None if value is None or str(value).upper() == "DEFAULT" else bool(value)
