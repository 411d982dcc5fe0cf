"""Hub affinity: a connection belongs to the gevent hub whose socket it has, and is closed there."""

from __future__ import annotations

from typing import Any, TypeVar

import gevent.hub
from gevent import monkey
from sqlalchemy.pool import Pool

from dbsession.core import fork
from dbsession.green import hub
from dbsession.green.hub import here

P = TypeVar("P", bound=Pool)

OWNER_HUB = "dbsession.owner_hub"
"""Key in a connection's `info`: the hub that it belongs to; absent or None if any hub may use it."""


def owner_hub_of(connection: Any) -> gevent.hub.Hub | None:
    """The hub that a DBAPI connection just opened belongs to; None if it has no socket, or one that is not gevent's."""
    if monkey.is_module_patched("socket") and fork.descriptor_of(connection) is not None:
        return here()
    return None


def discard(record: Any) -> None:
    """Close a pool record's idle connection: in its own hub, or at its descriptor when that is gone."""
    owner = record.info.get(OWNER_HUB)
    if owner is None or owner is here():
        record.close()
    elif not owner.dead:
        hub.run_aside(record.close, owner)
    else:
        fork.give_up(record)


def await_first_in_any_hub(pool: P) -> P:
    """Return a new pool, whose first connection may be awaited in any hub from now on. A worker's `dbsession check`
    opens one in another hub as the first requests come; SQLAlchemy's mutex, which gevent has patched, might never wake
    those."""
    connect: Any = pool.dispatch.connect.for_modify(pool.dispatch)
    connect._exec_once_mutex = hub.Mutex()
    return pool
