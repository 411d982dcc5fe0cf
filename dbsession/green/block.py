"""`session_scope()`: a scope for a block, or for each call of a function."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast, overload

from dbsession.core import functions
from dbsession.core.functions import F
from dbsession.core.scope import BaseSessionScope
from dbsession.green import ident
from dbsession.green import scope as scopes


@overload
def session_scope(label: F, *, read_timeout_s: float | None = None) -> F: ...
@overload
def session_scope(label: str | None = None, *, read_timeout_s: float | None = None) -> SessionScope: ...
def session_scope(label: Any = None, *, read_timeout_s: float | None = None) -> Any:
    """Open a new scope nested in the current one: for a job, a script, a spawned greenlet, a thread pool's job.

    Its sessions are its own; they are closed when the block ends, however it ends. Nothing is committed for you.
    Also a decorator, with or without parentheses: each call of the function has a scope of its own.
    Do not wrap a `yield` in a generator that other code iterates: that code would run in your scope. Response bodies
    are the exception: the middleware suspends their scope between chunks.

    Args:
        label: what reports call this unit of work, for instance "nightly import"; or the function to decorate, whose
            name is then the label.
        read_timeout_s: seconds that its sessions wait for each piece of an answer of MySQL or MariaDB, in place of the
            database's `read_timeout_s`: for a long report.

    Returns:
        A context manager that gives the Scope.

    Raises:
        UsedInHub: [DBS-HUB] opened in the gevent Hub.
        ConfigError: [DBS-CONFIG] `read_timeout_s` is no number above 0.
        TypeError: it decorates what is no function, or runs after the scope has ended: a generator, an `async` one.
        UnusableArgument: [DBS-ARGUMENT] a label that is no text.
        BaseException: a kill or timeout that landed in the teardown. Switches greenlets there.
    """
    if functions.is_given(label):
        return SessionScope.checked(None, read_timeout_s)(label)
    return SessionScope.checked(label, read_timeout_s)


class SessionScope(BaseSessionScope):
    """What `session_scope()` returns. Lives for one `with` block, or for the function that it decorates."""

    __slots__ = ("_stack",)

    def __call__(self, func: F) -> F:
        return cast("F", functions.decorated(func, "session_scope()", self._check, self._around))

    @staticmethod
    def _check(func: Callable[..., Any]) -> None:
        if functions.runs_later(func):
            raise TypeError(
                f"session_scope() cannot decorate {functions.name_of(func)}: its body runs after its call has "
                "returned, when the scope is over. Use `with session_scope():` inside it."
            )

    def _around(self, func: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(func)
        def scoped(*args: Any, **kwargs: Any) -> Any:
            with self._another(func) as scope:
                result = func(*args, **kwargs)
                functions.refuse_coroutine(result, scope.label, "Use aio.session_scope() for it.")
                return result

        return scoped

    def __enter__(self) -> scopes.Scope:
        ident.refuse_hub()
        self._refuse_second_use()
        self._stack = scopes.stack_here()  # the opener's: a generator may be closed in another greenlet
        scope = scopes.OpenedScope(self._shown_label, self._kind, self._read_timeout_s)
        self._scope = scope
        self._stack.append(scope)
        return scope

    def __exit__(self, kind: object, *_: object) -> None:
        scope, self._scope = self._scope, None
        if scope is None:
            return
        scope.failed = scope.failed or kind is not None
        here = scopes.stack_here()
        scopes.unlink(self._stack, scope)
        if here is self._stack or scope in here:
            scopes.unlink(here, scope)
            scope.end()
        else:
            # A generator that somebody else closes, or the collector, wherever it ran: nobody is made to wait.
            scope.end_aside()
