"""snapshot() in asyncio."""

from __future__ import annotations

from dbsession.aio import databases
from dbsession.aio.databases import Database
from dbsession.watch import pictures
from dbsession.watch.pictures import Snapshot


def snapshot() -> Snapshot:
    """A picture of the asyncio half of this process, as `dbsession.snapshot()`, which has both halves: the databases of
    every event loop, each loop's by itself; who holds their connections; the scopes of tasks with their sessions.

    Frozen; it changes no more. From any thread, with or without a loop. Never waits and does no I/O; each number is
    right for its moment, and all are of nearly the same one.
    """
    return pictures.of(pictures.in_use(databases.all_databases()), Database)


pictures.halves.append(databases.all_databases)
