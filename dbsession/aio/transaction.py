"""A whole unit of work in asyncio: run in a scope of its own, committed, run again when the database asks for that."""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any, Protocol, TypeVar, cast

from dbsession.aio import scope
from dbsession.aio.block import session_scope
from dbsession.aio.scope import Scope
from dbsession.core.retry import check, failed_part, pause_s, refuse_other_work, retryable, takes_session
from dbsession.errors import describe, plain

logger = logging.getLogger("dbsession.aio.transaction")

F = TypeVar("F", bound=Callable[..., Any])


class Manager(Protocol):
    """What a unit of work needs of `manager.SessionManager`."""

    def get(self, name: str) -> Any: ...

    def database(self, name: str) -> Any: ...


class Units:
    """Runs units of work on the databases of one manager. Lives as long as it."""

    def __init__(self, manager: Manager) -> None:
        self._manager = manager

    async def run(
        self,
        fn: Callable[..., Any],
        *,
        name: str = "default",
        attempts: int = 3,
        backoff_s: float = 0.05,
        label: str | None = None,
    ) -> Any:
        """See `dbsession.aio.run_in_transaction`."""
        check(attempts, backoff_s)
        refuse_generators(fn)
        session = self._manager.get(name)
        call = functools.partial(fn, session) if takes_session(fn) else fn
        outer = scope.current()
        if outer is not None and (self, name) in outer.units:
            return await self._join(outer, name, call)
        label = plain(label or getattr(fn, "__qualname__", "run_in_transaction()"))
        for attempt in range(1, attempts + 1):
            ended: list[str] = []
            try:
                return await self._once(name, label, call, ended)
            except Exception as error:
                if attempt == attempts or ended or not retryable(error):
                    raise
                again = error
            self._manager.database(name).stats.retries += 1
            logger.info("Database %r: %s is run again after %s, attempt %d.", name, label, describe(again), attempt + 1)
            del again
            await asyncio.sleep(pause_s(backoff_s, attempt))
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def _once(self, name: str, label: str, call: Callable[[], Any], ended: list[str]) -> Any:
        """Run and commit it. `ended` gets what became of a transaction that `call` itself has ended, if that must not
        be done twice."""
        async with session_scope(label) as unit:
            unit.units = {(self, name): None}
            try:
                result = await _result(call)
                failed = unit.units[(self, name)]
                if failed is not None:
                    raise failed_part(name, label, failed) from failed
                refuse_other_work(self._manager, name, label, unit.sessions)
                await self._manager.get(name).commit()
                return result
            except Exception:
                if unit.outcomes.get(name) in ("committed", "unknown"):
                    ended.append(unit.outcomes[name])
                raise
            finally:
                unit.units = {}

    async def _join(self, outer: Scope, name: str, call: Callable[[], Any]) -> Any:
        try:
            return await _result(call)
        except BaseException as error:
            outer.units = {**outer.units, (self, name): error}  # half of it is done: the whole must not be committed
            raise


async def _result(call: Callable[[], Any]) -> Any:
    result = call()
    return await result if inspect.isawaitable(result) else result


def transactional(run: Callable[..., Any], func: Callable[..., Any] | None, options: dict[str, Any]) -> Any:
    """The decorator over `run`, a `Units.run`; see `dbsession.aio.transactional`."""

    def decorate(func: F) -> F:
        refuse_generators(func)
        check(options.get("attempts", 1), options.get("backoff_s", 1))

        @functools.wraps(func)
        async def unit(*args: Any, **kwargs: Any) -> Any:
            def call() -> Any:
                return func(*args, **kwargs)

            return await run(call, **{"label": func.__qualname__, **options})

        return cast("F", unit)

    if func is not None and not callable(func):
        raise TypeError(f"transactional takes its arguments by keyword: name={func!r}, perhaps.")
    return decorate if func is None else decorate(func)


def refuse_generators(fn: Callable[..., Any]) -> None:
    """Raise TypeError for a function whose body runs after it was awaited."""
    if inspect.isgeneratorfunction(fn) or inspect.isasyncgenfunction(fn):
        raise TypeError(
            f"{fn.__name__} cannot be run in a transaction: its body runs after its call has returned, when the "
            "transaction is over."
        )
