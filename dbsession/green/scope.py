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
import sys
import weakref
from collections.abc import Callable
from typing import Any, cast, overload

from gevent.hub import Hub

from dbsession.core import fork, functions
from dbsession.core.fork import KNOWN
from dbsession.core.functions import F
from dbsession.core.scope import BaseScope, BaseSessionScope
from dbsession.errors import ScopeEnded
from dbsession.green import ident, teardown
from dbsession.green.hub import run_aside, run_in_thread


class Scope(BaseScope):
    """One unit of work: a request, a job, or the rest of a greenlet or thread. Ended by `end()`, by the end of its
    greenlet or thread (an implicit one), or when the last reference to it goes."""

    __slots__ = ("_parked_in", "above", "complete", "is_socket", "owner_hub", "timer")

    def __init__(self, label: str, kind: str = "block", read_timeout_s: float | None = None) -> None:
        super().__init__(label, kind, read_timeout_s)
        # Scopes opened inside this one by generators of its body: suspended and resumed with it; replaced as a whole.
        self.above: tuple[Scope, ...] = ()
        self.timer: Any = None  # a request's deadline: stopped when the scope ends
        self.complete: Any = None  # of a request: `dbsession.body_complete`, as dbsession.flask says it
        self.is_socket = False  # of a request: it serves a WebSocket, or Engine.IO's polling in place of one
        self.owner_hub: Any = None  # the hub whose sockets its sessions use, known with the first session
        self._parked_in: list[weakref.ref[Scope]] | None = None

    def resume(self) -> None:
        """Make the scope current on the calling ident, together with the scopes that were opened inside it and not
        closed yet. From here until `suspend()` or `leave()` it is nobody's abandoned request."""
        caller = ident.current()
        try:
            stack: list[Scope] = caller._dbsession_scopes
        except AttributeError:
            stack = caller._dbsession_scopes = []
        stack.append(self)
        if self._parked_in is not None:
            self._unpark()
        if self.above:
            stack.extend(scope for scope in self.above if not scope.ended)
            self.above = ()

    def suspend(self, park: bool = False) -> None:
        """Take the scope off the calling ident's stack, with what was opened inside it; `park` as by `park()`."""
        stack = ident.current()._dbsession_scopes
        for index in range(len(stack) - 1, -1, -1):
            if stack[index] is self:
                self.above = tuple(stack[index + 1 :])
                del stack[index:]
                break
        if park and not self.ended:
            self.park()

    def park(self) -> None:
        """Note on the calling ident that this request is suspended there, its body still to be read."""
        caller = ident.current()
        try:
            self._parked_in = caller._dbsession_parked
        except AttributeError:
            self._parked_in = caller._dbsession_parked = []
        self._parked_in.append(weakref.ref(self))

    def leave(self) -> None:
        """Suspend the scope for good, and end it. May switch greenlets; a kill passes."""
        self.suspend()
        self.end()

    def _unpark(self) -> None:
        parked, self._parked_in = self._parked_in, None
        if parked is not None:
            try:
                parked.remove(weakref.ref(self))
            except ValueError:
                pass  # another thread ended it just now

    def clear(self) -> None:
        """Close every session of this scope, which stays usable and empty. May switch greenlets; a kill passes."""
        teardown.close_all(self.sessions, self.label)

    def end(self) -> None:
        """Close every session and refuse new ones. Idempotent. May switch greenlets (never in the Hub: there the
        closing is put aside); a kill that lands on the way is raised after the last session."""
        self.ended = True
        if self.timer is not None:
            self._stop_timer()
        if self._parked_in is not None:
            self._unpark()
        if self.sessions and not sys.is_finalizing():
            if isinstance(ident.current(), Hub):  # a generator collected there, say
                self.end_aside()
            else:
                teardown.close_all(self.sessions, self.label)

    def end_aside(self, dying_thread: bool = False) -> None:
        """End the scope in a greenlet or thread of ours. Never waits, so destructors and the Hub may call it."""
        self.ended = True
        self._stop_timer()
        if self.sessions:
            self.leave_word()
            work = functools.partial(teardown.close_all, self.sessions, self.label)
            if dying_thread:
                run_in_thread(work)
            else:
                run_aside(work, self.owner_hub)

    def ident_ended(self, greenlet: object | None) -> None:
        """End an implicit scope: `ident.on_end` calls this when its greenlet or thread has ended."""
        self.failed = ident.has_failed(greenlet)
        self.end_aside(dying_thread=greenlet is None)

    def _stop_timer(self) -> None:
        timer, self.timer = self.timer, None
        if timer is not None:
            timer.close()

    def __del__(self) -> None:
        # uWSGI takes its interpreter to pieces without such a flag.
        if self.sessions and sys is not None and not sys.is_finalizing():
            self.end_aside()


