"""The functions that decorators are given: what they are called, when their bodies run, and which are refused."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from dbsession.errors import plain

F = TypeVar("F", bound="Callable[..., Any] | classmethod[Any, Any, Any]")
"""What a decorator is given, and gives back."""

Awaited = TypeVar("Awaited", bound=Callable[..., Coroutine[Any, Any, Any]])


def name_of(function: object) -> str:
    """Return what reports call a callable: a function's qualified name, that of what a `partial` calls, or an object's
    class."""
    function = _innermost(function)
    return plain(getattr(function, "__qualname__", None) or type(function).__qualname__)


def runs_later(function: Callable[..., Any], awaited: bool = False) -> bool:
    """Whether the function's body runs after its call has returned; with `awaited`, after that was awaited, too."""
    for what in _bodies(function):
        if inspect.isgeneratorfunction(what) or inspect.isasyncgenfunction(what):
            return True
    return not awaited and is_async(function)


def is_async(function: Callable[..., Any]) -> bool:
    """Return whether `function` is a coroutine function, or an object whose `__call__` is one."""
    return any(map(inspect.iscoroutinefunction, _bodies(function)))


def is_given(value: object) -> bool:
    """Return whether `value`, the first argument of something that may be used without parentheses, is what it
    decorates."""
    return callable(value) or isinstance(value, (staticmethod, classmethod))


def decorated(function: Any, decorator: str, check: Callable[[Any], None], wrap: Callable[[Any], Any]) -> Any:
    """Return what `wrap` makes of a function that `check` lets pass; of a staticmethod or classmethod, one of the kind.

    Raises:
        TypeError: it is a class, or no function; or what `check` raises.
    """
    if isinstance(function, (staticmethod, classmethod)):
        return type(function)(decorated(function.__func__, decorator, check, wrap))
    if isinstance(function, type):
        raise TypeError(
            f"{decorator} cannot decorate the class {function.__qualname__}: decorate the functions that are units of "
            "work."
        )
    if not callable(function):
        raise TypeError(f"{decorator} cannot decorate a {type(function).__qualname__}: it is for functions.")
    check(function)
    return wrap(function)


def refuse_coroutine(result: object, label: str, instead: str) -> None:
    """Raise TypeError if a call that should have done its work has returned a coroutine, which has done nothing yet.

    Of a lambda, say, or of a plain function round a coroutine function, nothing tells that before it is called.
    """
    if inspect.iscoroutine(result):
        result.close()
        raise TypeError(
            f"The function of {label} returned a coroutine, whose body would run when its unit of work is over; it was "
            f"not run. {instead}"
        )


def awaited(function: Awaited) -> Awaited:
    """Mark a `def` function that looks up the caller's scope and returns a coroutine as a coroutine function, for
    frameworks that run any other one in a thread."""
    if sys.version_info >= (3, 12):
        return inspect.markcoroutinefunction(function)
    # There is no mark there but the code's own, which says nothing to that interpreter: a coroutine is made by the
    # code's first instruction.
    marked: Any = function
    marked.__code__ = marked.__code__.replace(co_flags=marked.__code__.co_flags | inspect.CO_COROUTINE)
    return function


def _innermost(function: Any) -> Any:
    while isinstance(function, functools.partial):
        function = function.func
    return function


def _bodies(function: Any) -> tuple[Any, ...]:
    function = _innermost(function)
    return function, getattr(type(function), "__call__", None)  # noqa: B004  # the function, not whether there is one
