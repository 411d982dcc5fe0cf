"""Call sites: the lines of the user's own code in a stack, found when somebody asks for them."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from functools import lru_cache
from types import CodeType, FrameType

from dbsession.errors import plain

CallSite = tuple[CodeType, int]
"""A code object and a line in it: what keeps no frame, and so nothing that a frame refers to."""

MOST_FRAMES = 200
"""How many call sites of one stack are kept: a recursion gone wrong has thousands."""

UNKNOWN = "an unknown place"
"""What is said of a stack in which no frame is the user's."""

# Top-level modules whose frames stand between the user's code and the connection, or between it and what it waits for.
_NOT_THE_USERS = sys.stdlib_module_names | {
    *("dbsession", "sqlalchemy", "gevent", "greenlet", "uvloop"),
    *("pymysql", "MySQLdb", "mysql", "aiomysql", "asyncmy", "aiosqlite", "psycopg", "psycopg2", "asyncpg", "pg8000"),
}


def outwards(frame: FrameType | None) -> Iterator[FrameType]:
    """Yield `frame` and its callers, innermost first."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def users(frames: Iterable[FrameType], count: int = MOST_FRAMES) -> list[CallSite]:
    """The first `count` of `frames` that are the user's own."""
    found: list[CallSite] = []
    for frame in frames:
        if _is_users(str(frame.f_globals.get("__name__")), frame.f_code.co_filename):
            found.append((frame.f_code, frame.f_lineno or frame.f_code.co_firstlineno))
            if len(found) == count:
                break
    return found


@lru_cache(4096)  # a program has no more modules
def _is_users(module: str, file: str) -> bool:
    # Code that SQLAlchemy generates has no module of its own, and says in the file's name whose it is.
    return module.partition(".")[0] not in _NOT_THE_USERS and not file.startswith("<sqlalchemy ")


def written(sites: Iterable[CallSite]) -> tuple[str, ...]:
    """Each call site as `file:line in function`."""
    return tuple(plain(f"{code.co_filename}:{line} in {code.co_qualname}") for code, line in sites)


def call(frames: Iterable[FrameType] | None = None) -> str | None:
    """The call by which the user's code has led here, as `commit() at file:line in function`; None if no frame is the
    user's. `frames` are those of the caller, innermost first."""
    name = ""
    for frame in outwards(sys._getframe(1)) if frames is None else frames:
        site = users((frame,))
        if site:
            return f"{name}() at {written(site)[0]}" if name and not name.startswith("_") else f"at {written(site)[0]}"
        if not str(frame.f_globals.get("__name__")).endswith(".guard"):  # which calls the session's method itself
            name = frame.f_code.co_name
    return None
