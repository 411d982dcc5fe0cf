"""What belongs to one event loop: values made once in it, and resources that are closed before it ends.

    @loop_local.sticky_singleton_acm
    def http_client(base_url: str) -> ClientSession:
        return ClientSession(base_url)

    client = await http_client("https://a.test")   # anywhere in the loop: entered by the first, shared by all
    await loop_local.aclose()                      # leaves it; without this the end of the loop does

Exits run newest first: by `await aclose()`, else when asyncio.run or uvloop.run shut the loop down, while it and its
executor still work, else in `loop.close()`. Not after a SIGTERM under uvicorn, which lets the signal end the process
inside the loop: there `await aclose()` at the end of the application's lifespan. Each has a limited time, all run
whatever fails, and the loop is closed in any case. An exit runs in another task than the entry did, so nothing that
belongs to one task (an anyio cancel scope, asyncio.timeout()) may be open from one to the other; it has a copy of the
contextvars context that its registration was made in, which is kept until then. A forked child does not run its
parent's exits.

Every function here belongs to the loop that runs in the calling thread. Where none runs they raise LoopRequired.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Any, ParamSpec, TypeVar, overload

from dbsession import errors
from dbsession.aio.loop_local import shutdown
from dbsession.aio.loop_local.call_keys import label
from dbsession.aio.loop_local.current import ABSENT, running_loop, running_state
from dbsession.aio.loop_local.singletons import (
    Sticky,
    async_singleton_of,
    key_of_acm,
    key_to_evict,
    singleton_of,
    sticky_singleton_of,
)
from dbsession.aio.loop_local.state import EXIT_TIMEOUT_S, Callback, Exit

P = ParamSpec("P")
T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., object])


def storage() -> dict[Any, Any]:
    """Return the running loop's own mapping, for anything; it is emptied when its resources are closed. It dies with
    the loop, also when a value in it refers to the loop."""
    try:
        mapping: dict[Any, Any] = running_loop()._dbsession_loop_local.storage
        return mapping
    except ABSENT:
        return running_state().storage


def at_close(callback: Callback) -> Callable[[], None]:
    """Awaits `callback()` when the running loop's resources are closed; messages call it by its `__qualname__`. Does
    not wait itself.

    Returns:
        A function that takes the registration back; it does nothing once the callback has started.
    """
    exits = running_state().exits
    exit = Exit(callback, label(callback))
    exits[exit] = None
    return partial(exits.pop, exit, None)


async def enter(acm: AbstractAsyncContextManager[T, Any]) -> T:
    """Enters `acm` now, and leaves it when the running loop's resources are closed, or by `evict(acm)`. Each call
    enters again. Returns what its `__aenter__()` gave."""
    return await running_state().enter(acm, label(acm), key_of_acm(acm))


async def enter_once(acm: AbstractAsyncContextManager[T, Any]) -> T:
    """Enters `acm`, that very object, unless enter_once or sticky_acm has entered it in the running loop already, and
    leaves it as `enter` does.

    Others that ask for the same one meanwhile wait; entering others goes on beside it. When it fails or is cancelled
    the next one enters. An object of @asynccontextmanager can be entered in one loop only: see sticky_singleton_acm.
    """
    return await sticky_acm(acm)


@overload
def singleton(factory: F, /) -> F: ...
@overload
def singleton() -> Callable[[F], F]: ...
def singleton(factory: Any = None, /) -> Any:
    """Decorates a factory, `def` or `async def`, to be called once per loop and set of arguments.

    Arguments are told apart by type and value, also inside tuples and frozensets; in what order keywords come, and
    whether a parameter is passed by position, by keyword or left at its default, makes no difference. Concurrent first
    calls of an `async def` wait for the one that builds. A factory that fails or is cancelled leaves nothing: the next
    call, or the next that waits, builds.

    Of an `async def` each call gives an awaitable that may be awaited any number of times, and as little as a
    coroutine does it start before that. The value is kept until `evict(factory, *arguments)`, or the closing of the
    loop's resources; no exit belongs to it: use sticky_singleton_acm for what has to be closed.

    Raises, from the call:
        UnusableArgument: an argument cannot be hashed.
        RecursiveUse: the factory asked for what it is building.
    """
    if factory is None:
        return singleton
    if inspect.iscoroutinefunction(factory) or inspect.iscoroutinefunction(type(factory).__call__):
        return async_singleton_of(factory)
    return singleton_of(factory)


def sticky_acm(acm: AbstractAsyncContextManager[T, Any]) -> Sticky[T]:
    """Returns an object for `async with` and `await` that enters `acm` once per loop: see enter_once."""
    return Sticky(key_of_acm(acm), label(acm), lambda: acm)


def sticky_singleton_acm(factory: Callable[P, AbstractAsyncContextManager[T, Any]]) -> Callable[P, Sticky[T]]:
    """Decorates a factory of asynchronous context managers, so that one is made and entered per loop and set of
    arguments.

    Both `async with f(*args) as value` and `value = await f(*args)` give what it was entered with; the end of the
    block does nothing. It is left when the loop's resources are closed, or by `evict(f, *args)`. Arguments are told
    apart as by `singleton`. Raises TypeError for an `async def` without @asynccontextmanager.
    """
    return sticky_singleton_of(factory)


async def evict(what: object, /, *args: Any, **kwargs: Any) -> bool:
    """Forgets one thing of the running loop and awaits its exit; the next use makes it anew and waits until then.
    Returns whether there was one. One that is being made is waited for.

    Args:
        what: a function decorated by `singleton` or `sticky_singleton_acm`, with the arguments of the call to forget;
            what `sticky_acm` gave; or an entered asynchronous context manager.

    Raises:
        ExceptionGroup: what the exits raised. Their time is not limited here: asyncio.timeout() does.
    """
    return await running_state().evict(key_to_evict(what, args, kwargs))


async def aclose(*, timeout: float | None = EXIT_TIMEOUT_S) -> None:
    """Closes the running loop's resources: awaits every exit, newest first, then empties the storage and forgets the
    singletons. Everything is usable again afterwards.

    Exits registered meanwhile run too: as many as there were and 10 more, since tasks that go on using what is closed
    would keep this from ending. A second call waits for the first. When the calling task is cancelled, the rest is run
    and then the cancellation goes on.

    Args:
        timeout: seconds for each exit, None without limit. One that overruns it is cancelled and given one second more.

    Raises:
        ExceptionGroup: what the exits raised, and an ExitUnfinished (a TimeoutError) for each that overran its time, or
            for what is left open because it was made again and again.
    """
    await running_state().close(timeout)


def close(loop: asyncio.AbstractEventLoop, *, timeout: float | None = EXIT_TIMEOUT_S) -> None:
    """Closes the resources of `loop`, as aclose() does, from outside: runs it until that is done. The loop itself stays
    open.

    Raises:
        LoopRequired: it runs or is closed, or another one runs in this thread.
        ExceptionGroup: see aclose().
    """
    if loop.is_running() or loop.is_closed():
        raise errors.LoopRequired(
            f"The resources of {type(loop).__name__} cannot be closed from outside: it is "
            f"{'running' if loop.is_running() else 'closed already'}. Call close() between its last run and its own "
            "close(), or await aclose() inside it."
        )
    if shutdown.other_loop_runs():
        raise errors.LoopRequired(
            "close() runs a loop, which cannot be done while another one runs in the same thread. Call it outside, or "
            "await aclose() inside the loop whose resources are to be closed."
        )
    loop.run_until_complete(aclose(timeout=timeout))
