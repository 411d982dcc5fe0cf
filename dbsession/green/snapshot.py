"""snapshot(): a picture of this process: its pools, its units of work, and who holds which connection."""

from __future__ import annotations

from dbsession.core import snapshot as pictures
from dbsession.core.snapshot import Database, Snapshot, picture
from dbsession.green import engine

__all__ = ["Snapshot", "live", "picture", "snapshot"]


def snapshot() -> Snapshot:
    """A picture of this process, of all its databases; of those of `dbsession.aio`, too, in every loop, where that is
    used. Frozen; it changes no more. Never waits and does no I/O, so it may be called anywhere; each number is right
    for its moment, and all are of nearly the same one.

    Passwords, parameter values and query strings are not in it.
    """
    return pictures.of(live())


def live() -> list[Database]:
    """The databases of this process that are in use: see `pictures.in_use`."""
    return pictures.in_use(pictures.all_databases())


pictures.halves.append(engine.all_databases)
