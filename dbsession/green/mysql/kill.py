"""Statements that nobody waits for any more are ended at the server, so that their locks are free at once.

The killed greenlet is not delayed: a side connection of ours says KILL, one at a time for each database. It must
never hit somebody else's thread. A proxy or a load balancer may have put us on another server, where the same thread
id is another client's; so it looks first whether that thread comes from where our connection came from.
"""

from __future__ import annotations

import logging
import socket
import time
import weakref
from collections import deque
from typing import Any

from pymysql.cursors import Cursor

from dbsession.core import fork
from dbsession.core.pool.stats import Stats
from dbsession.errors import describe
from dbsession.green import hub
from dbsession.green.mysql.connection import Connection

logger = logging.getLogger("dbsession.mysql.kill")

_TIMEOUT_S = 3  # for each step of the side connection


# Every Killer of this process. Written when one is made.
_killers: weakref.WeakSet[Killer] = weakref.WeakSet()


class Killer:
    """Ends abandoned statements of one database. Lives as long as its engine.

    `_abandoned` is written by whoever abandons (append) and by the one who works (popleft), a step each. `_working`
    is a flag: it is only ever tried, never waited for, so it may be held over a switch.
    """

    def __init__(self, name: str, stats: Stats) -> None:
        self.arguments: dict[str, Any] = {}
        """Of PyMySQL, for the side connection; those of the engine's latest connection."""
        self._name = name
        self._stats = stats
        self._told = False
        self._forget()
        _killers.add(self)

    def _forget(self) -> None:
        self._epoch = fork.epoch
        self._home: Any = None
        self._abandoned: deque[tuple[int, Any, Any]] = deque()
        self._working = hub.allocate_lock()

    def abandon(self, connection: Connection) -> None:
        """Have the statement of this connection ended. Does not wait; may be called by anybody, the Hub included."""
        if self._epoch != fork.epoch:
            self._forget()
        if connection.local is None:
            self._tell("it is not a TCP connection, so its thread at the server cannot be recognised")
            return
        self._abandoned.append((connection.thread_id(), connection.local, connection.peer))
        self.note_home()
        if self._home is not None:
            hub.run_aside(self._work, self._home)
        else:  # in a patched process the thread gets a hub, whose descriptors gevent does not close when it ends
            hub.run_in_thread(self._work)

    def note_home(self) -> None:
        """Remember the calling thread's hub, if it is one that lasts: statements of other threads are ended there."""
        if hub.lasts():
            self._home = hub.here()

    @property
    def pending(self) -> bool:
        """Whether statements are still to be ended."""
        return bool(self._abandoned) or self._working.locked()

    def _work(self) -> None:
        epoch = self._epoch
        while self._abandoned and self._working.acquire(False):
            peer = None
            try:
                while self._abandoned and epoch == fork.epoch:
                    thread_id, local, peer = self._abandoned.popleft()
                    self._kill(thread_id, local, peer)
            except Exception as error:
                if epoch != fork.epoch:
                    return  # a child's copy of the greenlet: whatever it was at is the parent's
                logger.warning(
                    "Database %r: an abandoned statement could not be ended at the server, where it may run on: %s.",
                    self._name,
                    describe(error),
                )
                # The others at a server that does not answer would each wait as long.
                for _ in range(len(self._abandoned)):
                    each = self._abandoned.popleft()
                    if each[2] != peer:
                        self._abandoned.append(each)
            finally:
                if epoch == fork.epoch:
                    self._working.release()

    def _kill(self, thread_id: int, local: Any, peer: Any) -> None:
        # To the same address from the same address, so that the server shows both with the same host part.
        with socket.create_connection(peer[:2], _TIMEOUT_S, source_address=(local[0], 0)) as raw:
            side = Connection(**self.arguments)
            side.connect(raw)
            try:
                self._look_and_kill(side, thread_id, local[1])
            finally:
                side.close()

    def _look_and_kill(self, side: Connection, thread_id: int, port: int) -> None:
        mine = side.thread_id()
        with side.cursor() as cursor:
            cursor.execute(
                "SELECT ID, USER, HOST FROM information_schema.PROCESSLIST WHERE ID IN (%s, %s)", (mine, thread_id)
            )
            seen = {row[0]: (row[1], *row[2].rpartition(":")[::2]) for row in cursor.fetchall()}
            if mine not in seen:
                self._tell("it does not show us our own thread")
                return
            if thread_id not in seen:
                return  # over already
            user, host, _ = seen[mine]
            if seen[mine] != (user, host, str(side.local[1])):
                self._tell("there is a proxy between us and the server")
            elif seen[thread_id] != (user, host, str(port)):
                self._tell("the server shows another client under its thread id")
            else:
                cursor.execute(f"KILL {thread_id:d}")
                self._stats.kills += 1

    def _tell(self, why: str) -> None:
        if not self._told:
            self._told = True
            logger.warning(
                "Database %r: an abandoned statement is not ended at the server, and none will be: %s. Set "
                "max_statement_time there, or kill_abandoned to False.",
                self._name,
                why,
            )


def finish(timeout_s: float) -> None:
    """Wait until every statement abandoned so far is ended, at most that long. For the end of a process, where nobody
    is left to end them. Switches greenlets."""
    end = time.monotonic() + timeout_s
    while any(killer.pending for killer in list(_killers)) and time.monotonic() < end:
        hub.sleep(0.01)


def side_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of PyMySQL for a side connection, from those of the engine's own."""
    kept = {key: value for key, value in arguments.items() if key not in ("database", "db", "init_command", "sql_mode")}
    timeouts = dict.fromkeys(("connect_timeout", "read_timeout", "write_timeout"), _TIMEOUT_S)
    return kept | timeouts | {"defer_connect": True, "cursorclass": Cursor, "autocommit": True}
