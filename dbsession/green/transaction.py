"""A whole unit of work: run in a scope of its own, committed, and run again when the database asks for that."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any, Protocol, TypeVar, cast

from dbsession.core.retry import check, failed_part, pause_s, refuse_other_work, retryable, takes_session
from dbsession.errors import describe, plain
from dbsession.green import hub, scope
from dbsession.green.block import session_scope
from dbsession.green.scope import Scope

logger = logging.getLogger("dbsession.transaction")

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


class Manager(Protocol):
    """What a unit of work needs of `manager.SessionManager`."""

    def get(self, name: str) -> Any: ...

    def database(self, name: str) -> Any: ...


class Units:
    """Runs units of work on the databases of one manager. Lives as long as it."""

    def __init__(self, manager: Manager) -> None:
        self._manager = manager

    def run(
        self,
        fn: Callable[..., T],
        *,
        name: str = "default",
        attempts: int = 3,
        backoff_s: float = 0.05,
        label: str | None = None,
    ) -> T:
        """See `dbsession.run_in_transaction`."""
        check(attempts, backoff_s)
        _refuse_what_runs_later(fn)
        session = self._manager.get(name)
        call = functools.partial(fn, session) if takes_session(fn) else fn
        outer = scope.current()
        if outer is not None and (self, name) in outer.units:
            return self._join(outer, name, call)
        label = plain(label or getattr(fn, "__qualname__", "run_in_transaction()"))
        for attempt in range(1, attempts + 1):
            ended: list[str] = []
            try:
                return self._once(name, label, call, ended)
            except Exception as error:
                if attempt == attempts or ended or not retryable(error):
                    raise
                again = error
            self._manager.database(name).stats.retries += 1
            logger.info("Database %r: %s is run again after %s, attempt %d.", name, label, describe(again), attempt + 1)
            del again
            hub.sleep(pause_s(backoff_s, attempt))
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _once(self, name: str, label: str, call: Callable[[], T], ended: list[str]) -> T:
        """Run and commit it. `ended` gets what became of a transaction that `call` itself has ended, if that must not
        be done twice."""
        with session_scope(label) as unit:
            unit.units = {(self, name): None}
            try:
                result = call()
                self._refuse_failed_part(unit, name, label)
                refuse_other_work(self._manager, name, label, unit.sessions)
                self._manager.get(name).commit()
                return result
            except Exception:
                if unit.outcomes.get(name) in ("committed", "unknown"):
                    ended.append(unit.outcomes[name])
                raise
            finally:
                unit.units = {}

    def _refuse_failed_part(self, unit: Scope, name: str, label: str) -> None:
        failed = unit.units[(self, name)]
        if failed is not None:
            raise failed_part(name, label, failed) from failed

    def _join(self, outer: Scope, name: str, call: Callable[[], T]) -> T:
        try:
            return call()
        except BaseException as error:
            outer.units = {**outer.units, (self, name): error}  # half of it is done: the whole must not be committed
            raise


def transactional(run: Callable[..., Any], func: Callable[..., Any] | None, options: dict[str, Any]) -> Any:
    """The decorator over `run`, a `Units.run`; see `dbsession.transactional`."""

    def decorate(func: F) -> F:
        _refuse_what_runs_later(func)
        check(options.get("attempts", 1), options.get("backoff_s", 1))

        @functools.wraps(func)
        def unit(*args: Any, **kwargs: Any) -> Any:
            def call() -> Any:
                return func(*args, **kwargs)

            return run(call, **{"label": func.__qualname__, **options})

        return cast("F", unit)

    if func is not None and not callable(func):
        raise TypeError(f"transactional takes its arguments by keyword: name={func!r}, perhaps.")
    return decorate if func is None else decorate(func)


def _refuse_what_runs_later(fn: Callable[..., Any]) -> None:
    if inspect.isgeneratorfunction(fn) or inspect.iscoroutinefunction(fn) or inspect.isasyncgenfunction(fn):
        raise TypeError(
            f"{fn.__name__} cannot be run in a transaction: its body runs after its call has returned, when the "
            "transaction is over."
        )
