"""The ways of being cancelled at an await of one's own choice."""

from __future__ import annotations

import asyncio
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import Any

LEVEL_STEPS = 100  # as many cancellations one after another at most


class Boom(Exception):
    """The failure of the victim's sibling in a TaskGroup."""


@types.coroutine
def stepped(work: Coroutine[Any, Any, None], at: Callable[[Any], None]) -> Generator[Any, Any, None]:
    """Run `work`, and call `at(what it waits for)` at each of its suspensions, just before the task is suspended."""
    error: BaseException | None = None
    while True:
        try:
            awaited = work.send(None) if error is None else work.throw(error)
        except StopIteration:
            return
        at(awaited)
        error = None
        try:
            yield awaited
        except BaseException as raised:
            error = raised


class Kind:
    """One way of being cancelled. Lives for one victim."""

    raised: type[BaseException] = asyncio.CancelledError  # what comes out of `around`
    aside = False  # it comes by way of others, and the victim may have ended meanwhile

    def __init__(self) -> None:
        self.victim: asyncio.Task[None]

    def at(self, step: int, awaited: Any) -> None:
        """At a suspension; `step` is 0 at the k-th."""
        if step == 0:
            self.victim.cancel()

    async def around(self, work: Awaitable[None]) -> None:
        await work


class Late(Kind):
    """When what it waits for is there, and it has not seen it yet."""

    def at(self, step: int, awaited: Any) -> None:
        if step == 0:
            if isinstance(awaited, asyncio.Future):
                awaited.add_done_callback(lambda _: self.victim.cancel())  # before the task's own, which wakes it
            else:
                self.victim.cancel()


class Twice(Kind):
    """And again when it waits in what the first cancellation has started."""

    def at(self, step: int, awaited: Any) -> None:
        if step in (0, 1):
            self.victim.cancel()


class Level(Kind):
    """As anyio does: again and again until it ends."""

    def at(self, step: int, awaited: Any) -> None:
        if 0 <= step < LEVEL_STEPS:
            self.victim.cancel()


class Timeout(Kind):
    """By asyncio.timeout()."""

    raised = TimeoutError
    aside = True

    def at(self, step: int, awaited: Any) -> None:
        if step == 0:
            self._timeout.reschedule(asyncio.get_running_loop().time())

    async def around(self, work: Awaitable[None]) -> None:
        async with asyncio.timeout(None) as self._timeout:
            await work


class WaitFor(Kind):
    """Its caller waits for it in asyncio.wait_for(), which runs it in a task of its own."""

    def at(self, step: int, awaited: Any) -> None:
        if step == 0:
            self._inner.cancel()

    async def around(self, work: Awaitable[None]) -> None:
        async def inner() -> None:
            await work

        self._inner = asyncio.ensure_future(inner())
        await asyncio.wait_for(self._inner, 60)


class Group(Kind):
    """Its sibling in a TaskGroup fails."""

    raised = ExceptionGroup
    aside = True

    def at(self, step: int, awaited: Any) -> None:
        if step == 0:
            self._fail.set()

    async def around(self, work: Awaitable[None]) -> None:
        self._fail = asyncio.Event()

        async def inner() -> None:
            try:
                await work
            finally:
                sibling.cancel()

        async def fail() -> None:
            await self._fail.wait()
            raise Boom

        async with asyncio.TaskGroup() as group:
            sibling = group.create_task(fail())
            group.create_task(inner())


KINDS: dict[str, type[Kind]] = {
    "cancel": Kind,
    "late": Late,
    "twice": Twice,
    "level": Level,
    "timeout": Timeout,
    "wait_for": WaitFor,
    "group": Group,
}
