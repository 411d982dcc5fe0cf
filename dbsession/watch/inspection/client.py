"""Asks the inspection sockets of a folder for their snapshots, all at once and for a bounded time."""

from __future__ import annotations

import json
import os
import selectors
import time
from collections.abc import Callable
from dataclasses import dataclass, field, is_dataclass, replace
from functools import cache
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from dbsession.core.pool.stats import BOUNDS_S
from dbsession.core.snapshot import VERSION, HistogramSnapshot, Snapshot
from dbsession.errors import plain
from dbsession.watch.inspection import sockets as folders

_MOST_BYTES = 16 * 1024 * 1024  # of one snapshot
_MOST = 2**63  # a number that is counted or measured is below


@dataclass(frozen=True, slots=True)
class Collected:
    """What the processes of a folder said at `time_s` (seconds since 1970), each list and mapping by pid.

    `workers` has a `Snapshot.as_dict()` for each that answered, and the last one of each that is late. `late` says how
    many seconds old the latter are, `silent` who listens and has given no whole answer in time, `unreadable` who gave
    something else than a snapshot, and what.
    """

    time_s: float
    workers: list[dict[str, Any]]
    silent: list[int] = field(default_factory=list)
    unreadable: dict[int, str] = field(default_factory=dict)
    late: dict[int, float] = field(default_factory=dict)


class Workers:
    """The processes of one folder, asked again and again. Lives as long as its reader, which looks by one greenlet or
    thread at a time."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = folder
        self._last: dict[int, tuple[float, dict[str, Any]]] = {}  # the last snapshot of each, and when it came

    def look(self, timeout_s: float = 1.0) -> Collected:
        """Collect, with the last snapshot of each process that lives and does not answer in time; see `collect()`."""
        now = collect(self._folder, timeout_s)
        moment = time.monotonic()
        answered = {worker["pid"]: (moment, worker) for worker in now.workers}
        late = {pid: self._last[pid] for pid in now.silent if pid in self._last}
        self._last = answered | late
        return replace(
            now,
            workers=[worker for _, (_, worker) in sorted(self._last.items())],
            silent=[pid for pid in now.silent if pid not in late],
            late={pid: moment - since for pid, (since, _) in sorted(late.items())},
        )


def collect(folder: str | os.PathLike[str], timeout_s: float = 1.0, text: Callable[[str], str] = plain) -> Collected:
    """Ask all processes of the folder once. Takes `timeout_s` seconds at most, nearly nothing when all answer. Removes
    the sockets of processes that are gone. Switches greenlets in a process patched by gevent.

    Args:
        folder: one that is not there has no processes.
        text: what is made of each text of a snapshot. By default its characters are harmless in a terminal and a page.

    Raises:
        ConfigError: [DBS-CONFIG] the folder cannot be read.
    """
    deadline = time.monotonic() + timeout_s
    workers: dict[int, dict[str, Any]] = {}
    unreadable: dict[int, str] = {}
    silent: set[int] = set()
    with selectors.DefaultSelector() as selector:
        for pid, path in folders.sockets(folder):
            try:
                connection = folders.connect(path)
            except folders.NoSocketOfOurs as error:
                unreadable[pid] = f"cannot be asked ({error})"
            except OSError:
                silent.add(pid)
            else:
                if connection is not None:
                    silent.add(pid)  # until it has answered
                    selector.register(connection, selectors.EVENT_READ, (pid, connection, bytearray()))
        try:
            while selector.get_map() and (left_s := deadline - time.monotonic()) > 0:
                for key, _ in selector.select(left_s):
                    pid, connection, answer = key.data
                    if _read(connection, answer):
                        continue
                    selector.unregister(connection)
                    connection.close()
                    if not answer:  # it ended just now
                        continue
                    silent.discard(pid)
                    try:
                        workers[pid] = understood(answer, pid, text)
                    except Unreadable as error:
                        unreadable[pid] = f"gave an answer that cannot be read ({error})"
        finally:
            for key in list(selector.get_map().values()):
                key.data[1].close()
    return Collected(time.time(), [workers[pid] for pid in sorted(workers)], sorted(silent), unreadable)


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


def summary(now: Collected, pids: bool = False) -> str:
    """Say how many answered, and who did not; with `pids`, who did."""
    answered = "No worker answers"
    if now.workers:
        answered = f"{len(now.workers)} worker{'s' if len(now.workers) != 1 else ''}"
        if pids:
            answered += f" (pid {', '.join(str(worker['pid']) for worker in now.workers)})"
    parts = [answered, *([f"silent: {', '.join(map(str, now.silent))}"] if now.silent else [])]
    return ", ".join([*parts, *(f"pid {pid} {what}" for pid, what in sorted(now.unreadable.items()))])


def none_answers(folder: str, now: Collected) -> str:
    """The sentence for a folder without answers."""
    if now.silent or now.unreadable:
        return f"{summary(now)}."
    return (
        f"No worker serves its snapshot in {plain(folder)}: is the server running, with {folders.VARIABLE} set to this "
        "folder?"
    )


# -- what an answer has to be ------------------------------------------------------------------------------------------


class Unreadable(ValueError):
    """An answer that is no snapshot. Its text says what is wrong, in words of ours."""


def understood(answer: bytes | bytearray, pid: int, text: Callable[[str], str] = plain) -> dict[str, Any]:
    """Read the answer of the process `pid`: a `Snapshot.as_dict()` as JSON, whose every part is checked here, so that
    whoever shows it need not. What is in it besides is left out.

    Raises:
        Unreadable: it is something else.
    """
    if len(answer) > _MOST_BYTES:
        raise Unreadable(f"it has more than {_MOST_BYTES} bytes")
    try:
        found = json.loads(answer)
    except (ValueError, RecursionError):
        raise Unreadable("it is no whole JSON") from None
    if not isinstance(found, dict) or found.get("version") != VERSION:
        raise Unreadable(f"it is no snapshot of version {VERSION}")
    snapshot = _checked(found, Snapshot, "snapshot", text)
    if snapshot["pid"] != pid:
        raise Unreadable(f"it is that of pid {snapshot['pid']}")
    return {"version": VERSION, **snapshot}


_type_hints: Callable[[Any], dict[str, Any]] = cache(get_type_hints)


def _checked(value: Any, kind: Any, name: str, text: Callable[[str], str]) -> Any:
    """`value`, found as `name`, if it is what JSON makes of a `kind`."""
    if isinstance(kind, type) and is_dataclass(kind) and isinstance(value, dict):
        fields = _type_hints(kind)
        missing = fields.keys() - value.keys()
        if missing:
            raise Unreadable(f"{name} has no {min(missing)}")
        checked = {each: _checked(value[each], of, each, text) for each, of in fields.items()}
        if kind is HistogramSnapshot and (tuple(checked["bounds_s"]), len(checked["counts"])) != (
            BOUNDS_S,
            len(BOUNDS_S) + 1,
        ):
            raise Unreadable(f"{name} has other bounds")
        return checked
    if get_origin(kind) is tuple and isinstance(value, list):
        return [_checked(each, get_args(kind)[0], name, text) for each in value]
    if get_origin(kind) is UnionType:
        return None if value is None else _checked(value, get_args(kind)[0], name, text)
    if kind is str and isinstance(value, str):
        return text(value)
    if kind is bool and isinstance(value, bool):
        return value
    number = isinstance(value, int) and not isinstance(value, bool)
    if (kind is int and number) or (kind is float and (number or isinstance(value, float))):
        if 0 <= value < _MOST:  # neither is NaN
            return value
        raise Unreadable(f"{name} is out of range")
    raise Unreadable(f"{name} is of another kind")
