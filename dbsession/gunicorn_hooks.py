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
from typing import Any

from dbsession.errors import ConfigError
from dbsession.green import api, scope
from dbsession.green.mysql import kill
from dbsession.watch import metrics_folder
from dbsession.watch.check import report
from dbsession.watch.inspection import server as inspection
from dbsession.watch.inspection import sockets
from dbsession.web import wsgi

logger = logging.getLogger("dbsession.gunicorn_hooks")

KILLING_S = 2.0

metrics_folder.prepare()  # the variables that it sets, the workers inherit


def when_ready(server: Any) -> None:
    """In the master, which under preload_app has imported the application: closes the sessions that were used by the
    import itself, outside any scope. They would hold their connections as long as the process lives. And empties the
    folder of the metrics of what an earlier master has left there."""
    _close_what_the_import_used()
    metrics_folder.begin(server)


def post_worker_init(worker: Any) -> None:
    """In a worker, which has just imported the application: closes what the import used, as `when_ready()` does; and
    serves the worker's snapshot (see `dbsession.serve_snapshots`) where the environment variable DBSESSION_INSPECT
    names a folder.

    The first worker that a master starts also looks at its databases as `dbsession check` does, with gunicorn's own
    settings, and logs what is wrong. It does so aside: neither its start nor that of the others waits for it. Here and
    not in when_ready(), which gunicorn calls before it forks: the master knows the databases only under preload_app,
    need not be patched, so that no driver could be judged there, would hold every worker up for as long as a silent
    server does, and would leave them its connections.

    Where the environment's DBSESSION_METRICS names a path, it is answered with the metrics from now on.

    Raises:
        ConfigError: [DBS-CONFIG] it was wrapped with a deadline, and this worker does not run gevent. gunicorn then
            says "Worker failed to boot" and ends.
    """
    wsgi.check_deadlines()
    _close_what_the_import_used()
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


def child_exit(server: Any, worker: Any) -> None:
    """In the master, after the end of a worker: its counts stay in the metrics, the state of its pools goes."""
    metrics_folder.forget(worker.pid)


def _close_what_the_import_used() -> None:
    current = scope.current()
    if current is not None and current.sessions:
        logger.warning("The import of the application left sessions open; they are closed now. Use session_scope().")
        current.clear()


def post_request(worker: Any, req: Any, environ: dict[str, Any], resp: Any) -> None:
    """The backstop, called last in the greenlet that served the request (which serves the next one of a keep-alive
    connection, too): ends the request's scope if nobody has, and closes what was used outside any request, such as in
    an application that is not wrapped. May switch greenlets."""
    request = environ.get("dbsession.scope")
    if request is not None and not request.ended:
        logger.warning("%s was over, but its scope was still open; its sessions are closed now.", request.label)
        request.end()
    outer = scope.current()
    if outer is not None:
        outer.clear()


def worker_exit(server: Any, worker: Any) -> None:
    """Sees to it that the statements of killed requests are ended at the server (for KILLING_S seconds at most), and
    closes every engine's idle connections, as a worker ends. (gunicorn also calls it in its arbiter, for a worker
    that has vanished: nothing is done there.) A worker that is killed does not come here; the kernel closes its
    sockets."""
    if worker.pid == os.getpid():
        inspection.stop()
        kill.finish(KILLING_S)
        api.dispose()
