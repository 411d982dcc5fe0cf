"""A TCP proxy between client and server that can go silent, break, or pass a few bytes at a time.

It is a process of its own, so that it works on when the test's process, its Hub or its server stands still,
and whether or not gevent patched the test. `Proxy` starts it; `ProxyControl` steers it over a loopback port,
from the test or from any script that was given the number.
"""

from __future__ import annotations

import contextlib
import json
import socket
import socketserver
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

DIRECTIONS = ("to_server", "to_client")
FULL_SIZE = 65536


class ProxyControl:
    """Steers the proxy whose control port this is; holds nothing open between calls."""

    def __init__(self, control_port: int) -> None:
        self.control_port = control_port

    def _call(self, **request: Any) -> Any:
        with socket.create_connection(("127.0.0.1", self.control_port), timeout=60) as connection:
            connection.sendall(json.dumps(request).encode() + b"\n")
            with connection.makefile("rb") as reply:
                answer = json.loads(reply.readline())
        if "error" in answer:
            raise RuntimeError(f"proxy: {answer['error']}")
        return answer["result"]

    def stall(self, direction: str = "both") -> None:
        """From now on no byte passes ("to_server", "to_client" or "both"); connecting still works."""
        self._call(verb="stall", direction=direction)

    def resume(self) -> None:
        """Ends `stall` and `dribble`; what was held back arrives."""
        self._call(verb="resume")

    def dribble(self, size: int, direction: str = "both") -> None:
        """At most `size` bytes at a time from now on, about a millisecond apart."""
        self._call(verb="dribble", size=size, direction=direction)

    def lie(self, set: int = 0, clear: int = 0) -> None:
        """From now on these bits of the server's status are set, or cleared, in each OK and EOF packet of MySQL's."""
        self._call(verb="lie", set=set, clear=clear)

    def lead_to(self, port: int) -> None:
        """Leads new connections to another server; those that there are stay where they are."""
        self._call(verb="lead_to", port=port)

    def cut(self) -> None:
        """Resets (RST) every connection, on both sides; new ones are served."""
        self._call(verb="cut")

    def connections(self) -> list[dict[str, Any]]:
        """Every connection so far, oldest first: {"open": bool, "to_server": bytes, "to_client": bytes}."""
        return list(self._call(verb="connections"))

    def bytes_sent(self) -> list[int]:
        """How many bytes each connection's client has sent to the server, oldest connection first."""
        return [connection["to_server"] for connection in self.connections()]

    def sent(self, number: int) -> bytes:
        """What the client of connection `number` (0: the oldest) has sent to the server so far."""
        return bytes.fromhex(self._call(verb="sent", number=number))


