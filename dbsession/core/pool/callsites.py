"""Where in the user's own code something happened: noted cheaply, written out when somebody asks."""

from __future__ import annotations

import contextlib
import os
import sys
from functools import lru_cache
from itertools import islice
from types import CodeType, FrameType
from typing import Any

import sqlalchemy
from sqlalchemy.engine import Engine

import dbsession

Noted = list[Any]
"""Code, offset, code, offset ...: innermost first. It keeps no frame, and so nothing that a frame refers to."""

_OURS = (
    *(os.path.dirname(os.path.abspath(package)) + os.sep for package in (sqlalchemy.__file__, dbsession.__file__)),
    contextlib.__file__,  # stands between `with engine.begin():` and SQLAlchemy
)
# Files of SQLAlchemy and of ours, and others: a lookup for each frame instead of a comparison. Written by anybody, a
# step each; they grow no further than the program's files.
_inside: set[str] = set()
_outside: set[str] = set()


# A frame object costs as much to make as to be rid of, so those between the pool and the user's code, which are nearly
# always the same, are skipped: code at the outer depth -> code at the inner one, wherever all below the outer was
# SQLAlchemy's and ours. Both are looked at: code at one depth alone may have a listener of the user's below it the next
# time. Written by anybody, a step each; it grows no further than SQLAlchemy has methods that begin to use a connection.
_FIRST, _ENGINE, _INNER = 4, 8, 12  # below the first there is only the pool; at the second Engine.connect(), if at all
# By outer depth: id(code) -> code at the inner one. The first is that of a scoped session's execute(), the other that
# of a Session's, and of a scoped session's connection(), whose caller stands at the first.
_known: dict[int, dict[int, CodeType]] = {15: {}, 14: {}}
_OUTERMOST = max(_known)
_CONNECT = Engine.connect.__code__
_known_codes: dict[int, CodeType] = {}  # by id, so that they keep it


def noted_from_pool(count: int) -> Noted:
    """As `noted`, for what is called two calls below SQLAlchemy's `_ConnectionFairy._checkout()`, as it takes a
    connection."""
    frame: FrameType | None
    try:
        for depth, known in _known.items():
            frame = sys._getframe(depth)
            inner = known.get(id(frame.f_code))
            if inner is not None and inner is sys._getframe(_INNER).f_code:
                return noted(frame.f_back, count)
    except ValueError:  # a short stack
        pass
    first = _FIRST
    try:
        frame = sys._getframe(_ENGINE)
        if frame.f_code is _CONNECT:
            caller = frame.f_back
            if caller is None or caller.f_code.co_filename in _outside:
                return noted(caller, count)
            first = _ENGINE
    except ValueError:
        pass
    frame, inner = sys._getframe(first), None
    for depth in range(first, _OUTERMOST + 1):
        if frame is None or not is_inside(frame.f_code.co_filename):
            break
        if depth == _INNER:
            inner = frame.f_code
        elif depth in _known and inner is not None:
            _known_codes[id(frame.f_code)] = frame.f_code
            _known[depth][id(frame.f_code)] = inner
        frame = frame.f_back
    return noted(frame, count)


def noted(frame: FrameType | None, count: int) -> Noted:
    """`frame` and its callers, from the first outside SQLAlchemy and dbsession on, `count` at most."""
    # As is_inside(), mostly without its call.
    while frame is not None and (
        (file := frame.f_code.co_filename) in _inside or (file not in _outside and is_inside(file))
    ):
        frame = frame.f_back
    stack: Noted = []
    while frame is not None and count:
        stack += (frame.f_code, frame.f_lasti)
        count -= 1
        frame = frame.f_back if count else None  # a frame object is made by the asking
    return stack


def is_inside(file: str) -> bool:
    """Whether code of this file is SQLAlchemy's or ours; some of SQLAlchemy's is generated, and says so in its name."""
    if file in _inside:
        return True
    if file in _outside:
        return False
    inside = file.startswith(_OURS) or (file.startswith("<") and "sqlalchemy." in file)
    (_inside if inside else _outside).add(file)
    return inside


def written(stack: Noted) -> tuple[str, ...]:
    """Each place as `file:line in function`; at least one."""
    pairs = zip(stack[::2], stack[1::2], strict=True)
    places = tuple(f"{code.co_filename}:{_line(code, offset)} in {code.co_qualname}" for code, offset in pairs)
    return places or ("an unknown place",)


@lru_cache(1024)  # a pool that is used up is told of to each who waited for it. (Equal code may be of another file.)
def _line(code: CodeType, offset: int) -> int:
    line = next(islice(code.co_positions(), offset // 2, None))[0]
    return code.co_firstlineno if line is None else line
