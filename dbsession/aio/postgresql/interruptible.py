"""Awaiting what a driver does, and knowing first when something interrupts it."""

from __future__ import annotations

import asyncio
import types
from collections.abc import Callable, Coroutine, Generator
from contextlib import suppress
from typing import Any


@types.coroutine
def interruptible(
    work: Coroutine[Any, Any, Any], interrupted: Callable[[BaseException], None], cut: Callable[[], None]
) -> Generator[Any, Any, Any]:
    """Await `work`, and call `interrupted` with what is thrown in meanwhile, which comes out again, whatever `work`
    does with it: asyncpg reads on where it is cancelled in the middle of an executemany(), for ever. `cut` ends that.
    """
    try:
        awaited = work.send(None)
        while True:
            try:
                yield awaited
            except BaseException as error:
                if not _is_answer(error, awaited):
                    kill = error
                    break
                answer: BaseException | None = error
            else:
                answer = None
            awaited = work.send(None) if answer is None else work.throw(answer)
    except StopIteration as end:
        return end.value
    interrupted(kill)
    try:
        awaited = work.throw(kill)
        cut()
        while not isinstance(kill, GeneratorExit):
            with suppress(BaseException):
                yield awaited
            awaited = work.send(None)
        work.close()
    except BaseException:
        pass  # it has come to an end, in whichever way
    raise kill


def _is_answer(error: BaseException, awaited: Any) -> bool:
    """Return whether it is what was waited for: a task throws in what its future has for an exception."""
    return (
        isinstance(awaited, asyncio.Future)
        and awaited.done()
        and not awaited.cancelled()
        and awaited.exception() is error
    )