class Proxy(ProxyControl):
    """A proxy on 127.0.0.1:`port`; lives until `close()`, the end of its `with`, or of this process."""

    def __init__(self, target_port: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__)), str(target_port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self.close()
            raise RuntimeError("the proxy ended at once")
        self.port, control_port = map(int, line.split())
        super().__init__(control_port)

    @property
    def pid(self) -> int:
        return self._process.pid

    def close(self) -> None:
        """Ends it, and its connections. Idempotent."""
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process.wait(10)

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


# -- the proxy's own process -------------------------------------------------------------------------------


class Gates:
    """What all connections obey. Plain attributes: each is replaced as a whole, by one control call."""

    def __init__(self, target_port: int) -> None:
        self.target_port = target_port
        self.open = {direction: threading.Event() for direction in DIRECTIONS}
        self.resume()

    def resume(self) -> None:
        self.size = dict.fromkeys(DIRECTIONS, FULL_SIZE)
        self.lie: tuple[int, int] | None = None
        for event in self.open.values():
            event.set()


class Connection:
    """One client's connection and ours to the server, with a thread ("pump") for each direction."""

    def __init__(self, client: socket.socket, server: socket.socket, gates: Gates) -> None:
        self.gates = gates
        self.ends = {"to_server": (client, server), "to_client": (server, client)}
        self.data = {direction: bytearray() for direction in DIRECTIONS}
        self.broken = False
        self._closed = threading.Event()
        for end in (client, server):
            # A close() does not wake another thread's recv() or send(), so the pumps look up now and then.
            end.settimeout(0.02)
            # Else the kernel would put dribbled bytes together again.
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.pumps = [threading.Thread(target=self._pump, args=(d,), daemon=True) for d in DIRECTIONS]

    def start(self) -> None:
        for pump in self.pumps:
            pump.start()
        threading.Thread(target=self._close, daemon=True).start()

    def is_open(self) -> bool:
        return any(pump.is_alive() for pump in self.pumps)

    def cut(self) -> None:
        """Returns when the RST is sent."""
        self.broken = True
        self._closed.wait(20)

    def _pump(self, direction: str) -> None:
        source, sink = self.ends[direction]
        gate = self.gates.open[direction]
        partial = b""
        try:
            while data := self._until_cut(source.recv, FULL_SIZE):
                if direction == "to_client" and self.gates.lie is not None:
                    data, partial = lied(partial + data, *self.gates.lie)
                while data:
                    self._until_cut(self._pass, gate)
                    # Asked for now, and not when recv() began to wait: that may have been before dribble().
                    size = self.gates.size[direction]
                    piece, data = data[:size], data[size:]
                    self.data[direction] += piece
                    while piece:
                        piece = piece[self._until_cut(sink.send, piece) :]
                    if size < FULL_SIZE:
                        time.sleep(0.001)  # drop by drop, and not all in one packet
            self._until_cut(self._pass, gate)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            # One side broke off: so does the other, or it would wait for ever.
            self.broken = True

    def _until_cut(self, call: Callable[..., Any], *args: Any) -> Any:
        while not self.broken:
            with contextlib.suppress(TimeoutError):
                return call(*args)
        raise ConnectionAbortedError

    @staticmethod
    def _pass(gate: threading.Event) -> None:
        if not gate.wait(0.02):
            raise TimeoutError

    def _close(self) -> None:
        for pump in self.pumps:
            pump.join()
        for end in self.ends["to_server"]:
            if self.broken:
                reset(end)
            else:
                end.close()
        self._closed.set()


def lied(data: bytes, set: int, clear: int) -> tuple[bytes, bytes]:
    """The whole packets of MySQL's in `data`, with these bits of their status set and cleared, and what is left."""
    told = bytearray()
    at = 0
    while at + 4 <= len(data) and at + 4 + int.from_bytes(data[at : at + 3], "little") <= len(data):
        end = at + 4 + int.from_bytes(data[at : at + 3], "little")
        packet = bytearray(data[at:end])
        body = 4
        if packet[3] > 0 and end - at > 8 and (packet[4] == 0xFE or (packet[4] == 0 and packet[3] == 1)):
            if packet[4] == 0xFE and end - at == 9:  # EOF: a count of warnings, and the status
                body += 3
            else:  # OK: affected rows and the last id, in as many bytes as they need
                body += 1
                for _ in range(2):
                    body += {0xFC: 3, 0xFD: 4, 0xFE: 9}.get(packet[body], 1)
            status = int.from_bytes(packet[body : body + 2], "little")
            packet[body : body + 2] = ((status | set) & ~clear).to_bytes(2, "little")
        told += packet
        at = end
    return bytes(told), data[at:]


def wanted(request: dict[str, Any]) -> tuple[str, ...]:
    return DIRECTIONS if request["direction"] == "both" else (request["direction"],)


def reset(end: socket.socket) -> None:
    """Closes with RST instead of FIN, which is what "linger for 0 seconds" means."""
    with contextlib.suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    end.close()


def serve(target_port: int) -> None:
    gates = Gates(target_port)
    connections: list[Connection] = []  # only ever appended to, by the accepting thread

    def answer(request: dict[str, Any]) -> Any:
        match request["verb"]:
            case "stall":
                for direction in wanted(request):
                    gates.open[direction].clear()
            case "resume":
                gates.resume()
            case "dribble":
                gates.size |= dict.fromkeys(wanted(request), int(request["size"]))
            case "lie":
                gates.lie = request["set"], request["clear"]
            case "lead_to":
                gates.target_port = request["port"]
            case "cut":
                for connection in list(connections):
                    connection.cut()
            case "connections":
                return [{"open": c.is_open(), **{d: len(c.data[d]) for d in DIRECTIONS}} for c in list(connections)]
            case "sent":
                return bytes(connections[request["number"]].data["to_server"]).hex()
        return None

    class Control(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            try:
                reply = {"result": answer(json.loads(self.rfile.readline()))}
            except Exception as error:
                reply = {"error": repr(error)}
            self.wfile.write(json.dumps(reply).encode() + b"\n")

    control = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Control)
    threading.Thread(target=control.serve_forever, daemon=True).start()
    listener = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        while True:
            client, _ = listener.accept()
            try:
                server = socket.create_connection(("127.0.0.1", gates.target_port), timeout=10)
            except OSError:
                reset(client)
                continue
            connections.append(Connection(client, server, gates))
            connections[-1].start()  # who has had an answer through it, finds it counted

    threading.Thread(target=accept, daemon=True).start()
    print(listener.getsockname()[1], control.server_address[1], flush=True)
    sys.stdin.buffer.read()  # until whoever started this closes it, or is gone


if __name__ == "__main__":
    serve(int(sys.argv[1]))
