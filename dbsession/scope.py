"""The scope: one unit of work and the sessions it used; and the stack of scopes of each ident.

    greenlet ── _dbsession_scopes ──> [implicit scope, session_scope(), request]      the last one is current
             └─ _dbsession_parked ──> [weak references to suspended request scopes]
    Scope    ── sessions ──> {Database: Session}                                      the used set

Who may write: the two lists only the ident they hang on, with two exceptions, each a single list operation and so one
step of the interpreter: a `session_scope()` left in another greenlet takes itself out of the first, and a request
that is read on or ends elsewhere out of the second. `sessions` is written by the ident on which the scope is current,
and emptied by whoever ends it, entry by entry (`dict.popitem`, one step). No function here switches greenlets between
reading one of them and writing it.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar, cast

from dbsession import ident, teardown
from dbsession.errors import ScopeEnded
from dbsession.hub import run_aside, run_in_thread

logger = logging.getLogger(__name__)

F = TypeVar("F", bound=Callable[..., Any])


class Scope:
    """One unit of work: a request, a job, or the rest of a greenlet or thread. Ended by `end()`, by the end of its
    greenlet or thread (an implicit one), or when the last reference to it goes.

    `label` is what reports call it, `ended` whether it is over.
    """

    __slots__ = ("__weakref__", "_parked_in", "above", "ended", "home", "is_request", "label", "sessions")

    def __init__(self, label: str, is_request: bool = False) -> None:
        self.label = label
        self.is_request = is_request
        self.ended = False
        self.sessions: teardown.Sessions = {}
        self.home: Any = None  # the hub whose sockets its sessions use, known with the first session
        # Scopes opened inside this one by generators of its body: they are suspended and resumed with it.
        self.above: list[Scope] = []
        self._parked_in: list[weakref.ref[Scope]] | None = None

    def __repr__(self) -> str:
        return f"<Scope {self.label!r}{' ended' if self.ended else ''}, {len(self.sessions)} sessions>"

    def clear(self) -> None:
        """Close every session of this scope, which stays usable and empty. May switch greenlets; a kill passes."""
        teardown.close_all(self.sessions, self.label)

    def end(self) -> None:
        """Close every session and refuse new ones. Idempotent. May switch greenlets (never in the Hub: there the
        closing is put aside); a kill that lands on the way is raised after the last session."""
        self.ended = True
        self.unpark()
        if self.sessions and not sys.is_finalizing():
            if ident.in_hub():  # a generator collected there, say
                self.end_aside()
            else:
                self.clear()

    def end_aside(self, dying_thread: bool = False) -> None:
        """End it in a greenlet or thread of ours. Never waits, so destructors and the Hub may call it."""
        self.ended = True
        if self.sessions:
            work = partial(teardown.close_all, self.sessions, self.label)
            if dying_thread:
                run_in_thread(work)
            else:
                run_aside(work, self.home)

    def __del__(self) -> None:
        if self.sessions and not sys.is_finalizing():
            self.end_aside()

    def park(self) -> None:
        """Note on the calling ident that this request is suspended there, its body still to be read."""
        caller = ident.current()
        try:
            self._parked_in = caller._dbsession_parked
        except AttributeError:
            self._parked_in = caller._dbsession_parked = []
        self._parked_in.append(weakref.ref(self))

    def unpark(self) -> None:
        """It is read on, or over."""
        if self._parked_in is not None:
            try:
                self._parked_in.remove(weakref.ref(self))
            except ValueError:
                pass  # another thread ended it just now
            self._parked_in = None


def _stack() -> list[Scope]:
    caller = ident.current()
    try:
        stack: list[Scope] = caller._dbsession_scopes
    except AttributeError:
        stack = caller._dbsession_scopes = []
    return stack


def _unlink(stack: list[Scope], scope: Scope) -> None:
    """Take the topmost `scope` off `stack`: nearly always the last one."""
    for index in range(len(stack) - 1, -1, -1):
        if stack[index] is scope:
            del stack[index]
            return


def current() -> Scope | None:
    """The calling ident's current scope, or None when it has none."""
    stack = _stack()
    return stack[-1] if stack else None


def current_or_implicit() -> Scope:
    """The current scope; outside any, a new implicit one, which ends with the calling greenlet or thread.

    Raises:
        UsedInHub: [DBS-HUB] the caller is the gevent Hub.
        ScopeRequired: [DBS-SCOPE-REQUIRED] a job of gevent.threadpool outside any scope.
        ScopeEnded: [DBS-SCOPE-ENDED] the current scope is over: a response body read on after its scope was ended.
    """
    stack = _stack()
    if not stack:
        ident.refuse_hub()
        ident.refuse_pool_job()
        caller = ident.current()
        implicit = Scope(f"the rest of a {type(caller).__name__}")
        stack.append(implicit)  # at the bottom, for good; what is opened above it ends by its own token
        ident.on_end(caller, implicit.end_aside)
    scope = stack[-1]
    if scope.ended:
        raise ScopeEnded(
            f"{scope.label} is over and its sessions are closed, but a session was asked for in it. Something kept "
            "working after its unit of work had ended; open one of its own with `with dbsession.session_scope():`."
        )
    return scope


