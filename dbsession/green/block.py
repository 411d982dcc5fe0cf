"""session_scope(): a scope of its own for a block, or for a function."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

from dbsession.core.config import positive_seconds
from dbsession.errors import plain
from dbsession.green import ident
from dbsession.green.scope import Scope, stack_here, unlink

F = TypeVar("F", bound=Callable[..., Any])


def session_scope(label: str | None = None, *, read_timeout_s: float | None = None) -> SessionScope:
    """A new scope nested in the current one: for a job, a script, a spawned greenlet, a thread pool's job.

    Its sessions are its own; they are closed when the block ends, however it ends. Nothing is committed for you.
    Also usable as a decorator of a function. Not for round the `yield` of a generator that others iterate: whoever
    reads it on would run in the generator's scope. (In a response body it is all right; the body's scopes are
    suspended with it.)

    Args:
        label: what reports call this unit of work, for instance "nightly import".
        read_timeout_s: seconds that its sessions wait for each piece of an answer of MySQL or MariaDB, in place of the
            database's `read_timeout_s`: for a long report.

    Returns:
        A context manager that gives the Scope.

    Raises:
        UsedInHub: [DBS-HUB] opened in the gevent Hub.
        ConfigError: [DBS-CONFIG] `read_timeout_s` is no number above 0.
        TypeError: it decorates a generator or `async` function, which runs after its call, and so after the scope.
        BaseException: a kill or timeout that landed in the teardown. Switches greenlets there.
    """
    if read_timeout_s is not None:
        read_timeout_s = positive_seconds(read_timeout_s, "read_timeout_s of a session_scope()")
    return SessionScope(plain(label or "a session_scope()"), read_timeout_s)


class SessionScope:
    """What `session_scope()` returns. Lives for one `with` block, or for the function that it decorates."""

    def __init__(self, label: str, read_timeout_s: float | None = None) -> None:
        self._label = label
        self._read_timeout_s = read_timeout_s
        self._scope: Scope | None = None

    def __call__(self, func: F) -> F:
        if inspect.isgeneratorfunction(func) or inspect.iscoroutinefunction(func) or inspect.isasyncgenfunction(func):
            raise TypeError(
                f"session_scope() cannot decorate {func.__name__}: its body runs after its call has returned, when the "
                "scope is over. Use `with session_scope():` inside it."
            )

        @functools.wraps(func)
        def scoped(*args: Any, **kwargs: Any) -> Any:
            with SessionScope(self._label, self._read_timeout_s):  # each call has a scope of its own
                return func(*args, **kwargs)

        return cast("F", scoped)

    def __enter__(self) -> Scope:
        ident.refuse_hub()
        if self._scope is not None:
            raise RuntimeError("This session_scope() is open already: call session_scope() for each block.")
        self._stack = stack_here()  # the opener's: a generator may be closed in another greenlet
        self._scope = scope = Scope(self._label, read_timeout_s=self._read_timeout_s)
        self._stack.append(scope)
        return scope

    def __exit__(self, *_: object) -> None:
        scope, self._scope = self._scope, None
        if scope is None:
            return
        here = stack_here()
        unlink(self._stack, scope)
        if here is self._stack or scope in here:
            unlink(here, scope)
            scope.end()
        else:
            # A generator that somebody else closes, or that the collector found in somebody else's greenlet or in the
            # Hub. Who it is cannot be told, so nobody is made to wait.
            scope.end_aside()
