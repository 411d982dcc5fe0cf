"""A whole unit of work: run in a scope of its own, committed, and run again when the database asks for that."""

from __future__ import annotations

import functools
import inspect
import logging
import random
from collections.abc import Callable
from typing import Any, Protocol, TypeVar, cast

from dbsession import hub, scope, sqlite
from dbsession.block import session_scope
from dbsession.config import positive_seconds
from dbsession.errors import CommitOutcomeUnknown, ConfigError, RollbackRequired, UnsavedWork, describe, plain
from dbsession.mysql import codes
from dbsession.scope import Scope
from dbsession.sessions import unsaved

logger = logging.getLogger(__name__)

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

_LONGEST_BACKOFF_S = 2.0


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
        _check(attempts, backoff_s)
        _refuse_what_runs_later(fn)
        session = self._manager.get(name)
        call = functools.partial(fn, session) if _takes_session(fn) else fn
        outer = scope.current()
        if outer is not None and (self, name) in outer.units:
            return self._join(outer, name, call)
        label = plain(label or getattr(fn, "__qualname__", "run_in_transaction()"))
        for attempt in range(1, attempts + 1):
            ended: list[str] = []
            try:
                return self._once(name, label, call, ended)
            except Exception as error:
                if attempt == attempts or ended or not _retryable(error):
                    raise
                again = error
            # Full jitter: those that met at one row must not meet there again. Ten lines of tenacity would be one
            # more package to install, and it catches kills before it lets them go.
            self._manager.database(name).stats.retries += 1
            pause_s = random.uniform(0, min(_LONGEST_BACKOFF_S, backoff_s * 2 ** (attempt - 1)))
            logger.info("Database %r: %s is run again after %s, attempt %d.", name, label, describe(again), attempt + 1)
            del again
            hub.sleep(pause_s)
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _once(self, name: str, label: str, call: Callable[[], T], ended: list[str]) -> T:
        """Run and commit it. `ended` gets what became of a transaction that `call` itself has ended, if that must not
        be done twice."""
        with session_scope(label) as unit:
            unit.units = {(self, name): None}
            try:
                result = call()
                self._refuse_failed_part(unit, name, label)
                self._refuse_other_work(unit, name, label)
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
            raise RollbackRequired(
                f"Database {name!r}: {label} went on after a part of it, run in the same transaction, had failed with "
                f"{describe(failed)}. Nothing was committed: let the error pass, or give the part a session_scope() of "
                "its own."
            ) from failed

    def _join(self, outer: Scope, name: str, call: Callable[[], T]) -> T:
        try:
            return call()
        except BaseException as error:
            outer.units = {**outer.units, (self, name): error}  # half of it is done: the whole must not be committed
            raise

    def _refuse_other_work(self, unit: Scope, name: str, label: str) -> None:
        for database, session in unit.sessions.items():
            what = unsaved(session) if database.name != name and session.in_transaction() else ""
            if what:
                raise UnsavedWork(
                    f"{label} is a transaction on {name!r}, but its session of {database.name!r} has unsaved work "
                    f"({what}) that nobody would commit. Commit it yourself; nothing was committed."
                )


def transactional(run: Callable[..., Any], func: Callable[..., Any] | None, options: dict[str, Any]) -> Any:
    """The decorator over `run`, a `Units.run`; see `dbsession.transactional`."""

    def decorate(func: F) -> F:
        _refuse_what_runs_later(func)
        _check(options.get("attempts", 1), options.get("backoff_s", 1))

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


def _check(attempts: object, backoff_s: object) -> None:
    if isinstance(attempts, bool) or not isinstance(attempts, int) or attempts < 1:
        raise ConfigError(f"`attempts` of a transaction is {attempts!r}: give a whole number, 1 or more.")
    positive_seconds(backoff_s, "`backoff_s` of a transaction")


def _takes_session(fn: Callable[..., Any]) -> bool:
    """Whether `fn` cannot be called without an argument: then it gets the session."""
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):  # a builtin without one
        return False
    required = [each for each in parameters if each.default is each.empty]
    return any(each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD) for each in required)


def _retryable(error: BaseException) -> bool:
    """Whether the database asks for the whole unit to be run again; never when it may have been committed."""
    if isinstance(error, CommitOutcomeUnknown):
        return False
    if isinstance(error, RollbackRequired):  # somebody went on after it
        return error.__cause__ is not None and _retryable(error.__cause__)
    original = getattr(error, "orig", None) or error
    return codes.is_retryable(original) or sqlite.is_retryable(original)
