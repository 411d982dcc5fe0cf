"""CancelRequest under gevent: a greenlet, or a thread of ours, that ends abandoned statements."""

from __future__ import annotations

from contextlib import suppress
from time import monotonic
from typing import Any

from psycopg import capabilities, generators
from psycopg.waiting import Wait

from dbsession.core.backends.postgresql_cancel import AGAIN_S, TIMEOUT_S, Cancels
from dbsession.core.backends.psycopg import ACTIVE
from dbsession.core.connection_info import TooLate
from dbsession.core.pool.stats import Stats
from dbsession.green import hub
from dbsession.green.abandoned import EndsAbandoned
from dbsession.green.postgresql.connection import Connection, await_once, drive


class GreenCanceller(Cancels, EndsAbandoned):
    """Ends abandoned statements of one engine. Lives as long as the engine."""

    def __init__(self, name: str, stats: Stats) -> None:
        Cancels.__init__(self, name, stats)
        EndsAbandoned.__init__(self)

    def opened(self, connection: Connection) -> None:
        """Take charge of what is abandoned on a connection just opened."""
        self.take_over()
        self.note_hub()
        connection.on_abandon = self.abandon

    def abandon(self, connection: Connection) -> None:
        """Have the statement of this connection ended, and then the connection closed if it is given up. Does not wait;
        may be called by anybody, the Hub included."""
        self.take_over()
        self.abandoned.append(connection)
        self.begin()

    def end(self, each: Connection) -> None:
        until = monotonic() + TIMEOUT_S
        try:
            self._ask(each.pgconn, until)
            while not _has_ended(each.pgconn):
                if monotonic() > until:
                    raise TooLate
                self._ask(each.pgconn, until)
            self.sent()
        finally:
            self._close(each)

    @staticmethod
    def _ask(pgconn: Any, until: float) -> None:
        if capabilities.has_cancel_safe():
            request = pgconn.cancel_conn()
            request.start()
            drive(generators.cancel(request), until)
        else:  # before libpq 17 there is only one that blocks
            _in_thread(pgconn.get_cancel().cancel)

    def failed(self, error: Exception, each: Connection | None) -> None:
        """Report it, and close the others: each would wait as long for a server that does not answer."""
        self.not_sent(error)
        for _ in range(len(self.abandoned)):
            self._close(self.abandoned.popleft())

    @staticmethod
    def _close(connection: Connection) -> None:
        if connection.gave_up:
            connection.finish()


def _has_ended(pgconn: Any) -> bool:
    """Wait until the server answers to the statement, for AGAIN_S seconds; return whether it has, or somebody else has
    read its answer."""
    with suppress(TooLate):
        await_once(pgconn.socket, Wait.R, AGAIN_S)
        return True
    return bool(pgconn.transaction_status != ACTIVE)


def _in_thread(cancel: Any) -> None:
    """Call what blocks in a thread of ours, and wait for it as long as it may take. Raises what it raises,
    TooLate."""
    waiter, failed = hub.Waiter(), []

    def work() -> None:
        try:
            cancel()
        except Exception as error:
            failed.append(error)
        finally:
            waiter.wake()

    hub.run_in_thread(work)
    if not waiter.wait(TIMEOUT_S):
        raise TooLate
    if failed:
        raise failed[0]
