"""After a fork the child shares the parent's sockets and files. It abandons everything inherited, untouched.

`os.register_at_fork` calls us in every child, whoever forked it: gunicorn's arbiter, its dirty arbiter,
multiprocessing, `os.fork()` in the middle of a request. The hooks run before anything else of the child does.
"""

from __future__ import annotations

import _socket
import ctypes
import os
from collections.abc import Iterable
from typing import Any

epoch = 0
"""How many forks this process is away from the first. Written by the child's fork hook, when it is still alone."""

_abandoned: list[Any] = []

_dead: int | None = None  # the dead socket's descriptor; open as long as the process


def abandon(connections: Iterable[tuple[Any, Any]]) -> None:
    """Make sure that nothing this process does ever reaches the parent's connections. For the child; never waits.

    Args:
        connections: inherited DBAPI connections, each with its pool record or None.

    A dead socket is put over each descriptor, so that not a byte can be sent by whoever still holds the connection: a
    garbage collection, `finally` blocks of inherited greenlets, SQLAlchemy's own finalizers at exit. (And the parent's
    socket is not kept open from here, so that the server sees the parent's end.) The record forgets its connection,
    which disarms SQLAlchemy's clean-up. The connection object itself is never freed: the destructor of an SQLite
    connection would touch the file (https://www.sqlite.org/howtocorrupt.html, section 2.6).
    """
    for connection, record in connections:
        if record is not None:
            record.dbapi_connection = None
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))  # not freed even when the interpreter ends
        _abandoned.append(connection)
        cut(connection)


def cut(connection: Any) -> None:
    """Put a dead socket over the descriptor of a DBAPI connection: this process has no part in the old one any more."""
    descriptor = descriptor_of(connection)
    if descriptor is not None and _dead is not None:
        os.dup2(_dead, descriptor, inheritable=False)


def give_up(record: Any) -> None:
    """Close a pool record's connection without its hub, for which its socket would wait even to be closed. The objects
    are left to the collector."""
    cut(record.dbapi_connection)
    record.dbapi_connection = None
    record.info.clear()


def prepare() -> None:
    """Make the dead socket, once: in the child there may be no descriptor left to make it from."""
    global _dead
    if _dead is None:
        # Not by `socket`: gevent's would build a hub in a native thread that never had one, and two threads that build
        # their first at once wait for each other inside gevent's imports.
        dead, peer = _socket.socketpair()
        peer.close()  # what is written to `dead` fails, what is read from it has ended
        dead.setblocking(False)
        _dead = dead.detach()


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


def _count() -> None:
    global epoch
    epoch += 1


os.register_at_fork(after_in_child=_count)
