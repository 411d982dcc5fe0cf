"""SQL as it is shown: a statement without the values written into it."""

from __future__ import annotations

import re
from functools import lru_cache

from dbsession.errors import plain

STATEMENT_CHARS = 120
_READ_CHARS = 4096  # of what may be megabytes of INSERT

# Without a second try: a long row of digits would take its square in time. What begins with a digit and goes on with
# letters may be a number and the next word (`LIMIT 10OFFSET 5`); it goes, where it is a name (MySQL's), too. Of `:3` a
# parameter is left, of `[1:3]` nothing.
_NUMBER = r"""(?<![\w.@$?])(?<![^\d]:)
    (?:0x[0-9a-f_]++|0b[01_]++|0o[0-7_]++|(?:\d[\d_]*+\.?+[\d_]*+|\.\d[\d_]*+)(?:e[-+]?\d++)?+)"""

# Comments: one in another is one more or not, by the backend.
_COMMENT = r"/\*(?:(?!/\*|\*/).)*(?:\*/|/\*.*|\Z)"
# Texts: whether a backslash before a quote escapes it, a setting of the server's decides.
_SINGLE = r"'(?:[^'\\]|\\[^']|'')*(?:'|\\'.*|\\?\Z)"
_DOUBLE = r'"(?:[^"\\]|\\[^"]|"")*(?:"|\\".*|\\?\Z)'
_BACKTICKS = r"`[^`]*(?:`|\Z)"


def _pattern(names: str, *values: str) -> re.Pattern[str]:
    parts = (f"({names})", _COMMENT, *values, _SINGLE, _NUMBER)
    return re.compile("|".join(parts), re.IGNORECASE | re.DOTALL | re.VERBOSE)


# Each is read from left to right, so that a quote in a comment or in a name begins no text. What may end in two ways
# hides the rest, and each text may lack its end, where the statement was cut. Group 1 is a name, which stays; what a
# backend takes for a name or for a text as it pleases, is a text.
_MYSQL = _pattern(_BACKTICKS, r"\#[^\n]*", r"--(?=[\s\x00-\x1f]|\Z)[^\n]*", _DOUBLE)
_DOUBLE_IS_TEXT = _pattern(_BACKTICKS, r"--[^\n]*", r"""\[[^]['"]*['"][^]]*\]""", _DOUBLE)
_STANDARD = _pattern(r'"[^"]*(?:"|\Z)', r"--[^\n\r]*", r"\$((?:[^\W\d]\w*)?)\$.*?(?:\$\2\$|\Z)", r"\bn?q'.*")
_PATTERNS = {"mysql": _MYSQL, "mariadb": _MYSQL, "sqlite": _DOUBLE_IS_TEXT, "mssql": _DOUBLE_IS_TEXT}


def masked(statement: str, backend: str) -> str:
    """Return `statement` on one line and cut at 120 characters, with `?` for each text and each number of more than one
    digit that was written into it, without its comments.

    Args:
        backend: whose SQL it is: "mysql", "sqlite", "postgresql" ...
    """
    return _masked(statement[:_READ_CHARS], backend)


@lru_cache(256)  # a pool that is used up is told of to each who waited for it
def _masked(beginning: str, backend: str) -> str:
    pattern = _PATTERNS.get(backend, _STANDARD)
    text = plain(" ".join(pattern.sub(_replacement, beginning).split()))
    return text if len(text) <= STATEMENT_CHARS else f"{text[: STATEMENT_CHARS - 1]}…"


# One digit identifies nobody, and says which statement it is: `SELECT 1`.
_SMALL = re.compile(r"\d")


def _replacement(found: re.Match[str]) -> str:
    if found[1] or _SMALL.fullmatch(found[0]):
        return found[0]
    return " " if found[0].startswith(("/*", "--", "#")) else "?"
