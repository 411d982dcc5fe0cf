"""A psycopg2 connection that waits in gevent's loop, and knows what was sent and whether it can still be used.

To psycopg2 it is in autocommit mode always: what begins, commits and rolls back is sent from here, as text, so that
BEGIN goes with the first statement of a transaction, in one text and one round trip. A server parses a text before it
begins with it: after a syntax error in that first statement no transaction is open.
"""

from __future__ import annotations

import select
import weakref
from collections.abc import Callable
from time import monotonic
from typing import Any

import psycopg2
from psycopg2 import extensions
from psycopg2.extensions import TRANSACTION_STATUS_ACTIVE, TRANSACTION_STATUS_IDLE, get_wait_callback

from dbsession.core import fork
from dbsession.core.backends.postgresql_sent import Sent, kind_of
from dbsession.core.fork import KNOWN
from dbsession.core.given_up import GivesUp
from dbsession.green.postgresql import psycopg2_cursors
from dbsession.green.postgresql.psycopg2_transactions import Transactions
from dbsession.green.postgresql.psycopg2_waits import take_part, waits_by

_new_cursor: Any = extensions.connection.cursor


class Connection(GivesUp, Transactions):
    """A `psycopg2.extensions.connection`. Lives as long as its place in the pool, or until something interrupts it in
    the middle of an answer: then psycopg2 closes it, and the exception goes on as it is."""

    OPERATIONAL_ERROR = psycopg2.OperationalError

    on_abandon: Callable[[Any], None] | None = None
    """Called with this connection when nobody waits any more for a statement that may still run at the server. Must not
    wait."""
    reopen: Any = None  # opens a side connection with its own arguments
    pid: int = 0
    """Of its session at the server, as it was told."""
    address: tuple[str | None, int] = (None, -1)
    """Address of the server, None by a Unix socket; our own port, -1 then."""
    blocks = False
    """psycopg2 waits for the answer in C: in a program that is not patched."""
    pinging = False
    """A ping was sent that is not answered."""
    told_autocommit = False  # `Sent.taken` of MySQL asks for it

    def __init__(self, dsn: str, connect_by: float) -> None:
        fork.look()
        fork.prepare()
        self._epoch = fork.epoch
        self._connect_by = connect_by
        self.blocks = get_wait_callback() is None
        self.sent = Sent()
        self.streams: weakref.WeakSet[Any] = weakref.WeakSet()
        self.heard = monotonic()
        try:
            super().__init__(dsn)
            self._connect_by = None
            self.send_no_begin()
        except BaseException:
            super().close()
            raise
        self.pid = self.get_backend_pid()

    # What it knows.

    @property
    def open(self) -> bool:  # type: ignore[override]  # an attribute there
        """Whether it can still be used."""
        return not (self.gave_up or self.closed)

    @property
    def autocommits(self) -> bool:
        """Whether each statement on the connection commits itself."""
        return self._characteristics.autocommit

    @property
    def unread(self) -> bool:
        """Whether an answer has not been read to its end."""
        return self.get_transaction_status() == TRANSACTION_STATUS_ACTIVE

    @property
    def streaming(self) -> bool:
        """Whether a named cursor is open."""
        return self.in_transaction and any(not each.closed for each in list(self.streams))

    def finish_at_hand(self) -> bool:
        return not self.unread

    def set_client_encoding(self, encoding: str) -> None:
        self.refuse_if_lost()
        self.sent.note_change(f"SET client_encoding TO '{encoding}'".encode())
        super().set_client_encoding(encoding)

    # Its end.

    def interrupted(self, error: BaseException) -> None:
        if self._connect_by is None and not self.gave_up and not (self.closed and isinstance(error, psycopg2.Error)):
            self.give_up(error)

    def give_up(self, error: BaseException | None) -> None:
        """Note that the connection is of no use any more, as nobody waits for the answer, and have the statement ended
        at the server."""
        self.gave_up, self.given_up_by = True, error
        fork.look()
        if self.on_abandon is not None and self._epoch == fork.epoch:  # in a forked child it is the parent's
            self.on_abandon(self)

    def close(self) -> None:
        """Close the connection. Idempotent; never waits. Whoever waits for an answer finds it closed."""
        if self.unread and not self.gave_up and not self.closed:
            self.give_up(None)
        if self.waiting:
            self.cut_off()  # psycopg2 closes it then
        else:
            super().close()
            self._close_timers()

    # What is sent.

    def cursor(  # type: ignore[override]
        self,
        name: str | None = None,
        cursor_factory: Any = None,
        withhold: bool = False,
        scrollable: bool | None = None,
    ) -> Any:
        factory: Any = cursor_factory or self.cursor_factory
        if name is None:
            kind = psycopg2_cursors.Cursor if factory is None else psycopg2_cursors.ours(factory)
            return _new_cursor(self, None, kind)
        super().cursor().close()  # which raises where it is closed
        found = psycopg2_cursors.ours(extensions.cursor if factory is None else factory, named=True)(self)
        found.declared(name, withhold, scrollable)
        return found

    def before(self, text: str) -> tuple[str, bool]:
        """Take note of a text about to be sent. Return what has to go before it, and whether it changes the session
        while this is opened, so that the text itself is to be noted."""
        if not KNOWN[0] or self.gave_up or self._epoch != fork.epoch:
            self.refuse_if_lost()
        if get_wait_callback() is not waits_by:
            self.blocks = not take_part()  # psycogreen's may have taken our place
        kind = kind_of(text)
        autocommit = self._characteristics.autocommit and not self._entered
        if kind.begins or not autocommit:
            self._ended = False
        if kind.begins or autocommit or self.get_transaction_status() != TRANSACTION_STATUS_IDLE:
            return "", kind.changes
        return self._begin, kind.changes

    def after_error(self, begun: str) -> None:
        """Take note that what was sent has failed, with this before it."""
        if begun and not self.gave_up and self.get_transaction_status() == TRANSACTION_STATUS_IDLE:
            self._refused = True  # by its syntax, so that no transaction is open; to its user one has failed
        if self.unread and not self.gave_up:  # COPY, of which psycopg2 knows nothing where a callback waits
            self.give_up(None)
            super().close()

    # Liveness, and coming back.

    def ping(self, idle_s: float, within_s: float) -> None:
        """Raise an error if the connection is gone. One that answered less than `idle_s` seconds ago is looked at only.
        Switches where it is asked, for `within_s` seconds at most."""
        if self.gave_up or self.closed or self.get_transaction_status() != TRANSACTION_STATUS_IDLE:
            self.close()
            raise psycopg2.OperationalError("the connection was left in the middle of a transaction")
        seen = self.happened()
        if seen & ~select.POLLIN:
            self.close()
            raise psycopg2.OperationalError("the server has closed the connection")
        if not seen and monotonic() - self.heard < idle_s:  # what has come may be a notice
            return
        self.pinging = True
        before = self.read_within_at_most(within_s)
        try:
            self.command("SELECT 1")
        finally:
            self.pinging = False
            self.read_within(before)

    def reset(self) -> None:
        """Take back what the session has set, and set again what was set as it was opened. Switches."""
        if self._tpc:
            self.tpc_rollback()
        if not self.settled:
            self._end("ROLLBACK")
        encoding = self.get_parameter_status("client_encoding")
        self.command("DISCARD ALL")
        if not (self.get_parameter_status("DateStyle") or "").startswith("ISO"):
            self.command("SET datestyle TO 'ISO'")  # psycopg2 reads no other
        for text in self.sent.settings or ():
            self.command(text.decode())
        if (now := self.get_parameter_status("client_encoding")) != encoding and now:
            super().set_client_encoding(now)  # psycopg2's own knowledge of it
        if self.get_transaction_status() != TRANSACTION_STATUS_IDLE:
            self._end("COMMIT")
        self._ended = True
