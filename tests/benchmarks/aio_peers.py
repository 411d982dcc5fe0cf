"""What bench_aio runs in an event loop: each peer's way to a session, or to a value of the loop's, in one form.

`warm`, `loop_local` and `queries` are awaited in the task that then measures one of the cases they give.
"""

from __future__ import annotations

import asyncio
import random
import time
import timeit
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from sqlalchemy.ext.asyncio import AsyncEngine, async_scoped_session, async_sessionmaker

from .work import MANY, Item

Unit = Callable[[], Awaitable[Any]]
Times = Callable[[int], Awaitable[float]]
"""Does something so many times; gives the seconds that took."""

ALONE = "a task alone"
BY_HAND = "AsyncSession made and closed by hand"
SCOPED = "async_scoped_session: get + remove()"
OURS = "dbsession: get, and the task's end"
AGAIN = "(again, control)"
WARM_THEIRS = "async_scoped_session()"
WARM_OURS = "dbsession: the proxy()"
WARM_BY_NAME = "dbsession: get_dbsession(name)()"
PASSED = "an AsyncSession made, passed and closed by hand"
QUERY_OURS = "dbsession: get_dbsession(), and the task's end"
QUERY_IN_SCOPE = "dbsession: async with session_scope()"


async def nothing() -> None:
    pass


def alone(_: AsyncEngine) -> Unit:
    return nothing


def by_hand(engine: AsyncEngine) -> Unit:
    make = async_sessionmaker(engine, autoflush=False)

    async def unit() -> None:
        session = make()
        await session.close()

    return unit


def with_sessionmaker(engine: AsyncEngine) -> Unit:
    make = async_sessionmaker(engine, autoflush=False)

    async def unit() -> None:
        async with make():
            pass

    return unit


def scoped(engine: AsyncEngine) -> async_scoped_session[Any]:
    return async_scoped_session(async_sessionmaker(engine, autoflush=False), scopefunc=asyncio.current_task)


def scoped_removed(engine: AsyncEngine) -> Unit:
    session = scoped(engine)

    async def unit() -> None:
        session()
        await session.remove()

    return unit


def scoped_never_removed(engine: AsyncEngine) -> Unit:
    session = scoped(engine)

    async def unit() -> None:
        session()

    return unit


def ours(_: AsyncEngine) -> Unit:
    from dbsession.aio import get_dbsession

    async def unit() -> None:
        get_dbsession("default")()

    return unit


def ours_removed(_: AsyncEngine) -> Unit:
    from dbsession.aio import get_dbsession

    async def unit() -> None:
        session = get_dbsession("default")
        session()
        await session.remove()

    return unit


def ours_in_a_scope(_: AsyncEngine) -> Unit:
    from dbsession.aio import get_dbsession, session_scope

    async def unit() -> None:
        async with session_scope():
            get_dbsession("default")()

    return unit


TASKS: dict[str, Callable[[AsyncEngine], Unit]] = {
    ALONE: alone,
    BY_HAND: by_hand,
    "async with async_sessionmaker()()": with_sessionmaker,
    SCOPED: scoped_removed,
    OURS: ours,
    "dbsession: get + remove()": ours_removed,
    "dbsession: async with session_scope(), get": ours_in_a_scope,
}
"""What a task of its own does. The engine is never connected; dbsession has one of its own, configured as "default"."""

NEVER_REMOVED = "async_scoped_session: get, never removed"
GROWING = {name: TASKS[name] for name in (ALONE, SCOPED, OURS)} | {
    "dbsession: async with session_scope(), get": ours_in_a_scope,
    NEVER_REMOVED: scoped_never_removed,
}


def tasks(unit: Unit) -> Times:
    """Each `unit()` in a task of its own, one after the other."""

    async def times(number: int) -> float:
        create = asyncio.get_running_loop().create_task
        start = time.perf_counter()
        for _ in range(number):
            await create(unit())
        return time.perf_counter() - start

    return times


def calls(get: Any, how: str = "get()") -> Times:
    """Evaluations of the expression `how`, all in one task."""
    timer = timeit.Timer(how, "gc.enable()", globals={"get": get, "gc": timeit.gc})

    async def times(number: int) -> float:
        return timer.timeit(number)

    return times


