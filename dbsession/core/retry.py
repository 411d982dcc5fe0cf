"""`run_in_transaction()` in both halves: when a unit of work is run again, after which pause, and what keeps it from
being committed."""

from __future__ import annotations

import functools
import inspect
import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from dbsession.core import backends, functions
from dbsession.core.config import positive_seconds
from dbsession.core.functions import runs_later
from dbsession.core.scope import BaseScope, checked_label
from dbsession.core.unsaved import unsaved
from dbsession.errors import CommitOutcomeUnknown, ConfigError, RollbackRequired, UnsavedWork, describe

_LONGEST_BACKOFF_S = 2.0


class Attempts:
    """The attempts at one unit of work. Lives for one `run_in_transaction()`; `awaited`: in asyncio.

    `call` runs the work once, with the session if it takes one; `label` is what reports call it.
    """

    def __init__(
        self,
        manager: Any,
        fn: Callable[..., Any],
        logger: logging.Logger,
        *,
        name: str = "default",
        attempts: int = 3,
        backoff_s: float = 0.05,
        label: str | None = None,
        awaited: bool = False,
    ) -> None:
        if not callable(fn):
            raise TypeError(f"run_in_transaction() was given a {type(fn).__qualname__}: give the function to run.")
        _check(attempts, backoff_s)
        label = checked_label(label, "a transaction")
        _refuse_what_runs_later(fn, awaited)
        session = manager.get(name)
        self.call = functools.partial(fn, session) if _takes_session(fn) else fn
        self.label = label or functions.name_of(fn)
        self._manager = manager
        self._name = name
        self._key = manager, name  # in a scope's `transactions`
        self._logger = logger
        self._attempts = attempts
        self._backoff_s = backoff_s
        self._failed = 0
        self._ended = False  # the last attempt's work has ended a transaction itself, which must not be done twice

    def is_part_of(self, scope: BaseScope | None) -> bool:
        """Whether `scope` is that of a `run_in_transaction()` on the same database, which this one joins."""
        return scope is not None and self._key in scope.transactions

    @contextmanager
    def part_of(self, outer: Any) -> Iterator[None]:
        """Return the context round the call of a unit of work that joins the one of the scope `outer`."""
        try:
            yield
        except BaseException as error:
            # Half of it is done: the whole must not be committed.
            outer.transactions = {**outer.transactions, self._key: error}
            raise

    @contextmanager
    def whole(self, own: Any) -> Iterator[None]:
        """Return the context round the call and the commit in a scope of its own."""
        own.transactions = {self._key: None}
        try:
            yield
        except Exception:
            self._ended = own.outcomes.get(self._name) in ("committed", "unknown")
            raise
        finally:
            own.transactions = {}

    def refuse_half(self, own: BaseScope) -> None:
        """Raise what keeps the work done in the scope `own` from being committed.

        Raises:
            RollbackRequired: [DBS-ROLLBACK] a part of it has failed, and it went on.
            UnsavedWork: [DBS-UNSAVED] it leaves unsaved work in the session of another database.
        """
        failed = own.transactions[self._key]
        if failed is not None:
            raise RollbackRequired(
                f"Database {self._name!r}: {self.label} went on after a part of it, run in the same transaction, had "
                f"failed with {describe(failed)}. Nothing was committed: let the error pass, or give the part a "
                "session_scope() of its own."
            ) from failed
        for database, session in own.sessions.items():
            session = getattr(session, "sync_session", session)
            if (database.owner, database.name) == self._key or not session.in_transaction():
                continue
            what = unsaved(session)
            if what:
                raise UnsavedWork(
                    f"{self.label} is a transaction on {self._name!r}, but its session of {database.name!r} has "
                    f"unsaved work ({what}) that nobody would commit. Commit it yourself; nothing was committed."
                )

    def pause_after(self, error: Exception) -> float | None:
        """Seconds to wait before the next attempt, after this one ended with `error`; None if there is none."""
        self._failed += 1
        if self._failed == self._attempts or self._ended or not retryable(error):
            return None
        self._manager.database(self._name).stats.retries += 1
        self._logger.info(
            "Database %r: %s is run again after %s, attempt %d.",
            self._name,
            self.label,
            describe(error),
            self._failed + 1,
        )
        # Full jitter: those that met at one row must not meet there again. Ten lines of tenacity would be one more
        # package to install, and it catches kills before it lets them go.
        return random.uniform(0, min(_LONGEST_BACKOFF_S, self._backoff_s * 2 ** (self._failed - 1)))


def decorator(
    wrap: Callable[[Callable[..., Any]], Any],
    func: Callable[..., Any] | None,
    options: dict[str, Any],
    awaited: bool = False,
) -> Any:
    """The decorator `transactional`, with and without arguments: `wrap` makes a checked function a unit of work."""
    unknown = options.keys() - _OPTIONS
    if unknown:
        raise TypeError(f"transactional takes {', '.join(_OPTIONS)} by keyword, and not {', '.join(sorted(unknown))}.")
    _check(options.get("attempts", 1), options.get("backoff_s", 1))
    checked_label(options.get("label"), "a transaction")

    def check(func: Callable[..., Any]) -> None:
        _refuse_what_runs_later(func, awaited)

    def decorate(func: Callable[..., Any]) -> Any:
        return functions.decorated(func, "transactional", check, wrap)

    if func is not None and not functions.is_given(func):
        raise TypeError("transactional takes its arguments by keyword: name='reports', perhaps.")
    return decorate if func is None else decorate(func)


_OPTIONS = ("name", "attempts", "backoff_s", "label")


def _check(attempts: object, backoff_s: object) -> None:
    """Raise ConfigError if these are no arguments of `run_in_transaction`."""
    if isinstance(attempts, bool) or not isinstance(attempts, int) or attempts < 1:
        raise ConfigError(f"`attempts` of a transaction is {attempts!r}: give a whole number, 1 or more.")
    positive_seconds(backoff_s, "`backoff_s` of a transaction")


def _refuse_what_runs_later(fn: Callable[..., Any], awaited: bool) -> None:
    if runs_later(fn, awaited):
        raise TypeError(
            f"{functions.name_of(fn)} cannot be run in a transaction: its body runs after its call has returned, when "
            "the transaction is over."
        )


def _takes_session(fn: Callable[..., Any]) -> bool:
    """Whether `fn` cannot be called without an argument: then it gets the session."""
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):  # a builtin without one
        return False
    required = [each for each in parameters if each.default is each.empty]
    return any(each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD) for each in required)


def retryable(error: BaseException) -> bool:
    """Whether the database asks for the whole unit to be run again; never when it may have been committed."""
    if isinstance(error, CommitOutcomeUnknown):
        return False
    if isinstance(error, RollbackRequired):  # somebody went on after it
        return error.__cause__ is not None and retryable(error.__cause__)
    original = getattr(error, "orig", None) or error
    return backends.is_retryable(original)