def end_dead() -> None:
    """End the implicit scopes of raw greenlets that are dead but still referenced. Called before anybody waits in a
    pool."""
    for dead in ident.dead_idents():
        stack = getattr(dead, "_dbsession_scopes", None)
        if stack:
            stack[0].end_aside()


def session_scope(label: str | None = None) -> SessionScope:
    """A new scope nested in the current one: for a job, a script, a spawned greenlet, a thread pool's job.

    Its sessions are its own; they are closed when the block ends, however it ends. Nothing is committed for you.
    Also usable as a decorator of a function. Not for round the `yield` of a generator that others iterate: whoever
    reads it on would run in the generator's scope. (In a response body it is all right; the body's scopes are
    suspended with it.)

    Args:
        label: what reports call this unit of work, for instance "nightly import".

    Returns:
        A context manager that gives the Scope.

    Raises:
        UsedInHub: [DBS-HUB] opened in the gevent Hub.
        TypeError: it decorates a generator or `async` function, which runs after its call, and so after the scope.
        BaseException: a kill or timeout that landed in the teardown. Switches greenlets there.
    """
    return SessionScope(label or "a session_scope()")


class SessionScope:
    """What `session_scope()` returns. Lives for one `with` block, or for the function that it decorates."""

    def __init__(self, label: str) -> None:
        self._label = label

    def __call__(self, func: F) -> F:
        if inspect.isgeneratorfunction(func) or inspect.iscoroutinefunction(func) or inspect.isasyncgenfunction(func):
            raise TypeError(
                f"session_scope() cannot decorate {func.__name__}: its body runs after its call has returned, when the "
                "scope is over. Use `with session_scope():` inside it."
            )

        @functools.wraps(func)
        def scoped(*args: Any, **kwargs: Any) -> Any:
            with SessionScope(self._label):  # each call has a scope of its own
                return func(*args, **kwargs)

        return cast("F", scoped)

    def __enter__(self) -> Scope:
        ident.refuse_hub()
        self._stack = _stack()  # the opener's: a generator may be closed in another greenlet
        self._scope = Scope(self._label)
        self._stack.append(self._scope)
        return self._scope

    def __exit__(self, *_: object) -> None:
        here = _stack()
        _unlink(self._stack, self._scope)
        if here is self._stack or self._scope in here:
            _unlink(here, self._scope)
            self._scope.end()
        else:
            # A generator that somebody else closes, or that the collector found in somebody else's greenlet or in the
            # Hub. Who it is cannot be told, so nobody is made to wait.
            self._scope.end_aside()


class running:
    """Makes `scope` current on the calling ident inside the block, and suspends it again at its end, together with the
    scopes that were opened inside it and not closed yet."""

    __slots__ = ("_scope", "_stack")

    def __init__(self, scope: Scope) -> None:
        self._scope = scope

    def __enter__(self) -> None:
        self._stack = stack = _stack()
        stack.append(self._scope)
        if self._scope.above:
            stack.extend(scope for scope in self._scope.above if not scope.ended)
            self._scope.above = []

    def __exit__(self, *_: object) -> None:
        stack = self._stack
        for index in range(len(stack) - 1, -1, -1):
            if stack[index] is self._scope:
                self._scope.above = stack[index + 1 :]
                del stack[index:]
                return


def begin_request(label: str) -> Scope:
    """A new scope for a request; it is current only inside `running(scope)`.

    When no request is running on this ident, the suspended ones that were left here were abandoned by the server
    (PEP 3333 obliges it to call close()): they are ended now. May switch greenlets then.
    """
    stack = _stack()
    if stack and stack[-1].ended:  # an exception between two lines of ours may have left it
        stack[:] = [scope for scope in stack if not scope.ended]
    if not any(scope.is_request for scope in stack):
        for reference in list(getattr(ident.current(), "_dbsession_parked", ())):
            abandoned = reference()
            if abandoned is not None and not abandoned.ended:
                if abandoned.sessions:  # else nothing was lost: a test client, say, whose answers nobody closes
                    logger.warning(
                        "%s never had close() called on its body by the server; its sessions are closed now, as %s "
                        "starts.",
                        abandoned.label,
                        label,
                    )
                abandoned.end()
    return Scope(label, is_request=True)
