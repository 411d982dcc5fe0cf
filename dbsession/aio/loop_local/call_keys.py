"""When two calls of a factory are the same call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Mapping
from functools import lru_cache
from types import NoneType
from typing import Any, TypeVar

from dbsession import errors

T = TypeVar("T")

NO_ARGUMENT: Any = object()  # in place of the first one, where none is passed by position
_ANY_ARGUMENTS = inspect.signature(lambda *args, **kwargs: None)
_REMEMBERED_CALLS = 1024  # of each factory and type of argument, whose keys need not be found out again
_PLAIN = frozenset((str, bytes, int, float, bool, NoneType))  # lru_cache(typed=True) tells these apart as we do
_EXACT = _PLAIN - {float}  # where equal ones of the same type can replace each other: 0.0 and -0.0 cannot


def label(what: object) -> str:
    """Return what messages call a factory, a manager or a callback: never its repr, which may hold a password."""
    named = getattr(what, "func", what)  # of @asynccontextmanager's objects and of functools.partial
    return str(getattr(named, "__qualname__", type(what).__qualname__))


def typed(value: Any) -> tuple[type, Hashable]:
    """A key that is equal only for values of the same type that are equal: 1, True and 1.0 have three. The same
    holds for what is inside tuples and frozensets."""
    if isinstance(value, tuple):
        return type(value), tuple(map(typed, value))
    if isinstance(value, frozenset):
        return type(value), frozenset(map(typed, value))
    return type(value), value


def remember(short: dict[type, dict[Any, T]], one: Any, what: T) -> None:
    """Writes down what was found out about the call of a factory with this one positional argument, or NO_ARGUMENT.

    `short[type(one)][one]` is the fastest look-up that tells such calls apart, if the argument is of one of the exact
    types; for others nothing is written. Each factory has a `short` of its own, in all threads: any of them may write,
    since all write the same, and what another one clears meanwhile is found out again.
    """
    if one is NO_ARGUMENT or type(one) in _EXACT:
        same_type = short.setdefault(type(one), {})
        if len(same_type) >= _REMEMBERED_CALLS:
            same_type.clear()
        same_type[one] = what


class Calls:
    """The keys of one factory's calls; lives as long as what decorates the factory.

    The object itself is the key of the call without arguments. The others have only what differs from the factory's
    defaults, under the parameter's name: `f()`, `f(1)` and `f(size=1)` are the same when 1 is the default of `size`,
    and the order of keywords makes no difference.
    """

    def __init__(self, factory: Callable[..., object]) -> None:
        self.label = label(factory)
        try:
            self._signature = inspect.signature(factory)
        except ValueError:  # some classes and functions written in C tell none
            self._signature = _ANY_ARGUMENTS
        parameters = self._signature.parameters.values()
        self.take_none = not parameters
        self._keywords = {each.name for each in parameters if each.kind is each.VAR_KEYWORD}
        self._defaults = {each.name: self._of_default(each) for each in parameters}
        self._remembered = lru_cache(_REMEMBERED_CALLS, typed=True)(self._key)

    def key(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Hashable:
        """The key of `factory(*args, **kwargs)`.

        Raises:
            TypeError: the factory cannot be called with these, in Python's own words.
            UnusableArgument: one cannot be hashed.
        """
        if _PLAIN.issuperset(map(type, args)):
            if not kwargs:
                return self._remembered(*args)
            if _PLAIN.issuperset(map(type, kwargs.values())):
                return self._remembered(*args, **kwargs)
        return self._key(*args, **kwargs)

    def _key(self, /, *args: Any, **kwargs: Any) -> Hashable:
        items = []
        for name, value in self._signature.bind(*args, **kwargs).arguments.items():
            if name in self._keywords:
                value = frozenset(self._item(each, value[each]) for each in value)
            item = self._item(name, value)
            if item != self._defaults[name]:
                items.append(item)
        return frozenset((self, *items)) if items else self  # which keeps its hash: a tuple's is computed each time

    def _item(self, name: str, value: Any) -> tuple[str, Hashable]:
        try:
            key = typed(value)
            hash(key)
        except TypeError:
            raise errors.UnusableArgument(
                f"{self.label}() is kept once for each set of arguments, and {name!r} (of type "
                f"{type(value).__name__}) cannot be hashed: pass something that cannot change, such as a tuple in "
                "place of a list."
            ) from None
        return name, key

    def _of_default(self, parameter: inspect.Parameter) -> Hashable:
        try:
            return self._item(parameter.name, parameter.default)
        except errors.UnusableArgument:
            return None  # equal to no argument's
