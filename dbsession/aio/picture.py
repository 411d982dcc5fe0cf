"""snapshot() in asyncio."""

from __future__ import annotations

from dbsession.aio import engine
from dbsession.aio.engine import Database
from dbsession.core import snapshot as pictures
from dbsession.core.snapshot import Snapshot


def snapshot() -> Snapshot:
    """A picture of the asyncio half of this process, as `dbsession.snapshot()`, which has both halves: the databases of
    every event loop, each loop's by itself; who holds their connections; the scopes of tasks with their sessions.

    Frozen; it changes no more. From any thread, with or without a loop. Never waits and does no I/O; each number is
    right for its moment, and all are of nearly the same one.
    """
    return pictures.of(pictures.in_use(engine.all_databases()), Database)


pictures.halves.append(engine.all_databases)
