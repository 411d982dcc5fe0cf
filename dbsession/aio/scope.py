"""The scopes of an asyncio task, and their end.

    task ── _dbsession_aio ──> Stack ──> [Scope, Scope ...]   outermost first; the last one is current
                                     ──> {database: session}  the current scope's own dict, for the fastest look-up
    _here: ContextVar ──> a Stack                             only to find it quickly, always looked at twice

A context is copied to child tasks, to callbacks and to the threads of `asyncio.to_thread`; so the Stack found in it
counts only if its own task is the one that runs now, in the thread of its loop. Whoever fails this has no scope of the
parent's. Who writes: a Stack and its scopes only code that runs in its task, or the task's done-callback; both run in
the loop's thread, and none of the functions here awaits between reading and writing. What is found as a Stack's
`sessions` changes in the same step as its scopes.
"""

from __future__ import annotations

import asyncio
import functools
import sys
from _thread import get_ident
from collections.abc import Callable, Coroutine, Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, cast, overload

from dbsession.aio import teardown
from dbsession.core import fork, functions
from dbsession.core.fork import KNOWN
from dbsession.core.functions import F
from dbsession.core.scope import BaseScope, BaseSessionScope
from dbsession.errors import ScopeEnded, ScopeRequired

current_task = asyncio.current_task

# The task that runs in a loop. Private before Python 3.12, where the public function is written in Python;
# tests/unit/test_private_names.py fails loudly when the name goes.
_tasks: Any = asyncio.tasks
task_in: Callable[[Any], Any] = current_task if sys.version_info >= (3, 12) else _tasks._current_tasks.get

_here: ContextVar[Stack | None] = ContextVar("dbsession.aio", default=None)
here = _here.get

_NO_SESSIONS: Mapping[Any, Any] = MappingProxyType({})


class Scope(BaseScope):
    """One unit of work: a request, a job, or the rest of a task. Ended by `end()`, by the end of its task (an implicit
    one), or when the last reference to it goes."""

    __slots__ = ("_stack", "kind", "loop", "read_timeout_s", "transactions")
    _AWAIT = "await "
    _stack: Stack  # on which it was opened, since a generator may be closed by another task
    loop: asyncio.AbstractEventLoop | None  # its stack's

    def __init__(self, label: str, kind: str = "block", read_timeout_s: float | None = None) -> None:
        super().__init__(label)
        self.kind = kind
        self.read_timeout_s = read_timeout_s
        self.transactions = BaseScope.transactions

    async def clear(self) -> None:
        """Close every session of this scope, which stays usable and empty. Waits for the server where a transaction is
        open."""
        await teardown.close_all(self.sessions, self.label)

    def leave(self) -> Coroutine[Any, Any, None]:
        """Take the scope off the stack on which it was opened, and return what ends it: see `end`."""
        self._stack.unlink(self)
        return self.end()

    async def end(self) -> None:
        """Close every session and refuse new ones. Idempotent. A cancellation that lands on the way is raised after
        the last session."""
        self.ended = True
        if self.sessions:
            await teardown.close_all(self.sessions, self.label)

    def end_aside(self) -> None:
        """End the scope without waiting: what is in a transaction is closed by a task of ours."""
        self.ended = True
        if self.sessions:
            self.leave_word()
            teardown.close_aside(self.sessions, self.label)

    def __del__(self) -> None:
        if self.sessions and not sys.is_finalizing():
            self.leave_word()
            teardown.close_dropped(self.sessions, self.label, self.loop)


class Stack:
    """The scopes of one task, and the sessions of the current one. Lives until the task is done, or as long as a
    context that was copied from it."""

    __slots__ = ("loop", "scopes", "sessions", "task", "thread")

    def __init__(self, task: asyncio.Task[object]) -> None:
        self.task: asyncio.Task[object] | None = task
        self.loop: asyncio.AbstractEventLoop | None = task.get_loop()
        self.thread = get_ident()
        self.scopes: list[Scope] = []
        self.sessions = _NO_SESSIONS
        task.add_done_callback(self._task_done)

    def push(self, scope: Scope) -> None:
        """Make `scope` the current one."""
        scope._stack = self
        scope.loop = self.loop
        self.scopes.append(scope)
        self.sessions = scope.sessions

    def unlink(self, scope: Scope) -> None:
        """Take the topmost `scope` out: nearly always the last one."""
        scopes = self.scopes
        for index in range(len(scopes) - 1, -1, -1):
            if scopes[index] is scope:
                del scopes[index]
                self.sessions = scopes[-1].sessions if scopes else _NO_SESSIONS
                return

    def _task_done(self, task: asyncio.Task[object]) -> None:
        # Contexts of children and callbacks may keep this object for long, but nothing else then.
        self.task = self.loop = None
        self.thread = 0  # no thread's: whoever finds this in a context sees at once that it is over
        scopes, self.scopes, self.sessions = self.scopes, [], _NO_SESSIONS
        for scope in reversed(scopes):
            if scope.kind == "implicit":  # a block's end is its own: a generator may be read on by another task
                # Not by its exception(): nobody would be told any more of one that is never retrieved.
                scope.failed = task.cancelled() or getattr(task, "_exception", None) is not None
                scope.end_aside()


