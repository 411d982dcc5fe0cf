"""A statement for people's eyes: without the values that were written into its text."""

from __future__ import annotations

import re

STATEMENT_CHARS = 120
_READ_CHARS = 4096  # of what may be megabytes of INSERT

_NUMBER = r"(?<![\w.%:@$?])(?:0x[0-9a-f]+|(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)(?!\w)"

# Read from left to right, so that a quote in a comment or in a name begins no text. Each text may lack its end, where
# the statement was cut. Group 1 is a name, which stays.
_MYSQL = re.compile(
    r"""(`[^`]*(?:`|\Z)) | /\*.*?(?:\*/|\Z) | \#[^\n]* | --(?:\s[^\n]*|\Z)
    | '(?:[^'\\]|\\.|'')*(?:'|\\?\Z) | "(?:[^"\\]|\\.|"")*(?:"|\\?\Z)
    | """
    + _NUMBER,
    re.IGNORECASE | re.DOTALL | re.VERBOSE,
)
_STANDARD = re.compile(
    r"""("[^"]*(?:"|\Z)|`[^`]*`|\[\w+\]) | /\*.*?(?:\*/|\Z) | --[^\n]*
    | \be'(?:[^'\\]|\\.|'')*(?:'|\\?\Z) | '[^']*(?:'|\Z) | \$(\w*)\$.*?(?:\$\2\$|\Z)
    | """
    + _NUMBER,
    re.IGNORECASE | re.DOTALL | re.VERBOSE,
)


def masked(statement: str, is_mysql: bool) -> str:
    """`statement` on one line and cut at 120 characters, with `?` for each value in its text, without its comments.

    Args:
        is_mysql: whether a backslash escapes and double quotes hold text, as in MySQL and MariaDB.
    """
    pattern = _MYSQL if is_mysql else _STANDARD
    text = " ".join(pattern.sub(_replacement, statement[:_READ_CHARS]).split())
    return text if len(text) <= STATEMENT_CHARS else f"{text[: STATEMENT_CHARS - 1]}…"


def _replacement(found: re.Match[str]) -> str:
    if found[1]:
        return found[1]
    return " " if found[0].startswith(("/*", "--", "#")) else "?"
