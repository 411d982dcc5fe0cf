"""A test's coroutine in an event loop of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import uvloop

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}


def in_loop(name: str) -> Callable[[Callable[[], Awaitable[Any]]], Any]:
    """What runs a coroutine function in a new loop of this name, for 30 s at most."""

    def run(main: Callable[[], Awaitable[Any]]) -> Any:
        async def bounded() -> Any:
            async with asyncio.timeout(30):
                return await main()

        with asyncio.Runner(loop_factory=LOOPS[name]) as runner:
            return runner.run(bounded())

    return run
