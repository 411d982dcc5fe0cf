"""KILL: a statement that nobody waits for any more is ended at MySQL or MariaDB, so that its locks are free at once.

Whoever is killed is not delayed: a side connection of ours says KILL, aside, one at a time for each engine. It must
never hit somebody else's thread; a proxy or a load balancer may have put us on another server, where the same thread id
is another client's. So a connection is known by its thread id and by HOST, address and port as the server shows them in
its processlist, and the KILL is sent only to the thread that has both.

The side connection goes to the address that the connection has, with the credentials that a new one would be given: the
password may have been changed since. If these are refused, the connection's own are tried.

Where the server sees our connections as we do, with our own port, HOST is known without asking: the engine's first
connection from our address to that of the server has asked for it. Behind a proxy each connection asks, one round trip
as it is opened. By a Unix socket all threads look alike, so they are not killed.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Generator
from time import monotonic
from typing import Any, NamedTuple

from dbsession.core.backends import mysql_errors
from dbsession.core.pool.stats import Stats
from dbsession.errors import describe

logger = logging.getLogger("dbsession.mysql.kill")

OWN_THREAD = "SELECT ID, HOST FROM information_schema.PROCESSLIST WHERE ID = CONNECTION_ID()"
TIMEOUT_S = 3.0
"""Seconds that a side connection has for each step."""
AGAIN_S, AGAIN_FOR_S = 0.25, 30.0
"""Seconds between two attempts while the server has no room for a side connection, and until the last one."""
NOT_FOR_SIDE = frozenset(
    {"async_creator_fn", "cursor_cls", "cursorclass", "database", "db", "init_command", "sql_mode"}
)
"""Arguments of the driver's connect() that a side connection does without."""

_NOT_BY_CREDENTIALS = {*mysql_errors.FULL, 2003, 2006, 2013}
_NO_SUCH_THREAD = 1094  # it has ended since we looked


class Thread(NamedTuple):
    """A connection's thread, as its server shows it; `host` is address:port, None where the server did not tell."""

    id: int
    host: str | None
    peer: Any = None
    """The address to which a side connection goes."""
    own: Any = None
    """Opens a side connection with the connection's own arguments, which are in there unseen: a password is among
    them."""


class NotLetIn(Exception):
    """The server refuses a side connection, with the credentials of a new connection and with the old one's own."""

    def __init__(self, new: Exception, own: Exception) -> None:
        super().__init__(f"{describe(new)}, and with the connection's own arguments {describe(own)}")


class Killer:
    """Ends abandoned statements of one engine; each half drives it. Lives as long as the engine.

    `abandoned` is written by whoever abandons (append) and by the one who works (popleft, appendleft), one step each;
    `_shown` by whoever opens a connection, one step each.
    """

    def __init__(self, name: str, stats: Stats) -> None:
        self.abandoned: deque[Thread] = deque()
        self._name = name
        self._stats = stats
        self._refused = self._barred = False
        self._full_since: float | None = None  # the server has had no room for a side connection
        self._shown: dict[tuple[str, Any], str] = {}
        """(our address, that of the server) -> how the server shows ours, where it shows our port, too"""

    def host_of(self, local: tuple[Any, ...], peer: Any) -> str | None:
        """Return HOST of a connection from `local`, our address and port, to `peer`, if it need not be asked for."""
        shown = self._shown.get((local[0], peer))
        return None if shown is None else f"{shown}:{local[1]}"

    def learn(self, local: tuple[Any, ...], peer: Any, thread_id: int, row: Any) -> str | None:
        """Return HOST from the answer to OWN_THREAD by a connection from `local` to `peer`, which was given this thread
        id as it connected."""
        # A proxy that gives us an id of its own may give the server's thread to another client at any time.
        if row is None or row[0] != thread_id or ":" not in row[1]:
            return None
        address, _, port = str(row[1]).rpartition(":")
        if port == str(local[1]):
            self._shown[local[0], peer] = address
        return str(row[1])

    def abandon(self, thread: Thread) -> bool:
        """Note the thread of a statement that is to be ended; return whether that is possible."""
        if thread.host is not None:
            self.abandoned.append(thread)
        else:
            self._refuse("it does not show us an address and port of our own (by a Unix socket it cannot)")
        return thread.host is not None

    def _refuse(self, why: str) -> None:
        if not self._refused:
            self._refused = True
            logger.warning(
                "Database %r: an abandoned statement is not ended at the server, since its thread there cannot be "
                "recognised: %s. This is said once. Set max_statement_time there, or kill_abandoned to False.",
                self._name,
                why,
            )

    def steps(self, thread: Thread) -> Generator[str, Any, None]:
        """Yield the statements that end this thread's statement; each is answered with its first row, or None, or by
        throwing the driver's error in."""
        self._full_since, self._barred = None, False
        row = yield f"SELECT HOST FROM information_schema.PROCESSLIST WHERE ID = {thread.id:d}"
        if row is None:
            return  # it is over
        if row[0] != thread.host:
            self._refuse("the server shows another client under its thread id, so it may be another server")
            return
        try:
            yield f"KILL {thread.id:d}"
        except Exception as error:
            if mysql_errors.number(error) != _NO_SUCH_THREAD:
                raise
        else:
            self._stats.kills += 1

    def tries_again(self, error: Exception, thread: Thread | None) -> bool:
        """Put the thread back to the others, if the server had no room for a side connection, and is to be asked again
        after AGAIN_S seconds."""
        if mysql_errors.number(error) not in mysql_errors.FULL or thread is None:
            return False
        now = monotonic()
        self._full_since = now if self._full_since is None else self._full_since
        if now - self._full_since >= AGAIN_FOR_S:
            return False
        self.abandoned.appendleft(thread)
        return True

    def failed(self, error: Exception, thread: Thread | None) -> None:
        """Report that a statement was not ended, and forget the others of the same server: each would wait as long for
        one that does not answer."""
        self._full_since = None
        barred, self._barred = self._barred, isinstance(error, NotLetIn)
        if not self._barred:
            logger.warning(
                "Database %r: an abandoned statement could not be ended at the server, where it may run on: %s.",
                self._name,
                describe(error),
            )
        elif not barred:
            logger.warning(
                "Database %r: abandoned statements are not ended at the server, and may run on there: it refuses our "
                "side connections, with what a new connection is given: %s. This is said once, until one is let in.",
                self._name,
                error,
            )
        for _ in range(len(self.abandoned)):
            each = self.abandoned.popleft()
            if thread is not None and each.peer != thread.peer:
                self.abandoned.append(each)

    @staticmethod
    def is_barred(error: Exception) -> bool:
        """Return whether, after an `error` with the arguments of a new connection, the old one's own may do better: the
        server is there and has room, or the user's code has failed to say what the arguments are."""
        return mysql_errors.number(error) not in _NOT_BY_CREDENTIALS and not isinstance(error, TimeoutError)


def side_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of the driver's connect() for a side connection, from those of a pooled one."""
    kept = {key: value for key, value in arguments.items() if key not in NOT_FOR_SIDE}
    return kept | {"autocommit": True}
