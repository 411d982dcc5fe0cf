"""What a unit of work is, in greenlets as in asyncio tasks: its sessions, and what became of its transactions."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

_NOTHING: Mapping[Any, Any] = MappingProxyType({})


class Unit:
    """One unit of work.

    `label` is what reports call it, `kind` what it is: a "request", the "block" of a `session_scope()`, or "implicit";
    `since` when it began, by time.monotonic(), `ended` whether it is over, `outcomes` what became of the last
    transaction that wrote something to each database: "committed", "rolled back", or "unknown" when the connection was
    lost at COMMIT. `sessions` is the used set: database -> session.
    """

    __slots__ = (
        "__weakref__",
        "ended",
        "kind",
        "label",
        "outcomes",
        "read_timeout_s",
        "sessions",
        "since",
        "units",
    )

    def __init__(self, label: str, kind: str, read_timeout_s: float | None) -> None:
        self.label = label
        self.kind = kind
        self.since = time.monotonic()
        self.read_timeout_s = read_timeout_s
        self.ended = False
        # These two are replaced and not added to: most scopes never need one of their own.
        self.outcomes: Mapping[str, str] = _NOTHING
        # Units of work that began with this scope: (whose, database) -> the error of a part of it, or None.
        self.units: Mapping[Any, BaseException | None] = _NOTHING
        self.sessions: dict[Any, Any] = {}

    def __repr__(self) -> str:
        return f"<Scope {self.label!r}{' ended' if self.ended else ''}, {len(self.sessions)} sessions>"

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
