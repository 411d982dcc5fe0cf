"""The inspection socket: this process's snapshot for whoever of the same user connects.

    <folder, 0700>/<pid>.sock, 0600      connect; read one line of JSON, `snapshot().as_dict()`, up to the end of file

What a client sends is thrown away, so there is no verb, and nothing that it could change.
"""

from __future__ import annotations

import atexit
import json
import os
import queue
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gevent
import gevent.socket
from gevent import monkey
from gevent.pool import Pool

from dbsession.core import fork
from dbsession.core.snapshot import snapshot
from dbsession.green import hub
from dbsession.watch.inspection import sockets as folders

CLIENTS = 8  # answered at a time; further ones wait in the kernel
ANSWER_S = 2.0  # that a client gets to read its answer
LINGER_S = 0.5  # and, with the whole answer sent, to close
_RETRY_S = 1.0  # after an accept() that failed, such as for want of descriptors

# The interpreter's own, whatever is patched.
_Socket: type[socket.socket] = monkey.get_original("socket", "socket")
_Queue: type[queue.SimpleQueue[None]] = monkey.get_original("queue", "SimpleQueue")

_server: _Server | None = None  # this process's. Written by serve_snapshots(), stop() and the child's fork hook.


class _Server:
    """Serves one socket. Lives until stop(), or as long as the process.

    It runs in the main hub where that lasts, and keeps no loop running there; elsewhere, also without gevent, in
    threads of ours, which have no hub: one that ran while the interpreter ends would crash it. `_clients` holds
    what each socket is, and is written by whoever answers one, a step each.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._over = False
        self._clients: dict[Any, Any] = {}
        self._listener: Any = folders.listen(path, _Socket)
        self._listens_as = self._listener, fork.identity(self._listener)
        if hub.lasts():
            self._listener.setblocking(False)
            hub.watch_forks()
            gevent.spawn(self._serve_in_hub)
        else:
            self._listener.setblocking(True)
            hub.run_in_thread(self._serve_in_thread)

    def _serve_in_hub(self) -> None:
        home = gevent.get_hub()
        readable = home.loop.io(self._listener.fileno(), 1, ref=False)
        answering = Pool(CLIENTS)
        try:
            while not self._over:
                home.wait(readable)
                client = self._accept(gevent.socket.socket, gevent.sleep)
                if client is not None:
                    answering.spawn(self._answer, client)
        finally:
            readable.close()
            self._listener.close()

    def _serve_in_thread(self) -> None:
        free = _Queue()
        for _ in range(CLIENTS):
            free.put(None)

        def answer(client: Any) -> None:
            try:
                self._answer(client)
            finally:
                free.put(None)

        while not self._over:
            client = self._accept(_Socket, hub.sleep_thread)
            if client is not None:
                free.get()
                hub.run_in_thread(partial(answer, client))
        self._listener.close()

    def _accept(self, kind: Any, sleep: Callable[[float], object]) -> Any:
        """The next client as a socket of `kind`; None: look again."""
        try:
            # Private, and the only way to a client's descriptor: accept() makes a socket of whatever kind stands in the
            # module, gevent's in a patched process, which would give this thread a hub.
            descriptor, _ = self._listener._accept()
        except BlockingIOError:  # the client has gone
            return None
        except OSError:  # over; or no descriptor is free, and the client waits on
            if not self._over:
                sleep(_RETRY_S)
            return None
        return kind(fileno=descriptor)

    def _answer(self, client: Any) -> None:
        self._clients[client] = fork.identity(client)
        try:
            client.settimeout(ANSWER_S)  # for the whole of sendall()
            client.sendall(json.dumps(snapshot().as_dict()).encode() + b"\n")
            client.shutdown(socket.SHUT_WR)
            # Closed now, whoever sends something would meet an error in place of the answer, or of its end.
            end = time.monotonic() + LINGER_S
            while (left_s := end - time.monotonic()) > 0:
                client.settimeout(left_s)
                if not client.recv(4096):
                    break
        except OSError:  # it did not read it all, or did not close
            pass
        finally:
            self._clients.pop(client, None)
            client.close()

    def stop(self) -> None:
        """Take the socket away; who is being answered gets the rest. Never waits."""
        self._over = True
        self._path.unlink(missing_ok=True)
        try:
            self._listener.shutdown(socket.SHUT_RDWR)  # it can be "read" then, in whichever thread it is waited for
        except OSError:  # over already
            pass

    def abandon(self) -> None:
        """Give up, in a forked child, the parent's sockets, in which it has no part."""
        self._over = True
        for inherited, opened_as in (self._listens_as, *self._clients.items()):
            if fork.identity(inherited) == opened_as:
                fork.cut(inherited)


def serve_snapshots(folder: str | os.PathLike[str]) -> None:
    """Serve this process's `snapshot()` on the Unix socket `<folder>/<pid>.sock`, for `dbsession top`, `dbsession
    dashboard` and whoever else of this user connects.

    Ends with the process. A forked child serves nothing until it calls this itself. Called again, it serves in the
    folder named last. Never waits. `gunicorn_hooks.post_worker_init` calls it where DBSESSION_INSPECT names a folder.

    Args:
        folder: made with mode 0700 if it is missing; the same for all processes that are to be looked at together.

    Raises:
        ConfigError: [DBS-CONFIG] the folder cannot be made, has too long a name, belongs to somebody else, or others
            might reach what is in it.
    """
    global _server
    made = folders.make(folder)
    folders.remove_stale(made)
    fork.prepare()
    stop()
    _server = _Server(made / f"{os.getpid()}.sock")


def stop() -> None:
    """Serve no longer, and remove the socket. Called at the end of the process, too. Never waits."""
    global _server
    fork.look()  # or it is the parent's
    if _server is not None:
        _server.stop()
        _server = None


def _abandon() -> None:
    global _server
    if _server is not None:
        _server.abandon()
        _server = None


fork.in_child(_abandon)
atexit.register(stop)
