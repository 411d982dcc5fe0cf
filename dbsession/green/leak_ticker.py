"""The leak watch of the gevent half: see `leaks`."""

from __future__ import annotations

from dbsession.core.pool.leaks import Watches
from dbsession.green import hub
from dbsession.green.periodic import Ticker

watches = Watches(hub.run_aside)

_ticker = Ticker(watches.look)


def watch() -> None:
    """See to it that this process has its watcher. Called for each new connection, since a process without one has
    nothing to watch."""
    if watches:
        _ticker.start()
