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

import logging
import sys
import weakref
from functools import lru_cache, partial
from typing import Any

from dbsession.core.scope import Unit
from dbsession.errors import ScopeEnded
from dbsession.green import ident, teardown
from dbsession.green.hub import run_aside, run_in_thread

logger = logging.getLogger("dbsession.scope")


class Scope(Unit):
    """One unit of work: a request, a job, or the rest of a greenlet or thread. Ended by `end()`, by the end of its
    greenlet or thread (an implicit one), or when the last reference to it goes."""

    __slots__ = ("_parked_in", "above", "home", "timer")

    def __init__(self, label: str, kind: str = "block", read_timeout_s: float | None = None) -> None:
        super().__init__(label, kind, read_timeout_s)
        # Scopes opened inside this one by generators of its body: they are suspended and resumed with it. Replaced and
        # not added to, since most scopes never have any.
        self.above: tuple[Scope, ...] = ()
        self.timer: Any = None  # a request's deadline: stopped when the scope ends
        self.home: Any = None  # the hub whose sockets its sessions use, known with the first session
        self._parked_in: list[weakref.ref[Scope]] | None = None

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
            self.unpark()
        if self.sessions and not sys.is_finalizing():
            if ident.in_hub():  # a generator collected there, say
                self.end_aside()
            else:
                self.clear()

    def end_aside(self, dying_thread: bool = False) -> None:
        """End it in a greenlet or thread of ours. Never waits, so destructors and the Hub may call it."""
        self.ended = True
        self._stop_timer()
        if self.sessions:
            work = partial(teardown.close_all, self.sessions, self.label)
            if dying_thread:
                run_in_thread(work)
            else:
                run_aside(work, self.home)

    def ident_ended(self, greenlet: object | None) -> None:
        """What `ident.on_end` calls."""
        self.end_aside(dying_thread=greenlet is None)

    def _stop_timer(self) -> None:
        timer, self.timer = self.timer, None
        if timer is not None:
            timer.close()

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


@lru_cache
def _implicit_label(kind: str) -> str:
    return f"the rest of a {kind}"  # one text for all of them, not one for each


def end_dead() -> None:
    """End the implicit scopes of raw greenlets that are dead but still referenced. Called before anybody waits in a
    pool."""
    for dead in ident.dead_idents():
        stack = getattr(dead, "_dbsession_scopes", None)
        if stack:
            stack[0].end_aside()


class running:
    """Makes `scope` current on the calling ident inside the block, and suspends it again at its end, together with the
    scopes that were opened inside it and not closed yet."""

    __slots__ = ("_scope", "_stack")

    def __init__(self, scope: Scope) -> None:
        self._scope = scope

    def __enter__(self) -> None:
        self._stack = stack = stack_here()
        stack.append(self._scope)
        if self._scope.above:
            stack.extend(scope for scope in self._scope.above if not scope.ended)
            self._scope.above = ()

    def __exit__(self, *_: object) -> None:
        stack = self._stack
        for index in range(len(stack) - 1, -1, -1):
            if stack[index] is self._scope:
                self._scope.above = tuple(stack[index + 1 :])
                del stack[index:]
                return


def begin_request(label: str) -> Scope:
    """A new scope for a request; it is current only inside `running(scope)`.

    When no request is running on this ident, the suspended ones that were left here were abandoned by the server
    (PEP 3333 obliges it to call close()): they are ended now. May switch greenlets then.
    """
    stack = stack_here()
    if stack and stack[-1].ended:  # an exception between two lines of ours may have left it
        stack[:] = [scope for scope in stack if not scope.ended]
    parked = getattr(ident.current(), "_dbsession_parked", ())
    if parked and not any(scope.kind == "request" for scope in stack):
        for reference in list(parked):
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
    return Scope(label, "request")
