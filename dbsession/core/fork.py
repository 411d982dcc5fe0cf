"""After a fork the child shares the parent's sockets and files. It abandons everything inherited, untouched.

    os.fork()    gunicorn, multiprocessing    `os.register_at_fork` calls us before anything else of the child does
    fork() in C  uWSGI, any C extension       nobody calls us: whoever is about to touch what may be inherited looks
                                              first whether this process is known, and runs the same hooks

The look is `if not KNOWN[0]: fork.found_out()`. It stands where a session is looked up and a scope begins or is asked
for, where a connection is taken, written to, read from, committed, rolled back and closed, and where processes differ
otherwise: periodic work, snapshots and counts, the inspection socket, the process's end. A hub of gevent's asks, too,
as its loop goes on in a child (`green.hub.watch_forks`).
"""

from __future__ import annotations

import _socket
import _thread
import atexit
import ctypes
import mmap
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

epoch = 0
"""How many forks this process is away from the first. Written by the hooks of a child, before anything of it that is
ours has been used."""

_MADV_WIPEONFORK = 18
"""From <linux/mman.h>: the kernel (4.14) gives each child an empty page in place of this one, whoever forks."""


class _ByPid:
    """Stands for `KNOWN` where the kernel does not tell of a fork: each look costs a system call."""

    def __init__(self) -> None:
        self._pid = os.getpid()

    def __getitem__(self, _: int) -> bool:
        return os.getpid() == self._pid

    def __setitem__(self, _: int, known: int) -> None:
        self._pid = os.getpid() if known else -1


def _page() -> Any:
    try:
        page = mmap.mmap(-1, mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        page.madvise(_MADV_WIPEONFORK)
    except (AttributeError, OSError, ValueError):  # another system, or an older kernel
        return _ByPid()
    return page


KNOWN = _page()
"""`KNOWN[0]` is false in a child that C code has forked, until its hooks have run."""
KNOWN[0] = 1

_hooks: list[Callable[[], object]] = []  # grows only, at imports mostly

# process -> the thread that has found out first, while it runs the hooks. Written by `setdefault` and `clear`, one step
# each.
_finding: dict[int, int] = {}
_running_in = 0  # the process in which they run now

# The thread that forks -> the parent's end and the child's, if the parent is to wait. Written by it, one step each.
_awaited: dict[int, tuple[_socket.socket, _socket.socket]] = {}

_abandoned: list[Any] = []

_dead: int | None = None  # the dead socket's descriptor; open as long as the process
_dead_is: tuple[int, int] | None = None


def abandon(connections: Iterable[tuple[Any, Any, Any]]) -> None:
    """Make sure that nothing this process does ever reaches the parent's connections. For the child; never waits.

    Args:
        connections: inherited DBAPI connections, each with its pool record or None, and what `identity()` was as it
            was opened: C code may have closed the descriptor since the fork, and its number be somebody else's.

    A dead socket is put over each descriptor, so that not a byte can be sent by whoever still holds the connection: a
    garbage collection, `finally` blocks of inherited greenlets, SQLAlchemy's own finalizers at exit. (And the parent's
    socket is not kept open from here, so that the server sees the parent's end.) The record forgets its connection,
    which disarms SQLAlchemy's clean-up. The connection object itself is never freed: the destructor of an SQLite
    connection would touch the file (https://www.sqlite.org/howtocorrupt.html, section 2.6).
    """
    for connection, record, opened_as in connections:
        if record is not None:
            record.dbapi_connection = None
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))  # not freed even when the interpreter ends
        _abandoned.append(connection)
        if identity(connection) == opened_as:
            cut(connection)


def cut(connection: Any) -> None:
    """Put a dead socket over the descriptor of a DBAPI connection: this process has no part in the old one any more."""
    global _dead
    descriptor = descriptor_of(connection)
    if descriptor is None or _dead is None:
        return
    if what_is(_dead) != _dead_is:  # C code has closed what it did not know
        _dead = None
        prepare()
    os.dup2(_dead or -1, descriptor, inheritable=False)


