"""`dbsession dashboard`: a web page that shows all workers of a folder, served by a small process of its own."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import gevent
from gevent.pool import Pool
from gevent.pywsgi import WSGIServer

from dbsession.errors import ConfigError, plain, to_install
from dbsession.watch.dashboard.history import INTERVAL_S, History
from dbsession.watch.inspection import sockets as folders
from dbsession.watch.inspection.client import Collected, Workers
from dbsession.watch.usage_errors import WrongUsage

PORT = 8765
LOOPBACK = ("127.0.0.1", "::1")

CLIENTS = 100
"""Connections served at a time; the others wait in the kernel."""

WORKER_TIMEOUT_S = 1.0


def add_dashboard(commands: Any) -> None:
    """Add `dashboard` to argparse's sub-commands."""
    parser = commands.add_parser(
        "dashboard",
        help="the same in a browser, with the last minutes",
        description="Serves until Ctrl-C, and to this machine only: it asks nobody who they are. From another machine "
        f"come by SSH: ssh -L {PORT}:127.0.0.1:{PORT} HOST. Exit status: 0; 2 when it cannot start as it is asked to.",
    )
    folders.add_option(parser)
    parser.add_argument("--host", help="the address to listen on: 127.0.0.1 (the default) or ::1")
    parser.add_argument("--port", type=_port, help=f"the port; 0: any that is free (default: {PORT})")
    parser.add_argument(
        "--socket",
        action="store_true",
        help=f"instead of a port listen on the Unix socket {folders.DASHBOARD} in the folder, where no other user of "
        "this machine gets in",
    )
    parser.examples = (
        "dbsession dashboard --folder /run/shop",
        "dbsession dashboard --folder /run/shop --port 0",
        "dbsession dashboard --folder /run/shop --socket",
    )
    parser.set_defaults(run=_run)


def _port(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text) <= 65535):
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: give a number from 0 to 65535")
    return int(text)


def _run(options: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM; return the exit status."""
    _check(options)
    history, workers, path = History(), Workers(options.folder), None
    history.add(workers.look(WORKER_TIMEOUT_S))
    if options.socket:
        path = _free_path(options.folder)
        listener = folders.listen(path, socket.socket)
    else:
        listener = _listen(options.host or LOOPBACK[0], PORT if options.port is None else options.port)
    try:
        _serve(listener, path, history, workers, options.folder)
    finally:
        if path is not None:
            path.unlink(missing_ok=True)
    return 0


def _check(options: argparse.Namespace) -> None:
    if not options.folder:
        raise WrongUsage(folders.UNNAMED)
    if not Path(options.folder).is_dir():
        raise WrongUsage(
            f"The folder {options.folder!r} does not exist: name the one that {folders.VARIABLE} names to the workers."
        )
    if options.socket and (options.host, options.port) != (None, None):
        raise WrongUsage("--socket stands in place of --host and --port: leave them out.")
    if options.host not in (None, *LOOPBACK):
        raise WrongUsage(
            f"--host {plain(options.host)} is refused: the dashboard asks nobody who they are, so it listens on "
            f"{' or '.join(LOOPBACK)} only. From another machine say `ssh -L {PORT}:127.0.0.1:{PORT} HOST` and open "
            f"http://127.0.0.1:{PORT}/ there."
        )
    if importlib.util.find_spec("flask") is None:
        raise WrongUsage(f"The dashboard needs Flask: {to_install('dashboard')}.")


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=CLIENTS)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise WrongUsage(f"{_address(host, port)} cannot be listened on ({reason}): choose another --port.") from None


def _free_path(folder: str) -> Path:
    """Where the dashboard's socket may be made: in the folder of the inspection sockets.

    Raises:
        ConfigError: [DBS-CONFIG] other users get into that, or a dashboard listens there already.
    """
    # Root may look at a service of another user.
    path = folders.closed(Path(os.path.abspath(folder)), anybodys=os.geteuid() == 0) / folders.DASHBOARD
    try:
        used = folders.connect(path)  # removes what a dashboard that was killed has left
    except (folders.NoSocketOfOurs, OSError) as error:
        raise ConfigError(f"{str(path)!r} cannot be listened on: {error}.") from None
    if used is not None:
        used.close()
        raise ConfigError(f"A dashboard listens on {str(path)!r} already: use that one, or end it first.")
    return path


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _serve(listener: socket.socket, path: Path | None, history: History, workers: Workers, folder: str) -> None:
    from dbsession.watch.dashboard.app import create_app  # Flask is an extra

    if path is not None:
        where, there, port = str(path), shlex.quote(str(path)), PORT
    else:
        host, port = listener.getsockname()[:2]
        there = _address(host, port)
        where = f"http://{there}/"
    tunnel = f"ssh -L {port}:{plain(there)} HOST", f"http://127.0.0.1:{port}/"
    app = create_app(history, plain(os.path.abspath(folder)), tunnel)
    listener.setblocking(False)  # whoever knocked may have gone when gevent takes the connection
    # No access log: one line for each poll of each page says nothing.
    server = WSGIServer(listener, app, spawn=Pool(CLIENTS), log=None)
    server.start()  # it looks up its host's name, and close() in the midst of that would be an AttributeError
    for signum in (signal.SIGINT, signal.SIGTERM):
        gevent.signal_handler(signum, server.close)
    poller = gevent.spawn(_poll, history, workers)
    print(f"The dashboard of {plain(folder)} is at {plain(where)} (Ctrl-C ends it).")
    print(f"From another machine: {tunnel[0]}, and there {tunnel[1]}", flush=True)
    try:
        server.serve_forever(stop_timeout=1)
    finally:
        poller.kill()


def _poll(history: History, workers: Workers) -> None:
    """Look again and again: one poller, however many pages there are."""
    threads = gevent.get_hub().threadpool
    said = ""
    while True:
        gevent.sleep(INTERVAL_S)
        try:
            # In a native thread: it may wait for silent workers, and the pages are answered meanwhile.
            look = threads.apply(workers.look, (WORKER_TIMEOUT_S,))
        except ConfigError as error:
            if said != str(error):
                said = str(error)
                print(said, file=sys.stderr, flush=True)
            look = Collected(time.time(), [])
        history.add(look)
