"""session_scope() in asyncio: a scope of its own for a block, or for a coroutine function."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

from dbsession.aio.scope import Scope, Stack, stack_here
from dbsession.core.config import positive_seconds
from dbsession.errors import plain

F = TypeVar("F", bound=Callable[..., Any])


def session_scope(label: str | None = None, *, read_timeout_s: float | None = None) -> SessionScope:
    """A new scope nested in the task's current one: for a job, a step, a part of a request.

    `async with aio.session_scope():` Its sessions are its own; they are closed when the block ends, however it ends.
    Nothing is committed for you. Also usable as a decorator of a coroutine function.

    Args:
        label: what reports call this unit of work, for instance "nightly import".
        read_timeout_s: seconds within which the whole answer to a statement of its sessions must come from MySQL or
            MariaDB, in place of the database's `read_timeout_s`: for a long report.

    Returns:
        An async context manager that gives the Scope.

    Raises:
        ScopeRequired: [DBS-SCOPE-REQUIRED] opened where no task runs.
        ConfigError: [DBS-CONFIG] `read_timeout_s` is no number above 0.
        TypeError: it decorates what is no coroutine function.
        CancelledError: one that landed in the teardown, after the last session.
    """
    if read_timeout_s is not None:
        read_timeout_s = positive_seconds(read_timeout_s, "read_timeout_s of a session_scope()")
    return SessionScope(plain(label or "a session_scope()"), read_timeout_s=read_timeout_s)


class SessionScope:
    """What `session_scope()` returns. Lives for one block, or for the function that it decorates."""

    def __init__(self, label: str, kind: str = "block", read_timeout_s: float | None = None) -> None:
        self._label = label
        self._kind = kind
        self._read_timeout_s = read_timeout_s
        self._scope: Scope | None = None
        self._stack: Stack

    def __call__(self, func: F) -> F:
        if not inspect.iscoroutinefunction(func):
            raise TypeError(
                f"aio.session_scope() cannot decorate {getattr(func, '__name__', func)!r}: it is for `async def` "
                "functions. Use `async with aio.session_scope():` inside it."
            )

        @functools.wraps(func)
        async def scoped(*args: Any, **kwargs: Any) -> Any:
            async with SessionScope(self._label, self._kind, self._read_timeout_s):  # each call has its own
                return await func(*args, **kwargs)

        return cast("F", scoped)

    async def __aenter__(self) -> Scope:
        if self._scope is not None:
            raise RuntimeError("This aio.session_scope() is open already: call session_scope() for each block.")
        self._stack = stack_here()  # the opener's: a generator may be closed by another task
        self._scope = scope = Scope(self._label, self._kind, self._read_timeout_s)
        self._stack.push(scope)
        return scope

    async def __aexit__(self, *_: object) -> None:
        scope, self._scope = self._scope, None
        if scope is not None:
            self._stack.unlink(scope)
            await scope.end()
