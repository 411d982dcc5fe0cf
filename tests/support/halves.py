"""One way to write a test of both halves of dbsession: as a coroutine, whose awaits wait only in the asyncio one.

    @on_both_halves
    async def test_something(half, manager):
        async with entered(manager.scope()):
            await done(manager.get().execute(...))

In the gevent half the coroutine is stepped through in a greenlet of its own and never suspends; in the asyncio half
`asyncio.run` runs it in a task.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Awaitable, Callable
from types import ModuleType
from typing import Any, TypeVar

import gevent
import gevent.event
from sqlalchemy.util import greenlet_spawn

import dbsession
import dbsession.aio.scope
import dbsession.green.scope
from dbsession import aio

T = TypeVar("T")
Work = Callable[[], Awaitable[T]]

BOUND_S = 60.0


async def done(value: Any) -> Any:
    """What the verb gave, awaited in the half where that is needed."""
    return await value if inspect.isawaitable(value) else value


class Entered:
    """A context manager of the gevent half, for `async with`."""

    def __init__(self, block: Any) -> None:
        self._block = block

    async def __aenter__(self) -> Any:
        return self._block.__enter__()

    async def __aexit__(self, *raised: Any) -> Any:
        return self._block.__exit__(*raised)


def entered(block: Any) -> Any:
    """`async with entered(session_scope()):` in either half."""
    return block if hasattr(block, "__aenter__") else Entered(block)


def sync(engine: Any) -> Any:
    """The `Engine` of an `AsyncEngine`; an Engine as it is."""
    return getattr(engine, "sync_engine", engine)


def stepped(coroutine: Any) -> Any:
    """Run a coroutine that never waits to its end; what it returns."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    raise AssertionError("the gevent half suspended a coroutine")


class GeventHalf:
    name = "gevent"
    verbs: ModuleType = dbsession
    scopes: ModuleType = dbsession.green.scope

    def run(self, work: Work[T]) -> T:
        """Run `work()` to its end, in a greenlet of its own."""
        job = gevent.Greenlet(stepped, work())
        job.start()
        with gevent.Timeout(BOUND_S):
            job.join()
        if job.exception is not None:
            raise job.exception
        return job.value

    async def elsewhere(self, work: Work[T]) -> T:
        """The same, from a test."""
        return self.run(work)

    def spawn(self, work: Work[Any], name: str | None = None) -> gevent.Greenlet:
        """Begin `work()` in a greenlet of its own; `join()` waits for it."""
        job = gevent.Greenlet(stepped, work())
        if name is not None:
            job.name = name
        job.start()
        return job

    async def join(self, job: Any) -> Any:
        return job.get(timeout=BOUND_S)

    def event(self) -> Any:
        return gevent.event.Event()

    async def call(self, function: Callable[..., T], *args: Any) -> T:
        """Run what is written for SQLAlchemy's synchronous classes."""
        return function(*args)

    async def until(self, predicate: Callable[[], Any]) -> None:
        """Wait for what happens a little later."""
        end = gevent.Timeout.start_new(BOUND_S)
        try:
            while not predicate():
                gevent.sleep(0.001)
        finally:
            end.close()


class AioHalf:
    name = "aio"
    verbs: ModuleType = aio
    scopes: ModuleType = aio.scope

    def run(self, work: Work[T]) -> T:
        """Run `work()` to its end, in a task and a loop of its own."""

        async def bounded() -> T:
            async with asyncio.timeout(BOUND_S):
                return await work()

        return asyncio.run(bounded())

    async def elsewhere(self, work: Work[T]) -> T:
        """Run `work()` to its end in a task of its own."""

        async def job() -> T:
            return await work()

        return await asyncio.create_task(job())

    def spawn(self, work: Work[Any], name: str | None = None) -> asyncio.Task[Any]:
        """Begin `work()` in a task of its own; `join()` waits for it."""
        return asyncio.create_task(work(), name=name)

    async def join(self, job: Any) -> Any:
        return await job

    def event(self) -> Any:
        return asyncio.Event()

    async def call(self, function: Callable[..., T], *args: Any) -> T:
        """Run what is written for SQLAlchemy's synchronous classes, in a greenlet where it may await."""
        return await greenlet_spawn(function, *args)

    async def until(self, predicate: Callable[[], Any]) -> None:
        """Wait for what happens a little later."""
        async with asyncio.timeout(BOUND_S):
            while not predicate():
                await asyncio.sleep(0.001)


HALVES = {half.name: half for half in (GeventHalf(), AioHalf())}


def on_both_halves(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """A test written as a coroutine function, which has to ask for the fixture `half`."""

    @functools.wraps(test)
    def run(**fixtures: Any) -> None:
        fixtures["half"].run(lambda: test(**fixtures))

    return run
