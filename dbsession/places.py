"""Where in the user's own code something happened: noted cheaply, written out when somebody asks."""

from __future__ import annotations

import os
import sys
from types import CodeType, FrameType
from typing import Any

import sqlalchemy

Noted = list[Any]
"""Code, offset, code, offset ...: innermost first. It keeps no frame, and so nothing that a frame refers to."""

_OURS = tuple(os.path.dirname(os.path.abspath(package)) + os.sep for package in (sqlalchemy.__file__, __file__))
# Files of SQLAlchemy and of ours, and others: a lookup for each frame instead of a comparison. Written by anybody, a
# step each; they grow no further than the program's files.
_inside: set[str] = set()
_outside: set[str] = set()


# Code of callers between which and the pool there is nobody else's, by their depth. A frame object costs as much to
# make as to be rid of, so that those between, which are nearly always the same, are skipped. Written by anybody, a
# step each; no more entries than SQLAlchemy has methods that begin to use a connection.
_FIRST = 4  # below it there is only the pool
_DEPTHS = (15, 12, 8)
_known: dict[int, CodeType] = {}  # by id(code) * 16 + depth; a code object that is kept keeps its id


def noted_from_pool(count: int) -> Noted:
    """As `noted`, for what is called two calls below SQLAlchemy's `_ConnectionFairy._checkout()`, as it takes a
    connection."""
    for depth in _DEPTHS:
        try:
            frame = sys._getframe(depth)
        except ValueError:  # a short stack
            continue
        if id(frame.f_code) * 16 + depth in _known:
            return noted(frame.f_back, count)
    learned: FrameType | None = sys._getframe(_FIRST)
    depth = _FIRST
    while learned is not None and is_inside(learned.f_code.co_filename):
        if depth in _DEPTHS:
            _known[id(learned.f_code) * 16 + depth] = learned.f_code
        learned = learned.f_back
        depth += 1
    return noted(learned, count)


def noted(frame: FrameType | None, count: int) -> Noted:
    """`frame` and its callers, from the first outside SQLAlchemy and dbsession on, `count` at most."""
    while frame is not None and is_inside(frame.f_code.co_filename):
        frame = frame.f_back
    stack: Noted = []
    while frame is not None and count:
        stack.append(frame.f_code)
        stack.append(frame.f_lasti)
        frame = frame.f_back
        count -= 1
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
    places = tuple(_place(code, offset) for code, offset in zip(stack[::2], stack[1::2], strict=True))
    return places or ("an unknown place",)


def _place(code: CodeType, offset: int) -> str:
    for index, (line, *_) in enumerate(code.co_positions()):
        if index == offset // 2 and line is not None:
            return f"{code.co_filename}:{line} in {code.co_qualname}"
    return f"{code.co_filename}:{code.co_firstlineno} in {code.co_qualname}"
