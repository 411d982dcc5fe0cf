"""A driver whose connections only count what is done with them."""

from __future__ import annotations


class Driver:
    """Opens connections, and can be shut down."""

    def __init__(self):
        self.opened = []
        self.down = False

    def connect(self):
        if self.down:
            raise OSError("the server is down")
        self.opened.append(Connection())
        return self.opened[-1]

    def open(self):
        return sum(not connection.closed for connection in self.opened)


class Connection:
    def __init__(self):
        self.closed = self.rolled_back = 0

    def rollback(self):
        self.rolled_back += 1

    def close(self):
        self.closed += 1
