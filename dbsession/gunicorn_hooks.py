"""Hook functions for a gunicorn configuration file:

    from dbsession.gunicorn_hooks import child_exit, post_request, post_worker_init, when_ready, worker_exit

There is none for forks: `os.register_at_fork` tells us of every one, the workers' and the dirty workers' (whose
`dirty_post_fork` and `dirty_worker_exit` gunicorn calls in their arbiter, not in the worker).

Where the environment's DBSESSION_METRICS names a path, such as /metrics, each worker answers it with the metrics of
all; `child_exit` is for that. Import this module before anything that imports prometheus_client.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable
from typing import Any

import gevent

from dbsession.errors import ConfigError
from dbsession.green import api, hub, scope
from dbsession.green.shutdown import end_statements
from dbsession.watch import metrics_folder
from dbsession.watch.check import report
from dbsession.watch.inspection import server as inspection
from dbsession.watch.inspection import sockets
from dbsession.web import wsgi

logger = logging.getLogger("dbsession.gunicorn_hooks")

KILLING_S = 2.0
"""Seconds that ending statements at the server may take as a worker exits."""
BEFORE_S = 1.0
"""How long before the end of graceful_timeout what still runs is ended, at most; of a short one half."""

metrics_folder.prepare()  # the variables that it sets, the workers inherit


def when_ready(server: Any) -> None:
    """Close the sessions that the import of the application used outside any scope (under preload_app, here in the
    master): they would hold their connections as long as the process lives. Empty the metrics folder of what an earlier
    master has left."""
    _close_what_the_import_used()
    metrics_folder.begin(server)


def post_worker_init(worker: Any) -> None:
    """Close the sessions that the import of the application used in this worker. Serve its snapshot where
    DBSESSION_INSPECT names a folder, and its metrics where DBSESSION_METRICS names a path.

    The first worker of a master also looks at its databases as `dbsession check` does, and logs what is wrong; nothing
    waits for that. Not in when_ready(), before the forks: the master knows the databases only under preload_app, need
    not be patched, would hold every worker up, and would leave them its connections.

    Raises:
        ConfigError: [DBS-CONFIG] it was wrapped with a deadline, and this worker does not run gevent. gunicorn then
            says "Worker failed to boot" and ends.
    """
    wsgi.check_deadlines()
    _close_what_the_import_used()
    _end_before_the_master_does(worker)
    inspected = os.environ.get(sockets.VARIABLE, "").strip()
    if inspected:
        try:
            inspection.serve_snapshots(inspected)
        except ConfigError as error:  # no reason not to serve requests
            logger.warning("This worker cannot be inspected: %s", error)
    if worker.age == 1:  # counted by the master, over all its workers
        report.in_worker(worker.cfg)
    path = metrics_folder.path()
    if path and hasattr(worker, "wsgi"):  # the asgi worker's application is none of ours
        from dbsession.watch import metrics

        worker.wsgi = metrics.MetricsMiddleware(worker.wsgi, path)
        metrics.start()


def _end_before_the_master_does(worker: Any) -> None:
    """Have SIGTERM, besides what gunicorn does at it, begin the time after which running statements are ended.

    The master counts graceful_timeout from the SIGTERM, and then sends SIGKILL; the worker counts from when it sees,
    within a second, that it is to end, so that it would begin to end its handlers when it is dead.
    """
    inner: Any = signal.getsignal(signal.SIGTERM)
    if inner != getattr(worker, "handle_exit", "of another kind"):
        return  # a worker of another kind
    graceful_s = float(worker.cfg.graceful_timeout)
    before_s = min(BEFORE_S, graceful_s / 2)
    begun = False

    def end() -> None:
        hub.sleep(graceful_s - before_s)
        _report_ended(end_statements(before_s + 1, at_least_s=before_s + 1))

    def terminated(signum: int, frame: Any) -> None:
        nonlocal begun
        if not begun:
            begun = True
            start: Callable[..., Any] = gevent.spawn if hub.lasts() else hub.run_in_thread
            start(end)
        inner(signum, frame)

    signal.signal(signal.SIGTERM, terminated)
    # A sync worker that waits for its database is told at once; Python's own calls then go on (PEP 475). In the others
    # nothing waits in the main thread, and what gunicorn has set stays.
    signal.siginterrupt(signal.SIGTERM, not hub.lasts())


def _report_ended(count: int) -> None:
    if count:
        logger.warning("This worker ends: %s statements that were still running were ended.", count)


def child_exit(server: Any, worker: Any) -> None:
    """Take the state of an ended worker's pools out of the metrics, in the master; its counts stay."""
    metrics_folder.forget(worker.pid)


def _close_what_the_import_used() -> None:
    current = scope.current()
    if current is not None and current.sessions:
        logger.warning("The import of the application left sessions open; they are closed now. Use session_scope().")
        current.clear()


def post_request(worker: Any, req: Any, environ: dict[str, Any], resp: Any) -> None:
    """End the request's scope if nobody has, and close what was used outside any request, such as in an application
    that is not wrapped. Called last in the greenlet that served the request, and serves the next one of a keep-alive
    connection. May switch greenlets."""
    request = environ.get("dbsession.scope")
    if request is not None and not request.ended:
        logger.warning("%s was over, but its scope was still open; its sessions are closed now.", request.label)
        request.end()
    outer = scope.current()
    if outer is not None:
        outer.clear()


def worker_exit(server: Any, worker: Any) -> None:
    """End what still runs at the server, and the statements of killed requests (for KILLING_S seconds at most), and
    close every engine's idle connections. Does nothing in the arbiter, where gunicorn calls it for a worker that has
    vanished."""
    if worker.pid == os.getpid():
        inspection.stop()
        _report_ended(end_statements(KILLING_S))
        api.dispose()
