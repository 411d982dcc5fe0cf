"""What an SQL statement does, by its words: as much as a decision about its transaction needs."""

from __future__ import annotations

import re
from functools import lru_cache

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


def writes(statement: str) -> bool:
    """Whether it may change a row, as far as its verb says."""
    verb = _reading_verb(statement[:200])
    return not verb or (verb == "with" and _WRITES.search(statement) is not None)
