"""What is made once per loop: look-ups that are fast when it is there, and make it when it is not."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator, Hashable
from contextlib import AbstractAsyncContextManager
from typing import Any, Generic, TypeVar

from dbsession import errors
from dbsession.aio.loop_local.call_keys import NO_ARGUMENT, Calls, label, remember
from dbsession.aio.loop_local.current import ABSENT, running_loop, running_state
from dbsession.aio.loop_local.state import LoopState

T = TypeVar("T")

_Parts = tuple[Hashable, str, Callable[[], Any]]  # what a Sticky is made of

_ACM = object()
_NOT_SHORT = (KeyError, TypeError)  # not remembered, or cannot be hashed
_NOT_THERE = (*_NOT_SHORT, *ABSENT)


def key_of_acm(acm: object) -> Hashable:
    """Return the key of that very context manager; equal ones have others. Valid while the acm lives, which its
    registered exit sees to."""
    return _ACM, id(acm)


def singleton_of(factory: Callable[..., Any]) -> Callable[..., Any]:
    """Return `factory` with its values kept by the loop."""
    calls = Calls(factory)
    keys: dict[type, dict[Any, Hashable]] = {}

    def get(one: Any = NO_ARGUMENT, /, *more: Any, **kwargs: Any) -> Any:
        if not more and not kwargs:
            try:
                return running_loop()._dbsession_loop_local.values[keys[type(one)][one]]
            except _NOT_THERE:
                pass
        args = more if one is NO_ARGUMENT else (one, *more)
        key = calls.key(args, kwargs)
        if not more and not kwargs:
            remember(keys, one, key)
        try:
            return running_loop()._dbsession_loop_local.values[key]
        except ABSENT:
            pass  # what the factory raises should not be "during handling" of this
        return running_state().make(key, functools.partial(factory, *args, **kwargs))

    def get_without() -> Any:  # the same for a factory that takes no arguments: half the time
        try:
            return running_loop()._dbsession_loop_local.values[calls]
        except ABSENT:
            pass
        return running_state().make(calls, factory)

    return _evictable(get_without if calls.take_none else get, factory, calls)


def async_singleton_of(factory: Callable[..., Awaitable[Any]]) -> Callable[..., Any]:
    """Return the `async def` `factory` with the values of its awaitables kept by the loop."""
    calls = Calls(factory)

    def get(*args: Any, **kwargs: Any) -> Call[Any]:
        key = calls.key(args, kwargs) if args or kwargs else calls
        return Call(key, lambda: factory(*args, **kwargs))

    return _evictable(get, factory, calls)


def sticky_singleton_of(factory: Callable[..., AbstractAsyncContextManager[T, Any]]) -> Callable[..., Sticky[T]]:
    """Return `factory` with its context managers entered once per loop."""
    if inspect.iscoroutinefunction(factory) or inspect.isasyncgenfunction(factory):
        raise TypeError(
            f"sticky_singleton_acm cannot decorate {label(factory)}(), which gives no asynchronous context manager "
            "when it is called: put it above @asynccontextmanager, or make it a `def`."
        )
    calls = Calls(factory)
    bare = Sticky(calls, calls.label, factory)
    parts: dict[type, dict[Any, _Parts]] = {}

    def get(one: Any = NO_ARGUMENT, /, *more: Any, **kwargs: Any) -> Sticky[T]:
        if not more and not kwargs:
            try:
                return Sticky(*parts[type(one)][one])  # a new one: asyncio.gather() awaits the same once
            except _NOT_SHORT:
                pass
        args = more if one is NO_ARGUMENT else (one, *more)
        found: _Parts = calls.key(args, kwargs), calls.label, functools.partial(factory, *args, **kwargs)
        if not more and not kwargs:
            remember(parts, one, found)
        return Sticky(*found)

    def get_bare() -> Sticky[T]:
        return bare

    return _evictable(get_bare if calls.take_none else get, factory, calls)


def _evictable(get: Callable[..., T], factory: Callable[..., object], calls: Calls) -> Callable[..., T]:
    functools.update_wrapper(get, factory)
    get._dbsession_calls = calls  # type: ignore[attr-defined]  # a Callable has none
    return get


def key_to_evict(what: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable:
    """The key of what `loop_local.evict` was told to forget."""
    calls = getattr(what, "_dbsession_calls", None)
    if isinstance(calls, Calls):
        bound = (what.__self__,) if inspect.ismethod(what) else ()
        return calls.key(bound + args, kwargs)
    if args or kwargs:
        raise errors.UnusableArgument(
            f"evict() got arguments for {label(what)}, which was made without: only what `singleton` or "
            "`sticky_singleton_acm` decorated is kept once for each set of arguments."
        )
    return what.key if isinstance(what, Kept) else key_of_acm(what)


class Kept(Generic[T]):
    """Awaitable any number of times, in any loop: gives what the loop keeps under a key, made where it is missing."""

    __slots__ = ("_factory", "key")
    _factory: Callable[[], Any]
    key: Hashable

    def _make(self, state: LoopState) -> Awaitable[T]:
        made: Awaitable[T] = self._factory()
        return made

    def __await__(self) -> Generator[Any, Any, T]:
        try:
            value: T = running_loop()._dbsession_loop_local.values[self.key]
            return value
        except ABSENT:
            pass
        return (yield from self._made().__await__())

    async def _made(self) -> T:  # apart, since the lambda's variables would slow down what is there already
        state = running_state()
        return await state.make_async(self.key, lambda: self._make(state))


class Call(Kept[T], Coroutine[Any, Any, T]):
    """One call of an `async def` singleton: a coroutine, so that create_task() takes it."""

    __slots__ = ("_steps",)

    def __init__(self, key: Hashable, factory: Callable[[], Awaitable[T]]) -> None:
        self.key = key
        self._factory = factory
        self._steps: Generator[Any, Any, T] | None = None

    def _stepped(self) -> Generator[Any, Any, T]:
        if self._steps is None:
            self._steps = self.__await__()
        return self._steps

    def send(self, value: Any) -> Any:
        return self._stepped().send(value)

    def throw(self, *raised: Any) -> Any:
        return self._stepped().throw(*raised)

    def close(self) -> None:
        self._stepped().close()


class Sticky(Kept[T]):
    """An asynchronous context manager that is entered once per loop, at the first `async with` or `await`."""

    __slots__ = ("_label",)

    def __init__(self, key: Hashable, label: str, factory: Callable[..., AbstractAsyncContextManager[T, Any]]) -> None:
        self.key = key
        self._label = label
        self._factory = factory

    def _make(self, state: LoopState) -> Awaitable[T]:
        return state.enter(self._factory(), self._label, self.key)

    async def __aenter__(self) -> T:
        try:  # not `return await self`: one step less
            value: T = running_loop()._dbsession_loop_local.values[self.key]
            return value
        except ABSENT:
            pass
        return await self._made()

    def __aexit__(self, *raised: object) -> Awaitable[None]:
        return _NOTHING


@types.coroutine
def _nothing() -> Generator[Any, Any, None]:
    return
    yield


# Awaitable any number of times, in any loop: it gives None at once, since it has ended. A coroutine for each time would
# cost more than the look-up.
_NOTHING = _nothing()
next(_NOTHING, None)
