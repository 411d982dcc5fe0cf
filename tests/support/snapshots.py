"""Snapshots of workers that are not there: as `Snapshot.as_dict()` gives them, with what a test says in them."""

from __future__ import annotations

import json
import socket
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dbsession.core.pool.holders import Holder
from dbsession.core.pool.stats import BOUNDS_S
from dbsession.core.snapshot import VERSION, DatabaseSnapshot, HistogramSnapshot
from dbsession.watch.inspection import sockets as folders

HOSTILE = "[red]x[/red]<img src=x onerror=window.hit=1>\x1b[31m\x9b2J\u202e\u200b\n\x07"
"""A text that commands a terminal, a page, rich, a log and a reader's eye."""

HARMLESS = r"[red]x[/red]<img src=x onerror=window.hit=1>\x1b[31m\x9b2J\u202e\u200b\n\x07"
"""HOSTILE as people are shown it."""


def histogram(bucket: int = 0, count: int = 0) -> HistogramSnapshot:
    """`count` values in one bucket."""
    counts = [0] * (len(BOUNDS_S) + 1)
    counts[bucket] = count
    return HistogramSnapshot(BOUNDS_S, tuple(counts), 0.0)


def database(name: str = "default", **values: Any) -> dict[str, Any]:
    """One of a snapshot; of its checkouts `slow` waited between 0.5 and 1 s, the others not at all."""
    slow, checkouts = values.pop("slow", 0), values.get("checkouts", 0)
    counts = list(histogram(0, checkouts - slow).counts)
    counts[BOUNDS_S.index(1.0)] = slow
    fixed = {"name": name, "backend": "sqlite", "size": 20, "limit": 20, "holds": histogram()}
    fixed["waits"] = HistogramSnapshot(BOUNDS_S, tuple(counts), 0.0)
    zero = ("in_use", "idle", "waiting", "checkouts", "connects", "invalidated", "timeouts", "kills")
    zeroes = dict.fromkeys((*zero, "teardown_failures", "retries"), 0)
    return asdict(DatabaseSnapshot(**{**zeroes, **fixed, **values}))


def holder(scope: str = "GET /a", held_s: float = 1.0, **values: Any) -> dict[str, Any]:
    """Who has held a connection for so long."""
    place = values.get("place", "/srv/shop/orders.py:12 in get_order")
    fixed = {"database": "default", "greenlet": "a greenlet", "state": "idle in transaction", "state_s": held_s}
    fixed |= {"place": place, "stack": (place,), "statement": "SELECT ?", "taken_at": ()}
    return asdict(Holder(**{**fixed, "scope": scope, "held_s": held_s, **values}))


def scope(label: str = "GET /a", age_s: float = 1.0) -> dict[str, Any]:
    """A unit of work with one session."""
    sessions = [{"database": "default", "in_transaction": True}]
    return {"label": label, "kind": "request", "age_s": age_s, "sessions": sessions}


def worker(
    pid: int = 1,
    *databases: dict[str, Any],
    holders: list[dict[str, Any]] | None = None,
    scopes: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """A process's snapshot; none of the lists is more than what is given."""
    parts = {"databases": [*databases], "holders": holders or [], "scopes": scopes or []}
    return {"version": VERSION, "pid": pid, "time_s": 0.0, **parts}


class Served:
    """The inspection sockets of workers that are not there. A context manager; lives until its block ends.

    `said` has what each pid answers, a snapshot or bytes, and may be changed meanwhile: a pid without an answer is
    connected to and kept waiting.
    """

    def __init__(self, folder: Path, *snapshots: dict[str, Any]) -> None:
        self.folder = folders.make(folder)
        self.said: dict[int, Any] = {each["pid"]: each for each in snapshots}
        self._listeners: dict[int, socket.socket] = {}
        self._threads: list[threading.Thread] = []
        self._waiting: list[socket.socket] = []
        for pid in self.said:
            self.serve(pid)

    def serve(self, pid: int) -> None:
        """Listen as this process, from now on."""
        listener = self._listeners[pid] = folders.listen(self.folder / f"{pid}.sock", socket.socket)
        thread = threading.Thread(target=self._serve, args=(pid, listener))
        self._threads.append(thread)
        thread.start()

    def _serve(self, pid: int, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            answer = self.said.get(pid)
            if answer is None:
                self._waiting.append(client)
                continue
            with client:
                try:
                    client.sendall(answer if isinstance(answer, bytes) else json.dumps(answer).encode())
                except OSError:  # it has what it wanted
                    pass

    def end(self, pid: int) -> None:
        """The process is gone; its socket stays, as a killed one's does."""
        listener = self._listeners.pop(pid)
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in list(self._listeners):
            self.end(pid)
        for client in self._waiting:
            client.close()
        for thread in self._threads:
            thread.join(10)