def stack_here() -> list[Scope]:
    """The calling ident's own stack."""
    caller = ident.current()
    try:
        stack: list[Scope] = caller._dbsession_scopes
    except AttributeError:
        stack = caller._dbsession_scopes = []
    return stack


def unlink(stack: list[Scope], scope: Scope) -> None:
    """Take the topmost `scope` off `stack`: nearly always the last one."""
    for index in range(len(stack) - 1, -1, -1):
        if stack[index] is scope:
            del stack[index]
            return


def current() -> Scope | None:
    """The calling ident's current scope, or None when it has none."""
    if not KNOWN[0]:
        fork.found_out()
    try:
        scope: Scope = ident.current()._dbsession_scopes[-1]
    except (AttributeError, IndexError):
        return None
    return scope


def current_or_implicit() -> Scope:
    """The current scope; outside any, a new implicit one, which ends with the calling greenlet or thread.

    Raises:
        UsedInHub: [DBS-HUB] the caller is the gevent Hub.
        ScopeRequired: [DBS-SCOPE-REQUIRED] a job of gevent.threadpool outside any scope.
        ScopeEnded: [DBS-SCOPE-ENDED] the current scope is over: a response body read on after its scope was ended.
    """
    scope = current()
    if scope is None:
        ident.refuse_hub()
        ident.refuse_pool_job()
        caller = ident.current()
        scope = Scope(_implicit_label(type(caller).__name__), "implicit")
        stack_here().append(scope)  # at the bottom, for good; what is opened above it ends by its own token
        ident.on_end(caller, scope.ident_ended)
    elif scope.ended:
        raise ScopeEnded(
            f"{scope.label} is over and its sessions are closed, but a session was asked for in it. Something kept "
            "working after its unit of work had ended; open one of its own with `with dbsession.session_scope():`."
        )
    return scope


@functools.lru_cache
def _implicit_label(kind: str) -> str:
    return f"the rest of a {kind}"  # one text for all of them, not one for each


def end_dead() -> None:
    """End the implicit scopes of dead raw greenlets that are still referenced, before anybody waits in a pool."""
    for dead in ident.dead_idents():
        stack = getattr(dead, "_dbsession_scopes", None)
        if stack:
            stack[0].end_aside()


def begin_request(label: str) -> Scope:
    """Begin a request's scope, which is current on the calling ident from here on."""
    if not KNOWN[0]:
        fork.found_out()
    caller = ident.current()
    stack = getattr(caller, "_dbsession_scopes", None)
    if stack and stack[-1].ended:  # an exception between two lines of ours may have left it
        stack[:] = [scope for scope in stack if not scope.ended]
    scope = Scope(label, "request")
    scope.resume()
    return scope


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

    def __enter__(self) -> Scope:
        ident.refuse_hub()
        self._refuse_second_use()
        self._stack = stack_here()  # the opener's: a generator may be closed in another greenlet
        scope: Scope = Scope(self._shown_label, self._kind, self._read_timeout_s)
        self._scope = scope
        self._stack.append(scope)
        return scope

    def __exit__(self, kind: object, *_: object) -> None:
        scope, self._scope = self._scope, None
        if scope is None:
            return
        scope.failed = scope.failed or kind is not None
        here = stack_here()
        unlink(self._stack, scope)
        if here is self._stack or scope in here:
            unlink(here, scope)
            scope.end()
        else:
            # A generator that somebody else closes, or the collector, wherever it ran: nobody is made to wait.
            scope.end_aside()
