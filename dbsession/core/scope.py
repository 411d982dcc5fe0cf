"""What a scope is, in greenlets as in asyncio tasks: its sessions, and what became of its transactions."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Self

from sqlalchemy.orm import Session

from dbsession.core.config import positive_seconds
from dbsession.core.functions import name_of
from dbsession.errors import UnusableArgument, masked, plain

_NONE: Mapping[Any, Any] = MappingProxyType({})


class BaseScope:
    """One unit of work: what the scopes of greenlets and of asyncio tasks have in common.

    `label` is what reports call it, `kind` what it is: a "request", the "block" of a `session_scope()`, or "implicit";
    `since` when it began, by time.monotonic(), `ended` whether it is over, `outcomes` what became of the last
    transaction that wrote something to each database: "committed", "rolled back", or "unknown" when the connection was
    lost at COMMIT. `sessions` is the used set: database -> session. `failed` says that it ends by an exception, or with
    an error for an answer, so that nobody is surprised by the work that it drops.
    """

    _AWAIT: ClassVar[str] = ""

    __slots__ = ("__weakref__", "ended", "failed", "label", "outcomes", "sessions", "since")

    # Of an implicit scope, which keeps none of these: as many may be held as there are greenlets. What somebody opens
    # has slots for them.
    kind: str = "implicit"
    read_timeout_s: float | None = None
    # The `run_in_transaction()` that this scope was opened for: (whose, database) -> the error of a part of it that has
    # failed, or None. Replaced and not added to, as `outcomes`: most scopes never need one of their own.
    transactions: Mapping[Any, BaseException | None] = _NONE

    def __init__(self, label: str) -> None:
        self.label = label
        self.since = time.monotonic()
        self.ended = self.failed = False
        self.outcomes: Mapping[str, str] = _NONE
        self.sessions: dict[Any, Any] = {}

    def __repr__(self) -> str:
        return f"<Scope {self.label!r}{' ended' if self.ended else ''}, {len(self.sessions)} sessions>"

    if not TYPE_CHECKING:  # or a type checker would take any name for one of ours

        def __getattr__(self, name: str) -> Any:
            text = f"'Scope' object has no attribute {name!r}"
            if hasattr(Session, name):
                text += (
                    ": session_scope() gives its scope, and no session. Inside the block write `session = "
                    f"get_dbsession()` and `{self._AWAIT}session.{name}`, and at its end "
                    f"`{self._AWAIT}session.commit()`."
                )
            raise AttributeError(text, name=name, obj=self)

    def leave_word(self) -> None:
        """Tell the sessions which scope was theirs, since it may be gone when they are closed aside."""
        for session in list(self.sessions.values()):
            getattr(session, "sync_session", session)._of = self.label, self.failed

    @property
    def outcome(self) -> str | None:
        """What became of the work done in this scope: "unknown" if that is so for any database, else the outcome of
        the last transaction; None before one has ended."""
        found = list(self.outcomes.values())
        return "unknown" if "unknown" in found else found[-1] if found else None

    def note_outcome(self, name: str, outcome: str, lasting: bool = True) -> None:
        """Remember what became of a transaction on the database `name`. "unknown" stays; what is not `lasting` (it
        wrote nothing) takes no other's place."""
        earlier = self.outcomes.get(name)
        if earlier is None or (lasting and earlier != "unknown"):
            others = {other: ended for other, ended in self.outcomes.items() if other != name}
            self.outcomes = {**others, name: outcome}  # the last one stands last


class BaseSessionScope:
    """What `session_scope()` returns. Lives for one block, or for the function that it decorates."""

    __slots__ = ("_kind", "_label", "_read_timeout_s", "_scope")

    def __init__(self, label: str | None, kind: str = "block", read_timeout_s: float | None = None) -> None:
        self._label = label  # None: of the function that it decorates, if it does
        self._kind = kind
        self._read_timeout_s = read_timeout_s
        self._scope: Any = None  # while its block runs

    @classmethod
    def checked(cls, label: object, read_timeout_s: float | None) -> Self:
        """Return what a caller's arguments of `session_scope()` ask for. Raises UnusableArgument, ConfigError."""
        if read_timeout_s is not None:
            read_timeout_s = positive_seconds(read_timeout_s, "read_timeout_s of a session_scope()")
        return cls(checked_label(label, "a session_scope()"), "block", read_timeout_s)

    @property
    def _shown_label(self) -> str:
        return self._label or "a session_scope()"

    def _another(self, function: Any) -> Self:
        """Return a SessionScope for a single call of the decorated function: each call has a scope of its own."""
        return type(self)(self._label or name_of(function), self._kind, self._read_timeout_s)

    def _refuse_second_use(self) -> None:
        if self._scope is not None:
            raise RuntimeError("This session_scope() is open already: call session_scope() for each block.")


def checked_label(label: object, whose: str) -> str | None:
    """Return a label of the caller's, as it is shown; None if there is none. Raises UnusableArgument."""
    if label is None or isinstance(label, str):
        return plain(masked(label)) if label else None
    raise UnusableArgument(
        f"The label of {whose} is a {type(label).__qualname__}: give a text, which reports call the unit of work by."
    )
