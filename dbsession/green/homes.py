"""Which hub a pooled connection belongs to: under gevent a socket is of use only in the hub that opened it."""

from __future__ import annotations

from typing import Any

import gevent.hub
from gevent import monkey

from dbsession.core import fork
from dbsession.green import hub

HOME = "dbsession.home"
"""Key in a connection's `info`: the hub that it belongs to."""


def home_of(connection: Any) -> gevent.hub.Hub | None:
    """The hub that a DBAPI connection just opened belongs to; None if it has no socket, or one that is not gevent's."""
    if monkey.is_module_patched("socket") and fork.descriptor_of(connection) is not None:
        return hub.here()
    return None


def discard(record: Any) -> None:
    """Close a pool record's idle connection: in its own hub, or at its descriptor when that is gone."""
    home = record.info.get(HOME)
    if home is None or home is hub.here():
        record.close()
    elif not home.dead:
        hub.run_aside(record.close, home)
    else:
        fork.give_up(record)
