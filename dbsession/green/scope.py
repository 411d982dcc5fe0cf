"""The scope: one unit of work and the sessions it used; and the stack of scopes of each ident.

    greenlet ── _dbsession_scopes ──> [implicit scope, session_scope(), request]      the last one is current
             │                        (implicit scope,)       a tuple, which is smaller, until another one is opened
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
from typing import Any

from gevent.hub import Hub

from dbsession.core import fork
from dbsession.core.fork import KNOWN
from dbsession.core.scope import BaseScope
from dbsession.errors import ScopeEnded
from dbsession.green import ident, teardown
from dbsession.green.hub import run_aside, run_in_thread


class Scope(BaseScope):
    """One unit of work: a request, a job, or the rest of a greenlet or thread. Ended by `end()`, by the end of its
    greenlet or thread (an implicit one), or when the last reference to it goes.

    An implicit one is this class itself; a request's and a block's is an OpenedScope."""

    __slots__ = ("owner_hub",)

    # Scopes opened inside this one by generators of its body: suspended and resumed with it; replaced as a whole.
    above: tuple[Scope, ...] = ()
    timer: Any = None  # a request's deadline: stopped when the scope ends
    complete: Any = None  # of a request: `dbsession.body_complete`, as dbsession.flask says it
    is_socket: bool = False  # of a request: it serves a WebSocket, or Engine.IO's polling in place of one
    _parked_in: list[weakref.ref[OpenedScope]] | None = None

    def __init__(self, label: str) -> None:
        BaseScope.__init__(self, label)  # as in OpenedScope: super() takes as long as a call
        self.owner_hub: Any = None  # the hub whose sockets its sessions use, known with the first session

    def clear(self) -> None:
        """Close every session of this scope, which stays usable and empty. May switch greenlets; a kill passes."""
        teardown.close_all(self.sessions, self.label)

    def end(self) -> None:
        """Close every session and refuse new ones. Idempotent. May switch greenlets (never in the Hub: there the
        closing is put aside); a kill that lands on the way is raised after the last session."""
        self.ended = True
        if self.timer is not None:
            _stop_timer(self)
        if self._parked_in is not None:
            _unpark(self)
        if self.sessions and not sys.is_finalizing():
            if isinstance(ident.current(), Hub):  # a generator collected there, say
                self.end_aside()
            else:
                teardown.close_all(self.sessions, self.label)

    def end_aside(self, dying_thread: bool = False) -> None:
        """End the scope in a greenlet or thread of ours. Never waits, so destructors and the Hub may call it."""
        self.ended = True
        if self.timer is not None:
            _stop_timer(self)
        if self.sessions:
            self.leave_word()
            work = functools.partial(teardown.close_all, self.sessions, self.label)
            if dying_thread:
                run_in_thread(work)
            else:
                run_aside(work, self.owner_hub)

    def thread_ended(self) -> None:
        """End an implicit scope: `ident.on_end` calls this when its thread has ended."""
        self.end_aside(dying_thread=True)

    def __del__(self) -> None:
        # uWSGI takes its interpreter to pieces without such a flag.
        if self.sessions and sys is not None and not sys.is_finalizing():
            self.end_aside()


class OpenedScope(Scope):
    """A scope that somebody opened, and ends: a request's, or that of a `session_scope()`."""

    __slots__ = ("_parked_in", "above", "complete", "is_socket", "kind", "read_timeout_s", "timer", "transactions")

    def __init__(self, label: str, kind: str = "block", read_timeout_s: float | None = None) -> None:
        Scope.__init__(self, label)
        self.kind = kind
        self.read_timeout_s = read_timeout_s
        self.transactions = Scope.transactions
        self.above = ()
        self.timer = self.complete = self._parked_in = None
        self.is_socket = False

    def resume(self) -> None:
        """Make the scope current on the calling ident, together with the scopes that were opened inside it and not
        closed yet. From here until `suspend()` or `leave()` it is nobody's abandoned request."""
        stack = stack_here()
        stack.append(self)
        if self._parked_in is not None:
            _unpark(self)
        if self.above:
            stack.extend(scope for scope in self.above if not scope.ended)
            self.above = ()

    def suspend(self, park: bool = False) -> None:
        """Take the scope off the calling ident's stack, with what was opened inside it; `park` as by `park()`."""
        stack = ident.current()._dbsession_scopes
        if stack and stack[-1] is self:
            del stack[-1]
        else:
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


def _unpark(scope: Any) -> None:
    parked, scope._parked_in = scope._parked_in, None
    if parked is not None:
        try:
            parked.remove(weakref.ref(scope))
        except ValueError:
            pass  # another thread ended it just now


def _stop_timer(scope: Any) -> None:
    timer, scope.timer = scope.timer, None
    if timer is not None:
        timer.close()


def stack_here() -> list[Scope]:
    """The calling ident's own stack."""
    caller = ident.current()
    stack = getattr(caller, "_dbsession_scopes", None)
    if type(stack) is not list:  # none yet, or an implicit scope alone
        stack = caller._dbsession_scopes = list(stack or ())
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
        scope = Scope(_implicit_label(type(caller).__name__))
        # At the bottom, for good; what is opened above it ends by its own token.
        if getattr(caller, "_dbsession_scopes", None) is None:
            caller._dbsession_scopes = (scope,)
        else:
            stack_here().append(scope)
        ident.on_end(caller, _greenlet_ended, scope.thread_ended)
    elif scope.ended:
        raise ScopeEnded(
            f"{scope.label} is over and its sessions are closed, but a session was asked for in it. Something kept "
            "working after its unit of work had ended; open one of its own with `with dbsession.session_scope():`."
        )
    return scope


def _greenlet_ended(greenlet: Any) -> None:
    # A function and no method: each of the greenlets would keep an object more.
    for scope in list(greenlet._dbsession_scopes):
        if scope.kind == "implicit":
            scope.failed = ident.has_failed(greenlet)
            scope.end_aside()


@functools.lru_cache
def _implicit_label(kind: str) -> str:
    return f"the rest of a {kind}"  # one text for all of them, not one for each


def end_dead() -> None:
    """End the implicit scopes of dead raw greenlets that are still referenced, before anybody waits in a pool."""
    for dead in ident.dead_idents():
        stack = getattr(dead, "_dbsession_scopes", None)
        if stack:
            stack[0].end_aside()


def begin_request(label: str) -> OpenedScope:
    """Begin a request's scope, which is current on the calling ident from here on."""
    if not KNOWN[0]:
        fork.found_out()
    stack = stack_here()
    if stack and stack[-1].ended:  # an exception between two lines of ours may have left it
        stack[:] = [scope for scope in stack if not scope.ended]
    scope = OpenedScope(label, "request")
    stack.append(scope)
    return scope
