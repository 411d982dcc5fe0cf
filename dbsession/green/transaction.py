"""A whole unit of work: run in a scope of its own, committed, and run again when the database asks for that."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, TypeVar

from dbsession.core import functions
from dbsession.core.retry import Attempts, decorator
from dbsession.green import hub, scope
from dbsession.green.block import session_scope

logger = logging.getLogger("dbsession.transaction")

T = TypeVar("T")

_INSTEAD = "Use aio.run_in_transaction() for it."


def run(manager: Any, fn: Callable[..., T], **options: Any) -> T:
    """Run and commit `fn` on a database of `manager`; see `dbsession.run_in_transaction`."""
    work = Attempts(manager, fn, logger, **options)
    outer = scope.current()
    if work.is_part_of(outer):
        with work.part_of(outer):
            joined: T = work.call()
            functions.refuse_coroutine(joined, work.label, _INSTEAD)
            return joined
    name = options.get("name", "default")
    while True:
        try:
            with session_scope(work.label) as own, work.whole(own):
                result: T = work.call()
                functions.refuse_coroutine(result, work.label, _INSTEAD)
                work.refuse_half(own)
                manager.get(name).commit()
                return result
        except Exception as error:
            pause_s = work.pause_after(error)
            if pause_s is None:
                raise
        hub.sleep(pause_s)


def transactional(manager: Any, func: Callable[..., Any] | None, options: dict[str, Any]) -> Any:
    """Make the decorator of a manager; see `dbsession.transactional`."""

    def wrap(func: Callable[..., Any]) -> Any:
        @functools.wraps(func)
        def whole(*args: Any, **kwargs: Any) -> Any:
            def call() -> Any:
                return func(*args, **kwargs)

            return run(manager, call, **{**options, "label": options.get("label") or functions.name_of(func)})

        return whole

    return decorator(wrap, func, options)
