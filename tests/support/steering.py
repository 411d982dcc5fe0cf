"""Lets a script in a process of its own take a database server of the tests away, bring it back and ask it things.

The server belongs to the test's process. `steering` serves a loopback port there for as long as its block runs;
`ServerControl` calls it from a script that was given the number, patched or not.
"""

from __future__ import annotations

import contextlib
import json
import socket
import socketserver
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from .mariadb import MariaDBServer
from .postgresql import PostgreSQLServer

VERBS = ("stop", "kill", "start", "restart", "pause", "resume", "processlist", "open_transactions")
VERBS += ("kill_connection", "kill_statement", "kills", "refuse_writes", "limit_connections")


class ServerControl:
    """Steers the server behind this control port; holds nothing open between calls."""

    def __init__(self, control_port: int) -> None:
        self.control_port = control_port

    def _call(self, verb: str, *args: Any) -> Any:
        with socket.create_connection(("127.0.0.1", self.control_port), timeout=200) as connection:
            connection.sendall(json.dumps([verb, *args]).encode() + b"\n")
            with connection.makefile("rb") as reply:
                answer = json.loads(reply.readline())
        if "error" in answer:
            raise RuntimeError(f"server: {answer['error']}")
        return answer["result"]

    def __getattr__(self, verb: str) -> Callable[..., Any]:
        """Each of VERBS, as the server's class has it."""
        if verb not in VERBS:
            raise AttributeError(verb)
        return partial(self._call, verb)

    def sql(self, statement: str, *args: Any, database: str | None = None) -> list[dict[str, Any]]:
        """The rows of one statement with all rights, on a connection of its own."""
        return list(self._call("sql", database, statement, *args))

    def set_global(self, name: str, value: Any) -> None:
        """A setting of the server's, until the end of the test."""
        self._call("set_global", name, value)

    def ids(self) -> set[int]:
        """The server's numbers of the connections of the account that tests use."""
        return {process["id"] for process in self.processlist()}


@contextlib.contextmanager
def steering(server: MariaDBServer | PostgreSQLServer) -> Iterator[int]:
    """Serves a control port, which it gives; at its end the server runs as before: its settings, too."""
    changed: dict[str, Any] = {}

    def sql(database: str | None, statement: str, *args: Any) -> list[dict[str, Any]]:
        with server.root(database) as cursor:
            cursor.execute(statement, args or None)
            return list(cursor.fetchall()) if cursor.description else []

    def set_global(name: str, value: Any) -> None:
        changed.setdefault(name, server.setting(name))
        server.set_global(name, value)

    calls: dict[str, Any] = {verb: getattr(server, verb) for verb in VERBS}
    calls |= {"sql": sql, "set_global": set_global}

    class Control(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            try:
                verb, *args = json.loads(self.rfile.readline())
                reply = {"result": calls[verb](*args)}
            except Exception as error:
                reply = {"error": repr(error)}
            with contextlib.suppress(OSError):  # the script was killed meanwhile
                self.wfile.write(json.dumps(reply, default=str).encode() + b"\n")

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Control) as control:
        control.daemon_threads = True
        thread = threading.Thread(target=control.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield control.server_address[1]
        finally:
            control.shutdown()
            thread.join()
            server.ensure_running()
            server.refuse_writes(False)
            server.limit_connections(None)
            for name, value in changed.items():
                server.set_global(name, value)
