"""A whole unit of work in asyncio: run in a scope of its own, committed, run again when the database asks for that."""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any

from dbsession.aio import scope
from dbsession.core import functions
from dbsession.core.retry import Attempts, decorator

logger = logging.getLogger("dbsession.aio.transaction")


async def run(manager: Any, fn: Callable[..., Any], **options: Any) -> Any:
    """Run and commit `fn` on a database of `manager`; see `dbsession.aio.run_in_transaction`."""
    work = Attempts(manager, fn, logger, awaited=True, **options)
    outer = scope.current()
    if work.is_part_of(outer):
        with work.part_of(outer):
            return await _result(work.call)
    name = options.get("name", "default")
    while True:
        try:
            async with scope.session_scope(work.label) as own:
                with work.whole(own):
                    result = await _result(work.call)
                    work.refuse_half(own)
                    await manager.get(name).commit()
                    return result
        except Exception as error:
            pause_s = work.pause_after(error)
            if pause_s is None:
                raise
        await asyncio.sleep(pause_s)


async def _result(call: Callable[[], Any]) -> Any:
    result = call()
    return await result if inspect.isawaitable(result) else result


def transactional(manager: Any, func: Callable[..., Any] | None, options: dict[str, Any]) -> Any:
    """Make the decorator of a manager; see `dbsession.aio.transactional`."""

    def wrap(func: Callable[..., Any]) -> Any:
        @functools.wraps(func)
        async def whole(*args: Any, **kwargs: Any) -> Any:
            def call() -> Any:
                return func(*args, **kwargs)

            return await run(manager, call, **{**options, "label": options.get("label") or functions.name_of(func)})

        return whole

    return decorator(wrap, func, options, awaited=True)
