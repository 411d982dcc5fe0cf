"""The pool that every engine gets which pools: SQLAlchemy's QueuePool, which first looks for connections that the
dead have kept."""

from __future__ import annotations

from typing import Any

from sqlalchemy.pool import PoolProxiedConnection, QueuePool

from dbsession import hub, scope


class ScopePool(QueuePool):
    """A QueuePool with the lifetime of its engine."""

    def connect(self) -> PoolProxiedConnection:
        """Check a connection out. May wait, and so switch greenlets.

        Before anybody waits, the scopes of raw greenlets that have died but are still referenced are ended: nobody
        else would ever give their connections back.
        """
        if not self.checkedin() and scope.end_dead():
            hub.sleep(0)  # lets the closing begin, also where the wait below would stop the hub (nothing is patched)
        return super().connect()


def pool_defaults(poolclass: type[Any]) -> dict[str, Any]:
    """The sizes that an engine gets by default, as far as `poolclass` takes them."""
    defaults: dict[str, Any] = {"pool_recycle": 3600, "pool_pre_ping": True}
    if issubclass(poolclass, QueuePool):
        defaults |= {"pool_size": 20, "max_overflow": 0}
    return defaults
