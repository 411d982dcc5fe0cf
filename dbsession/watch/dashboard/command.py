"""`dbsession dashboard`: a web page that shows all workers of a folder, served by a small process of its own."""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import gevent
import gevent.socket
from gevent.pool import Pool
from gevent.pywsgi import WSGIHandler, WSGIServer

from dbsession.errors import ConfigError
from dbsession.watch.dashboard.access import LEAST_TOKEN, Token, is_loopback
from dbsession.watch.dashboard.history import INTERVAL_S, History
from dbsession.watch.inspection import sockets as folders
from dbsession.watch.inspection.client import Collected, collect

TOKEN_VARIABLE = "DBSESSION_DASHBOARD_TOKEN"

CLIENTS = 100
"""Connections served at a time; the others wait in the kernel."""

CLIENT_S = 30.0
"""How long a connection is kept on which no whole request comes, or its answer is not read."""

WORKER_TIMEOUT_S = 1.0


def add_dashboard(commands: Any) -> None:
    """Add `dashboard` to argparse's sub-commands."""
    parser = commands.add_parser(
        "dashboard",
        help="the same in a browser, with the last minutes",
        description="Serves until Ctrl-C. Exit status: 0; 2 when it cannot start as it is asked to.",
    )
    folders.add_option(parser)
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=_port, default=8765, help="the port; 0: any that is free (default: 8765)")
    parser.add_argument(
        "--token",
        help=f"what a browser has to know, best {LEAST_TOKEN} characters or more; needed to listen on anything but "
        f"loopback, and to keep other users of this machine out. Better in the environment, as {TOKEN_VARIABLE}: they "
        "can read command lines, too",
    )
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM; return the exit status: 0, or 2 if it cannot start as it was asked to."""
    folder = options.folder
    token = options.token if options.token is not None else os.environ.get(TOKEN_VARIABLE)
    problem = _problem(folder, options.host, token)
    if problem is not None:
        return _refuse(problem)
    try:
        listener = _listen(options.host, options.port)
    except OSError as error:
        return _refuse(
            f"{_address(options.host, options.port)} cannot be listened on ({error.strerror}): choose another --host "
            "or --port."
        )
    history = History()
    try:
        history.add(collect(folder, WORKER_TIMEOUT_S))
    except ConfigError as error:
        listener.close()
        return _refuse(str(error))
    if token is not None and len(token) < LEAST_TOKEN:
        warning = f"The token has {len(token)} characters, which may be guessed: use {LEAST_TOKEN} or more."
        print(f"dbsession dashboard: {warning}", file=sys.stderr, flush=True)
    _serve(listener, history, folder, Token(token) if token is not None else None)
    return 0


def _port(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text) <= 65535):
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: give a number from 0 to 65535")
    return int(text)


def _problem(folder: str, host: str, token: str | None) -> str | None:
    """Why it cannot be started so, as a sentence."""
    if not folder:
        return folders.UNNAMED
    if not Path(folder).is_dir():
        return f"The folder {folder!r} does not exist: name the one that {folders.VARIABLE} names to the workers."
    if not host:
        return "--host is empty: name an address, such as 127.0.0.1."
    if token == "":
        return f"The token is empty: use {LEAST_TOKEN} characters or more, chosen at random."
    if token is None and not is_loopback(host):
        return (
            f"--host {host} can be reached from other machines, so a token is needed: set {TOKEN_VARIABLE}, or leave "
            "--host out and use an SSH tunnel."
        )
    if importlib.util.find_spec("flask") is None:
        return "The dashboard needs Flask: pip install 'dbsession[dashboard]'."
    return None


def _refuse(sentence: str) -> int:
    print(f"dbsession dashboard: {sentence}", file=sys.stderr)
    return 2


def _listen(host: str, port: int) -> Any:
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = gevent.socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(CLIENTS)
    except BaseException:
        listener.close()
        raise
    return listener


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class _Handler(WSGIHandler):
    """One client connection."""

    def handle_one_request(self) -> Any:
        # A request as a whole, the wait for it included: one that comes byte by byte would hold its place for ever.
        answered: Any = None
        with gevent.Timeout(CLIENT_S) as timeout:
            try:
                answered = super().handle_one_request()
            except gevent.Timeout as over:
                if over is not timeout:
                    raise
        return answered

    def handle_error(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, gevent.Timeout):  # ours, in the middle of the application: nothing went wrong there
            self.close_connection = True
        else:
            super().handle_error(kind, error, trace)


def _serve(listener: Any, history: History, folder: str, token: Token | None) -> None:
    from dbsession.watch.dashboard.app import create_app  # Flask is an extra

    host, port = listener.getsockname()[:2]
    app = create_app(history, os.path.abspath(folder), token, f"dbsession_dashboard_{port}")
    # No access log: one line for each poll of each page says nothing.
    server = WSGIServer(listener, app, spawn=Pool(CLIENTS), handler_class=_Handler, log=None)
    for signum in (signal.SIGINT, signal.SIGTERM):
        gevent.signal_handler(signum, server.close)
    poller = gevent.spawn(_poll, history, folder)
    url = f"http://{_address(host, port)}/"
    print(f"The dashboard of {folder} is at {url} (Ctrl-C ends it).", flush=True)
    try:
        server.serve_forever(stop_timeout=1)
    finally:
        poller.kill()


def _poll(history: History, folder: str) -> None:
    """One poller, however many pages there are."""
    threads = gevent.get_hub().threadpool
    said = ""
    while True:
        gevent.sleep(INTERVAL_S)
        try:
            # In a native thread: it may wait for silent workers, and the pages are answered meanwhile.
            collected = threads.apply(collect, (folder, WORKER_TIMEOUT_S))
        except ConfigError as error:
            if said != str(error):
                said = str(error)
                print(said, file=sys.stderr, flush=True)
            collected = Collected(time.time(), [], [])
        _add(history, collected)


def _add(history: History, collected: Collected) -> None:
    try:
        history.add(collected)
    except (AttributeError, KeyError, TypeError, ValueError):  # one of them sent what is no snapshot
        pids = [worker["pid"] for worker in collected.workers]
        history.add(Collected(collected.time_s, [], sorted({*collected.silent, *pids})))
