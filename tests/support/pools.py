"""FairPools on connections that only count how many of them are open."""

from __future__ import annotations

from dbsession.green.pool import FairPool


class Connection:
    """A DBAPI connection that can be opened, rolled back and closed."""

    opened = 0

    def __init__(self):
        Connection.opened += 1
        self.closed = False

    def rollback(self):
        pass

    def close(self):
        self.closed = True
        Connection.opened -= 1


def make(size=1, overflow=0, timeout=5.0, creator=Connection, **more):
    return FairPool(creator, pool_size=size, max_overflow=overflow, timeout=timeout, **more)


def counts(pool):
    return pool.checkedout(), pool.checkedin(), pool.waiting()