def entries(get: Callable[[], Any]) -> Times:
    """`async with get():`, all in one task."""

    async def times(number: int) -> float:
        start = time.perf_counter()
        for _ in range(number):
            async with get():
                pass
        return time.perf_counter() - start

    return times


async def per_time(times: Times, seconds: float) -> tuple[float, float]:
    """The seconds that one of them takes, and those of this process's CPU, of as many as take `seconds` together. The
    collector stays on."""
    number = 1
    while (took := await times(number)) < seconds / 20:
        number *= 4
    number = max(1, int(number * seconds / max(took, 1e-9)))
    cpu = time.process_time()
    return await times(number) / number, (time.process_time() - cpu) / number


async def warm(engine: AsyncEngine) -> dict[str, Times]:
    """The session once more, of a task that has one: to be called and measured in one task."""
    from dbsession.aio import get_dbsession

    theirs, proxy = scoped(engine), get_dbsession("default")
    here = {asyncio.current_task(): proxy()}
    theirs()
    return {
        "dict[current_task()]": calls(lambda: here[asyncio.current_task()]),
        WARM_THEIRS: calls(theirs),
        f"{WARM_THEIRS} {AGAIN}": calls(theirs),
        WARM_OURS: calls(proxy),
        WARM_BY_NAME: calls(get_dbsession, "get('default')()"),
    }


class Resource:
    """What belongs to a loop, and is an asynchronous context manager."""

    async def __aenter__(self) -> Resource:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass


async def loop_local() -> dict[str, Times]:
    """A value of the running loop once more, by both libraries' same names. Of the other one only what it documents."""
    import asyncio_loop_local as theirs

    from dbsession.aio import loop_local as ours

    def without() -> Resource:
        return Resource()

    def with_one(number: int) -> Resource:
        return Resource()

    @asynccontextmanager
    async def entered(number: int) -> Any:
        yield Resource()

    here = {asyncio.get_running_loop(): Resource()}
    cases = {"dict[get_running_loop()]": calls(lambda: here[asyncio.get_running_loop()])}
    for name, library, storage in (
        ("asyncio-loop-local", theirs, theirs._storage.storage),
        ("dbsession", ours, ours.storage),
    ):
        sticky, sticky_with_one = library.sticky_singleton_acm(Resource), library.sticky_singleton_acm(entered)
        cases |= {
            f"{name}: storage()": calls(storage),
            f"{name}: singleton, no arguments": calls(library.singleton(without)),
            f"{name}: singleton, one argument": calls(library.singleton(with_one), "get(7)"),
            f"{name}: async with sticky, no arguments": entries(sticky),
            f"{name}: async with sticky, one argument": entries(lambda f=sticky_with_one: f(7)),
        }
    return cases


async def queries(theirs: AsyncEngine, name: str | None, reads: int = 1, kind: Any = Item) -> dict[str, Times]:
    """A task that reads rows by their primary keys: by an AsyncSession passed, by one of SQLAlchemy's registry, and, if
    `name` is not None, by ours of that database. `theirs` is an engine with the options of dbsession's."""
    by_task = scoped(theirs)

    async def read(session: Any) -> None:
        for _ in range(reads):
            await session.get(kind, random.randint(1, MANY))

    def passed(engine: AsyncEngine) -> Unit:
        make = async_sessionmaker(engine, autoflush=False, expire_on_commit=False)

        async def unit() -> None:
            session = make()
            try:
                await read(session)
            finally:
                await session.close()

        return unit

    async def removed() -> None:
        try:
            await read(by_task)
        finally:
            await by_task.remove()

    found = {
        PASSED: tasks(passed(theirs)),
        f"{PASSED} {AGAIN}": tasks(passed(theirs)),
        "async_scoped_session, and remove()": tasks(removed),
    }
    if name is None:
        return found
    from dbsession.aio import get_dbsession, get_engine, session_scope

    ours = get_dbsession(name)

    async def in_a_scope() -> None:
        async with session_scope():
            await read(ours)

    return found | {
        "an AsyncSession passed, on dbsession's engine": tasks(passed(get_engine(name))),
        QUERY_OURS: tasks(lambda: read(ours)),
        QUERY_IN_SCOPE: tasks(in_a_scope),
    }