def stack_here() -> Stack:
    """The calling task's own stack. Raises ScopeRequired where no task runs."""
    if not KNOWN[0]:
        fork.found_out()
    stack = here()
    if stack is None or stack.thread != get_ident() or task_in(stack.loop) is not stack.task:
        try:
            task: Any = current_task()
        except RuntimeError:
            raise ScopeRequired(
                "A session of dbsession.aio was used in a thread without a running event loop. It belongs to a task: "
                "use it in an `async def` function (a framework runs `def` endpoints in threads), or take "
                "dbsession.get_dbsession() inside `with dbsession.session_scope():` here."
            ) from None
        if task is None:
            raise ScopeRequired(
                "A session of dbsession.aio was used in a callback of the event loop, where no task runs: nothing "
                "would close it, and all callbacks would share it. Do the work in a task: asyncio.create_task(...)."
            )
        stack = getattr(task, "_dbsession_aio", None)
        if stack is None:
            stack = task._dbsession_aio = Stack(task)  # as an attribute it goes with the task
        _here.set(stack)
    return stack


def stack_of_caller() -> list[Scope]:
    """The scopes of the calling task; none where no task runs."""
    try:
        return list(stack_here().scopes)
    except ScopeRequired:
        return []


def current() -> Scope | None:
    """The calling task's current scope, or None when it has none. Raises ScopeRequired."""
    scopes = stack_here().scopes
    return scopes[-1] if scopes else None


def current_or_implicit() -> Scope:
    """The current scope; outside any, a new implicit one, which ends with the calling task. Raises ScopeRequired, and
    ScopeEnded where the current scope is over."""
    stack = stack_here()
    scopes = stack.scopes
    if not scopes:
        scope = Scope("the rest of a task", "implicit")
        stack.push(scope)  # at the bottom, for good; what is opened above it ends by its own token
        return scope
    scope = scopes[-1]
    if scope.ended:
        raise ScopeEnded(
            f"{scope.label} is over and its sessions are closed, but a session was asked for in it. Something kept "
            "working after its unit of work had ended; open one of its own with `async with aio.session_scope():`."
        )
    return scope


def begin(label: str, kind: str, read_timeout_s: float | None = None) -> Scope:
    """Open a scope, which is the calling task's current one until its `leave()`. Raises ScopeRequired."""
    stack = stack_here()
    scope = Scope(label, kind, read_timeout_s)
    stack.push(scope)
    return scope


@overload
def session_scope(label: F, *, read_timeout_s: float | None = None) -> F: ...
@overload
def session_scope(label: str | None = None, *, read_timeout_s: float | None = None) -> SessionScope: ...
def session_scope(label: Any = None, *, read_timeout_s: float | None = None) -> Any:
    """Open a new scope nested in the task's current one: for a job, a step, a part of a request.

    `async with aio.session_scope() as scope:` is `dbsession.session_scope` for tasks; it also decorates coroutine
    functions, with or without parentheses. Here `read_timeout_s` bounds the whole answer to a statement. A cancellation
    that lands in the teardown is raised after the last session.

    Raises:
        ScopeRequired: [DBS-SCOPE-REQUIRED] opened where no task runs.
        ConfigError: [DBS-CONFIG] `read_timeout_s` is no number above 0.
        TypeError: it decorates what is no coroutine function; `UnusableArgument` [DBS-ARGUMENT] for a label that is no
            text.
    """
    if functions.is_given(label):
        return SessionScope.checked(None, read_timeout_s)(label)
    return SessionScope.checked(label, read_timeout_s)


class SessionScope(BaseSessionScope):
    """What `session_scope()` returns. Lives for one block, or for the function that it decorates."""

    __slots__ = ()

    def __call__(self, func: F) -> F:
        return cast("F", functions.decorated(func, "aio.session_scope()", self._check, self._around))

    @staticmethod
    def _check(func: Callable[..., Any]) -> None:
        if not functions.is_async(func):
            raise TypeError(
                f"aio.session_scope() cannot decorate {functions.name_of(func)}: it is for `async def` functions, no "
                "generators. Use `async with aio.session_scope():` inside it."
            )

    def _around(self, func: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(func)
        async def scoped(*args: Any, **kwargs: Any) -> Any:
            async with self._another(func):
                return await func(*args, **kwargs)

        return scoped

    async def __aenter__(self) -> Scope:
        self._refuse_second_use()
        scope: Scope = begin(self._shown_label, self._kind, self._read_timeout_s)
        self._scope = scope
        return scope

    async def __aexit__(self, kind: object, *_: object) -> None:
        scope, self._scope = self._scope, None
        if scope is not None:
            scope.failed = scope.failed or kind is not None
            await scope.leave()


def _after_fork_in_child() -> None:
    # asyncio still takes the parent's task for the one that runs in the parent's loop. A loop that the child runs from
    # inside that task copies this context, and all of its tasks would share the parent's scope.
    stack = here()
    if stack is not None:
        stack.thread = 0


fork.in_child(_after_fork_in_child)
