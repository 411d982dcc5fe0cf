"""gunicorn's configuration for the order desk:  gunicorn -c deploy/gunicorn.conf.py

Every number can be set by the environment variable named beside it. deploy/README.md says how to size them.
"""

# First of all, before anything imports socket, ssl or a database driver. gunicorn's gevent worker patches, too, but
# after post_fork and, under preload_app, after the application was imported in the master: too late for both.
from gevent import monkey

monkey.patch_all()

import gc  # noqa: E402
import logging  # noqa: E402
import os  # noqa: E402
from typing import Any  # noqa: E402

from dbsession import ConfigError, SessionManager, gunicorn_hooks  # noqa: E402
from dbsession.gunicorn_hooks import child_exit, post_request, worker_exit  # noqa: E402, F401

# Python looks for garbage after every 700 new containers (2,000 from Python 3.13 on), and some of these times goes
# through all there are. A list of some thousand rows is that often walked through while it is built, and holds no
# garbage. The workers inherit this.
gc.set_threshold(50_000)


def when_ready(server: Any) -> None:
    """Run dbsession's hook. Under preload_app, keep the collector from what the application's import has made: it
    writes into each object that it looks at, and each worker would get a copy of that memory of its own. No collect()
    before it, for the same reason: see gc.freeze() in Python's documentation."""
    gunicorn_hooks.when_ready(server)
    if server.cfg.preload_app:
        gc.freeze()


def post_worker_init(worker: Any) -> None:
    """Run dbsession's hook. Then keep the collector from modules, classes and all else that lives as long as this
    worker: it would go through them at each full collection, with every request waiting."""
    gunicorn_hooks.post_worker_init(worker)
    gc.collect()
    gc.freeze()


def number(variable: str, default: int, least: int, most: int) -> int:
    """The environment's whole number, or one line that says what is wrong with it."""
    value = os.environ.get(variable, "").strip() or str(default)
    if not (value.isascii() and value.isdecimal() and least <= int(value) <= most):
        raise SystemExit(f"gunicorn.conf.py: {variable}={value!r} must be a whole number from {least} to {most}.")
    return int(value)


def switch(variable: str, default: bool) -> bool:
    """The environment's yes or no."""
    value = os.environ.get(variable, "").strip().lower() or str(int(default))
    if value not in ("0", "1", "no", "yes", "false", "true", "off", "on"):
        raise SystemExit(f"gunicorn.conf.py: {variable}={value!r} must be 1 or 0.")
    return value in ("1", "yes", "true", "on")


def check_url(variable: str, database: str) -> None:
    """Say in one line what is wrong with the environment's URL; a worker would say it below a long traceback."""
    if url := os.environ.get(variable):
        try:
            SessionManager({database: url})  # looks at it, and connects to nothing
        except ConfigError as error:
            raise SystemExit(f"gunicorn.conf.py: {variable} cannot be used. {error}") from None
        gc.collect()  # that manager goes now, or each worker would have its engine, too, and count it


check_url("DBSESSION_URL", "default")
check_url("DBSESSION_AUDIT_URL", "audit")

chdir = os.path.dirname(os.path.abspath(__file__))  # where app.py is, whatever folder this is started in
wsgi_app = "app:app"

# BIND takes any address that gunicorn takes ("unix:/run/orderdesk/socket"); PORT alone stays on loopback, since
# nothing here asks for a password and a proxy should stand before it.
bind = os.environ.get("BIND", "").strip() or f"127.0.0.1:{number('PORT', 8000, 1, 65535)}"

worker_class = "gevent"

# Two: the loss of one leaves one. More than there are cores gains nothing, and each has its own database pools.
workers = number("WEB_CONCURRENCY", 2, 1, 512)

# Open client connections a worker, idle keep-alive ones included. Each needs a file descriptor, so that this and the
# pools' 40 connections stay below the usual limit of 1024 open files.
worker_connections = number("WORKER_CONNECTIONS", 800, 1, 1_000_000)

# A worker's event loop that has not run for so long hangs in code that does not yield: it is killed and replaced. It
# is no limit on a request: a request that waits lets the loop run.
timeout = number("TIMEOUT", 30, 0, 3600)

# What a worker gets after SIGTERM to finish its requests, as long as the longest of them (/slow waits up to 30 s);
# after it they are killed. systemd's TimeoutStopSec has to be longer.
graceful_timeout = number("GRACEFUL_TIMEOUT", 35, 1, 3600)

# Seconds that an idle client connection is kept, which is also what a client has for sending its headers. Longer
# than the proxy keeps it (nginx.conf: 4 s), so that the proxy never sends into a connection just closed here.
keepalive = number("KEEPALIVE", 5, 0, 3600)

# Requests after which a worker is replaced; 0: never, since nothing here is known to leak. The jitter of a tenth
# keeps the workers from being replaced all at once.
max_requests = number("MAX_REQUESTS", 0, 0, 1_000_000_000)
max_requests_jitter = max_requests // 10

# Connections that the kernel keeps waiting while every worker is busy (net.core.somaxconn may lower it).
backlog = number("BACKLOG", 2048, 1, 65535)

# 1: the application is imported once, in the master, and its memory shared; a changed application then needs a
# restart and not only SIGHUP.
preload_app = switch("PRELOAD_APP", False)

# A heartbeat file on a disk that stalls would have a healthy worker killed; this is memory.
if os.access("/dev/shm", os.W_OK | os.X_OK):
    worker_tmp_dir = "/dev/shm"

# gunicorn would open a control socket in XDG_RUNTIME_DIR or the home folder (the same file for every instance of
# this user) and serve it by an asyncio loop in a thread of the master. In a master that gevent has patched, which
# forks workers, that is one thing more that can go wrong, and signals do all we need.
control_socket_disable = True

# "-" is standard output; none by default, since the proxy has one.
accesslog = os.environ.get("ACCESS_LOG", "").strip() or None
errorlog = "-"
loglevel = os.environ.get("LOG_LEVEL", "").strip().lower() or "info"
if loglevel not in ("debug", "info", "warning", "error", "critical"):
    raise SystemExit(f"gunicorn.conf.py: LOG_LEVEL={loglevel!r} must be debug, info, warning, error or critical.")

# Warnings of dbsession and of everything else, and the application's own messages, in the form of gunicorn's.
logging.basicConfig(
    level="WARNING",
    format="[%(asctime)s] [%(process)d] [%(levelname)s] %(name)s: %(message)s",
    datefmt="%Y-%m-%d %H:%M:%S %z",
)
logging.getLogger("orderdesk").setLevel(loglevel.upper())
