"""A PyMySQL connection that knows what was sent on it, and gives up what nobody waits for.

What it sends and reads is `wire`'s; here is what a pool and a session ask of it.
"""

from __future__ import annotations

import logging
import select
import time
from collections.abc import Callable
from typing import Any

from pymysql import err
from pymysql.constants import CR, SERVER_STATUS

from dbsession.core import fork
from dbsession.core.backends.mysql_errors import CLOSED_BEFORE_COMMIT
from dbsession.core.backends.mysql_sent import MULTI_STATEMENTS, Sent
from dbsession.core.backends.mysql_tls import TLSContexts
from dbsession.core.connection_info import KnownConnection
from dbsession.errors import describe
from dbsession.green.mysql import results
from dbsession.green.mysql.opening import Opening

logger = logging.getLogger("dbsession.mysql")

_BUSY = SERVER_STATUS.SERVER_STATUS_IN_TRANS | SERVER_STATUS.SERVER_MORE_RESULTS_EXISTS


class Connection(Opening, KnownConnection):
    """A `pymysql.connections.Connection`. Lives as long as its place in the pool, or until a read or write on it is
    ended by any exception: then its socket is closed, and the exception goes on as it is.

    Args:
        ping_idle_s: how long after the last answer a ping() looks at the socket only.
        tls: the engine's TLS contexts.
        Others: those of PyMySQL. `connect_timeout` bounds the handshake, too.
    """

    def __init__(
        self,
        *args: Any,
        ping_idle_s: float = 0.0,
        tls: TLSContexts | None = None,
        **kwargs: Any,
    ) -> None:
        fork.look()
        self._epoch = fork.epoch
        self.on_abandon: Callable[[Connection], None] | None = None
        """Called with this connection when nobody waits any more for a statement that may still run at the server. Must
        not wait."""
        self.reopen: Callable[[Any], Connection] | None = None
        """Opens a side connection to end this one's statement, with its own arguments."""
        self._ping_idle_s = ping_idle_s
        self._tls = TLSContexts() if tls is None else tls  # before PyMySQL's, which connects
        self._heard = 0.0  # when the last answer came
        self.database: str | None = None  # its name, for log lines
        self._later: list[Any] = []  # results read ahead
        self._given_up_by = "its connection was closed"  # what keeps a stream from whoever reads it still
        self.commit_sent = False
        """Whether the last commit() got as far as sending COMMIT."""
        self.pinging = False
        """A ping was sent that is not answered."""
        self.used = False
        """Something was executed on it since it was connected or reset."""
        self.seen_as: str | None = None
        """How the server shows it in HOST of its processlist, where that is known."""
        self.sent = Sent(several=False)
        super().__init__(*args, **kwargs)
        self.charset_at_first = self.charset, self.collation
        self.place: Any = None
        """The current database and role, where they are to be kept; see session_state."""
        self.used = False

    def connect(self, sock: Any = None) -> None:
        self.sent = Sent(several=bool(self.client_flag & MULTI_STATEMENTS))
        super().connect(sock)

    @property
    def settled(self) -> bool:
        """Whether it is known that no transaction is open, by what was sent and answered. The server's word can only
        make us doubt it: a COMMIT that chains a transaction, an autocommit mode that something has switched off."""
        sent = self.sent
        return (
            sent.ended_at == sent.count
            and self._settled
            and not self.server_status & _BUSY
            and (not sent.autocommit or self.told_autocommit)
        )

    @property
    def told_autocommit(self) -> bool:
        """Whether the connection is in autocommit, by the server's last answer."""
        return self.server_status & SERVER_STATUS.SERVER_STATUS_AUTOCOMMIT != 0

    @property
    def autocommits(self) -> bool:
        """Whether each statement on the connection commits itself."""
        return self.sent.autocommits(self.told_autocommit)

    @property
    def in_transaction(self) -> bool:
        """Whether a transaction is open, by the server's last answer."""
        return bool(self.server_status & SERVER_STATUS.SERVER_STATUS_IN_TRANS)

    @property
    def unread(self) -> bool:
        """Whether a server-side stream has not been read to its end."""
        return self._result is not None and bool(self._result.unbuffered_active)

    def finish_at_hand(self) -> bool:
        try:
            finished = self._epoch == fork.epoch and results.finish_at_hand(self)
        except BaseException:
            self._abandon()
            raise
        if not finished:
            self._given_up_by = results.ROLLED_BACK
        return finished

    def rollback(self) -> None:
        """Roll back, unless it is known that there is nothing to. A stream not read to its end is not read on for
        it (that may take minutes): the connection is closed, and the server rolls back."""
        if self.unread and not self.finish_at_hand():
            self._abandon()
        elif not (self.settled or (self.gave_up and not self.open)):
            try:
                self._finish(results.ROLLED_BACK)
            except err.MySQLError as error:
                if not self.open:
                    raise
                logger.warning(
                    "Database %r: a later result of the last statement was %s, of which nobody had been told when the "
                    "connection was rolled back.",
                    self.database,
                    describe(error),
                )
            self._roll_back()

    def commit(self) -> None:
        """Commit, unless it is known that there is nothing to."""
        self.commit_sent = False
        if not self.settled:
            try:
                self._finish("its transaction was committed")
            except err.MySQLError:
                if self.open:  # SQLAlchemy sends no ROLLBACK after a commit() that failed
                    self._roll_back()
                raise
            if self._sock is not None and self._happened() & ~select.POLLIN:
                self._force_close()
                raise err.OperationalError(*CLOSED_BEFORE_COMMIT)
            self.commit_sent = True
            self.unsent = False
            before = self.sent.count
            try:
                super().commit()
            except BaseException:
                self.commit_sent = not self.unsent
                raise
            self.sent.ended(before)

    def _roll_back(self) -> None:
        before = self.sent.count
        super().rollback()
        self.sent.ended(before)

    def _finish(self, why: str) -> None:
        """Read all that is still to come of the last answer. An error in it is that of a statement: half of a unit."""
        if self.unread:
            self._read_rest(why)
        while self._result is not None and self._result.has_next:
            self.next_result()

    def read_later_results(self) -> None:
        """Read the results that come after the last statement's first one, as those of a CALL do, and keep them for
        `next_result()`: an error in one of them is the statement's."""
        first, found = self._result, []
        while self._result.has_next:
            self._read_query_result()
            found.append(self._result)
        self._result, self._later = first, found

    def next_result(self, unbuffered: bool = False) -> Any:
        if not self._later:
            return super().next_result(unbuffered)
        self._result = self._later.pop(0)
        self._affected_rows = self._result.affected_rows
        return self._affected_rows

    def forget_answer(self) -> None:
        """Let go of the last answer, which was read to its end: an idle connection keeps nobody's rows."""
        self._result = None
        self._later = []
        if self._at == len(self._ahead):
            self._ahead, self._at = b"", 0

    def autocommit(self, value: Any) -> None:
        """Set the autocommit mode, unless it is known to be that."""
        self.autocommit_mode = bool(value)
        if self.sent.autocommit is not self.autocommit_mode or self.told_autocommit is not self.autocommit_mode:
            before = self.sent.count
            self._send_autocommit_mode()
            self.sent.autocommit_set(self.autocommit_mode, before, self.told_autocommit)

    def ping(self, reconnect: bool = False) -> None:
        """Raise an error if the connection is gone. One used a moment ago is not asked but looked at: readable while
        nothing was asked means that the server has closed it. By poll, since under TLS a peek sees nothing of use."""
        if reconnect or not self._settled or time.monotonic() - self._heard >= self._ping_idle_s or self._sock is None:
            self.pinging = True
            before = self.read_within_at_most(self.connect_timeout)  # as long as a server may take to greet a new one
            try:
                super().ping(reconnect)
            finally:
                self.pinging = False
                self.read_within(before)
            return
        if self._at < len(self._ahead) or self._happened():
            self._force_close()
            raise err.OperationalError(CR.CR_SERVER_GONE_ERROR, "MySQL server has closed the connection")

    def command(self, number: int) -> None:
        """Send a command that has no arguments, and read its OK."""
        self._execute_command(number, b"")
        self._read_ok_packet()

    def read_within(self, timeout_s: float | None) -> float | None:
        """Set the seconds to wait for each piece of an answer; return those from before."""
        before: float | None = self._read_timeout
        self._read_timeout = timeout_s
        return before

    def read_within_at_most(self, timeout_s: float) -> float | None:
        """Set the seconds to wait for each piece of an answer, unless they are fewer already; return those before."""
        before: float | None = self._read_timeout
        return self.read_within(timeout_s if before is None else min(before, timeout_s))

    def close(self) -> None:
        """Close the connection. Idempotent: whoever gives a connection up closes it, and the pool does so, too."""
        if self.unread:
            self._abandon()
        if not self._closed:
            super().close()

    def cursor(self, cursor: Any = None) -> Any:
        kind = cursor or self.cursorclass
        return results.OURS.get(kind, kind)(self)

    def _abandon(self) -> None:
        """Close the socket, as nobody waits for the answer any more, and have the statement ended at the server."""
        self.gave_up = True
        self._cut(self._given_up_by)
        self._result = None
        self._later = []
        self._force_close()
        fork.look()
        if self.on_abandon is not None and self._epoch == fork.epoch:  # in a forked child it is the parent's
            self.on_abandon(self)
