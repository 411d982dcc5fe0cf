"""Where in the user's own code something happened: noted cheaply, written out when somebody asks."""

from __future__ import annotations

import contextlib
import os
from functools import lru_cache
from itertools import islice
from types import CodeType, FrameType
from typing import Any

import sqlalchemy

Noted = list[Any]
"""Code, offset, code, offset ...: innermost first. It keeps no frame, and so nothing that a frame refers to."""

_OURS = (
    *(os.path.dirname(os.path.abspath(package)) + os.sep for package in (sqlalchemy.__file__, __file__)),
    contextlib.__file__,  # stands between `with engine.begin():` and SQLAlchemy
)
# Files of SQLAlchemy and of ours, and others: a lookup for each frame instead of a comparison. Written by anybody, a
# step each; they grow no further than the program's files.
_inside: set[str] = set()
_outside: set[str] = set()


def noted(frame: FrameType | None, count: int) -> Noted:
    """`frame` and its callers, from the first outside SQLAlchemy and dbsession on, `count` at most."""
    while frame is not None:
        file = frame.f_code.co_filename
        if file not in _inside and (file in _outside or not _is_inside(file)):
            break
        frame = frame.f_back
    stack: Noted = []
    while frame is not None and count:
        stack.append(frame.f_code)
        stack.append(frame.f_lasti)
        frame = frame.f_back
        count -= 1
    return stack


def _is_inside(file: str) -> bool:
    """Whether code of this file is SQLAlchemy's or ours; some of SQLAlchemy's is generated, and says so in its name."""
    if file.startswith(_OURS) or (file.startswith("<") and "sqlalchemy." in file):
        _inside.add(file)
        return True
    _outside.add(file)
    return False


def written(stack: Noted) -> tuple[str, ...]:
    """Each place as `file:line in function`; at least one."""
    pairs = zip(stack[::2], stack[1::2], strict=True)
    places = tuple(f"{code.co_filename}:{_line(code, offset)} in {code.co_qualname}" for code, offset in pairs)
    return places or ("an unknown place",)


@lru_cache(1024)  # a pool that is used up is told of to each who waited for it. (Equal code may be of another file.)
def _line(code: CodeType, offset: int) -> int:
    line = next(islice(code.co_positions(), offset // 2, None))[0]
    return code.co_firstlineno if line is None else line