def give_up(record: Any) -> None:
    """Close a pool record's connection without its hub, for which its socket would wait even to be closed. The objects
    are left to the collector."""
    cut(record.dbapi_connection)
    record.dbapi_connection = None
    record.info.clear()


def prepare() -> None:
    """Make the dead socket, once: in the child there may be no descriptor left to make it from."""
    global _dead, _dead_is
    if _dead is None:
        # Not by `socket`: gevent's would build a hub in a native thread that never had one, and two threads that build
        # their first at once wait for each other inside gevent's imports.
        dead, peer = _socket.socketpair()
        peer.close()  # what is written to `dead` fails, what is read from it has ended
        dead.setblocking(False)
        _dead = dead.detach()
        _dead_is = what_is(_dead)


def descriptor_of(connection: Any) -> int | None:
    """The socket descriptor of a DBAPI connection; None when it has none, or is closed."""
    # Drivers that publish it (psycopg, mysqlclient) have fileno(). PyMySQL keeps the socket in `_sock`, a private name
    # with no other way to it; tests/unit/test_private_names.py fails loudly when the name goes.
    holder = connection if hasattr(connection, "fileno") else getattr(connection, "_sock", None)
    if holder is None:
        return None
    try:
        descriptor: int = holder.fileno()
    except Exception:  # closed meanwhile; each driver says so in its own way
        return None
    return descriptor if descriptor >= 0 else None


def identity(connection: Any) -> tuple[int, int] | None:
    """Which socket, of all in the kernel, the connection's descriptor is; None when it has none, or is closed."""
    descriptor = descriptor_of(connection)
    return None if descriptor is None else what_is(descriptor)


def what_is(file: int | str) -> tuple[int, int] | None:
    """Which file or socket, of all in the kernel, a descriptor or a path is; None if there is none."""
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def in_child(hook: Callable[[], object]) -> None:
    """Call `hook` in every child of this process, and in theirs, in the order of these calls. It runs when the child is
    alone, or, where C code has forked, at the first look. It must not wait."""
    _hooks.append(hook)


def found_out() -> None:
    """Run the hooks of a child that C code has forked. Waits only for another thread that has found out, too."""
    me = _thread.get_ident()
    process = os.getpid()
    first = _finding.setdefault(process, me)
    if KNOWN[0]:  # by another thread, just now
        _finding.clear()
    elif first != me:
        while not KNOWN[0]:
            os.sched_yield()
    elif _running_in != process:  # else a hook looks, too, or a destructor in the midst of one
        _run_hooks()


def _run_hooks() -> None:
    global epoch, _running_in
    epoch += 1
    _running_in, kill = os.getpid(), None
    for hook in list(_hooks):
        try:
            hook()
        except Exception:  # no reason to leave the rest undone
            sys.excepthook(*sys.exc_info())
        except BaseException as error:
            kill = error
    _let_parent_go_on()
    KNOWN[0] = 1
    _running_in = 0
    _finding.clear()
    if kill is not None:
        raise kill


def wait_for_child() -> None:
    """Have the parent of the fork that follows wait, for a second at most, until the child's hooks have run."""
    me = _thread.get_ident()
    if me not in _awaited:
        _awaited[me] = _socket.socketpair()


def _in_parent() -> None:
    ends = _awaited.pop(_thread.get_ident(), None)
    if ends is not None:
        ours, childs = ends
        childs.close()
        ours.settimeout(1.0)
        try:
            ours.recv(1)  # ends as the child closes its ends, or dies
        except OSError:
            pass
        finally:
            ours.close()


def _let_parent_go_on() -> None:
    while _awaited:
        for end in _awaited.popitem()[1]:
            end.close()


def look() -> None:
    """Run the hooks if this is a child that C code has forked."""
    if not KNOWN[0]:
        found_out()


os.register_at_fork(after_in_child=_run_hooks, after_in_parent=_in_parent)
atexit.register(look)  # before its connections are collected, of which some drivers would take leave
