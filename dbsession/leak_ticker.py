"""The leak watch of the gevent half: see `leaks`."""

from __future__ import annotations

from dbsession import hub
from dbsession.leaks import Watches
from dbsession.ticker import Ticker

watches = Watches(hub.run_aside)

_ticker = Ticker(watches.look)


def watch() -> None:
    """See to it that this process has its watcher. Called for each new connection, since a process without one has
    nothing to watch."""
    if watches:
        _ticker.start()
