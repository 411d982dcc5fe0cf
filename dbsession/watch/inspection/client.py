"""Asks the inspection sockets of a folder for their snapshots, all at once and for a bounded time."""

from __future__ import annotations

import json
import os
import selectors
import time
from dataclasses import dataclass
from typing import Any

from dbsession.errors import plain
from dbsession.watch.inspection import sockets as folders

_NOTHING: dict[str, Any] = {"databases": [], "holders": [], "scopes": []}
_MOST_BYTES = 64 * 1024 * 1024  # of one snapshot


@dataclass(frozen=True, slots=True)
class Collected:
    """What the processes of a folder said at `time_s` (seconds since 1970). `workers` has a `Snapshot.as_dict()` for
    each, sorted by pid; `silent` the pids of those that listen, and gave no (whole, understandable) answer in time."""

    time_s: float
    workers: list[dict[str, Any]]
    silent: list[int]


def collect(folder: str | os.PathLike[str], timeout_s: float = 1.0) -> Collected:
    """The snapshots of all processes of the folder. Takes `timeout_s` seconds at most, nearly nothing when all answer.
    Removes the sockets of processes that are gone. Switches greenlets in a process patched by gevent.

    Raises:
        ConfigError: [DBS-CONFIG] the folder cannot be read. One that is not there has no processes.
    """
    deadline = time.monotonic() + timeout_s
    workers: list[dict[str, Any]] = []
    silent: set[int] = set()
    with selectors.DefaultSelector() as selector:
        for pid, path in folders.sockets(folder):
            silent.add(pid)  # until it has answered
            try:
                connection = folders.connect(path)
            except OSError:
                continue
            if connection is None:
                silent.discard(pid)
            else:
                selector.register(connection, selectors.EVENT_READ, (pid, bytearray()))
        try:
            while selector.get_map() and (left_s := deadline - time.monotonic()) > 0:
                for key, _ in selector.select(left_s):
                    pid, answer = key.data
                    if _read(key.fileobj, answer):
                        continue
                    selector.unregister(key.fileobj).fileobj.close()  # type: ignore[union-attr]
                    snapshot = _understood(answer)
                    if snapshot is not None:
                        workers.append(snapshot)
                        silent.discard(pid)
        finally:
            for key in list(selector.get_map().values()):
                key.fileobj.close()  # type: ignore[union-attr]
    return Collected(time.time(), sorted(workers, key=lambda worker: worker["pid"]), sorted(silent))


def none_answers(folder: str, now: Collected) -> str:
    """The sentence for a folder without answers."""
    if now.silent:
        return f"No worker answers; silent: {', '.join(map(str, now.silent))}."
    return (
        f"No worker serves its snapshot in {plain(folder)}: is the server running, with {folders.VARIABLE} set to this "
        "folder?"
    )


def workers_of(now: Collected) -> str:
    """How many answered, and who did not."""
    found = f"{len(now.workers)} worker{'s' if len(now.workers) != 1 else ''}"
    return f"{found}, silent: {', '.join(map(str, now.silent))}" if now.silent else found


def _read(connection: Any, answer: bytearray) -> bool:
    """Take what has come; whether there may be more."""
    try:
        piece = connection.recv(1 << 18)
    except BlockingIOError:
        return True
    except OSError:
        return False
    answer += piece
    return bool(piece) and len(answer) <= _MOST_BYTES


def _understood(answer: bytearray) -> dict[str, Any] | None:
    try:
        snapshot = json.loads(answer)
    except (ValueError, RecursionError):
        return None
    known = isinstance(snapshot, dict) and snapshot.get("version") == 1 and isinstance(snapshot.get("pid"), int)
    return {**_NOTHING, **snapshot} if known else None
