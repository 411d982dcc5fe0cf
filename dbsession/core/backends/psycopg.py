"""What a psycopg 3 connection of ours knows, in either half: what was sent on it, and whether it can still be used.

psycopg's generators send and read, and yield where they would wait; each half waits in its own way, by its `wait()`. So
what is here serves both: BEGIN goes with the first statement of a transaction, a COMMIT counts only if the server calls
it one, and what is not needed is not sent. The names with an underscore are psycopg's; each has its line in
tests/unit/test_private_names.py, which fails loudly when the name goes.
"""

from __future__ import annotations

import select
import weakref
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import Any, ClassVar

from psycopg import errors, generators, pq

from dbsession.core import fork
from dbsession.core.backends.postgresql_errors import CLOSED_BEFORE_COMMIT, not_committed
from dbsession.core.backends.postgresql_sent import Kind, kind_of
from dbsession.core.backends.psycopg_attributes import SentOn
from dbsession.core.connection_info import HUNG_UP
from dbsession.core.given_up import GivesUp

IDLE, ACTIVE = pq.TransactionStatus.IDLE, pq.TransactionStatus.ACTIVE
OFF = pq.PipelineStatus.OFF
_BAD = pq.ConnStatus.BAD


class _Gone:
    """Stands in a pipeline for a connection that was given up: psycopg leaves the pipeline mode of others."""

    status = _BAD


class Known(GivesUp):
    """Before psycopg's Connection or AsyncConnection among the bases of ours. Lives as long as its place in the pool,
    or until something interrupts it in the middle of an answer: then it is given up, and the exception goes on as it
    is."""

    OPERATIONAL_ERROR = errors.OperationalError

    # psycopg's, and what a half gives.
    pgconn: Any
    _pipeline: Any
    _prepared: Any
    _autocommit: bool
    _tpc: Any
    _num_transactions: int
    _get_tx_start_command: Any
    _notify_handlers: Any
    _notifies_backlog: Any
    _poll: ClassVar[Callable[[], Any]] = select.poll

    database: str | None = None
    """Its name, for log lines."""
    on_abandon: Callable[[Any], None] | None = None
    """Called with this connection when nobody waits any more for a statement that may still run at the server; has to
    close `pgconn` then. Must not wait."""
    write_timeout_s: float | None = None
    told_autocommit = False  # `Sent.taken` of MySQL asks for it
    pinging = False
    """A ping was sent that is not answered."""
    _due = False  # a BEGIN goes with what is sent next
    _defers = False  # a statement comes with which it can go
    _sees = False  # it comes by a cursor that notes its text
    _began_other = False  # the transaction has sent something else than reading and writing rows
    _waiting = False  # a greenlet or thread waits for its answer
    _look: Any = None  # a poll object that knows the socket

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        fork.look()
        fork.prepare()
        super().__init__(*args, **kwargs)
        self._epoch = fork.epoch
        self.gave_up = self.commit_sent = False
        self.sent = SentOn()
        self.streams: weakref.WeakSet[Any] = weakref.WeakSet()
        self._ended = True  # nothing was sent since the last COMMIT or ROLLBACK was answered
        self._heard = monotonic()  # when the last answer came

    # What it knows.

    @property
    def closed(self) -> bool:
        """Whether it cannot be used any more."""
        return self.gave_up or self.pgconn.status == _BAD

    @property
    def open(self) -> bool:  # type: ignore[override]  # an attribute there
        """Whether it can still be used."""
        return not self.closed

    @property
    def autocommits(self) -> bool:
        """Whether each statement on the connection commits itself."""
        return self._autocommit

    @property
    def in_transaction(self) -> bool:
        """Whether a transaction is open, by the server's last answer."""
        return bool(self.pgconn.transaction_status != IDLE)

    @property
    def is_listened_to(self) -> bool:
        """Whether its user has left a handler of notifications on it."""
        return bool(self._notify_handlers)

    @property
    def settled(self) -> bool:
        """Whether it is known that no transaction is open, by what was sent and answered. The server's word can only
        make us doubt it."""
        return self._ended and self.pgconn.transaction_status == IDLE and self._tpc is None

    @property
    def unread(self) -> bool:
        """Whether an answer has not been read to its end: that of a COPY, or of psycopg's stream()."""
        return bool(self.pgconn.transaction_status == ACTIVE)

    @property
    def streaming(self) -> bool:
        """Whether a named cursor is open, or an answer is read piece by piece."""
        return self.unread or (self.in_transaction and any(not each.closed for each in list(self.streams)))

    def forget_answer(self) -> None:
        """Be for the next user what the connection was for the first one; its rows are kept by psycopg's cursors."""
        self.sent.take_back(self)

    def finish_at_hand(self) -> bool:
        return not self.unread

    def happened(self) -> int:
        """What poll() knows of the socket, of POLLIN and HUNG_UP: 0 if nothing has come and it is open. Never waits."""
        look = self._look
        if look is None:
            look = self._look = type(self)._poll()
            look.register(self.pgconn.socket, select.POLLIN | HUNG_UP)
        found = look.poll(0)
        return int(found[0][1]) if found else 0

    # Its end.

    def give_up(self, error: BaseException) -> None:
        """Close the connection, as nobody waits for the answer any more, and have the statement ended at the server."""
        if self.gave_up or self.pgconn.status == _BAD:
            return
        self.gave_up, self.given_up_by = True, error
        if self._pipeline is not None:  # of an executemany(), say, whose end must not take the place of a kill
            self._pipeline.pgconn = _Gone
            self._pipeline.result_queue.clear()
        fork.look()
        if self.on_abandon is not None and self._epoch == fork.epoch:  # in a forked child it is the parent's
            self.on_abandon(self)
        else:
            self.finish()

    def finish(self) -> None:
        """Close the socket. Never waits."""
        self.pgconn.finish()

    def interrupted(self, error: BaseException) -> None:
        """Give the connection up if `error` has come in the middle of an answer."""
        if not self.gave_up and (self.pgconn.transaction_status == ACTIVE or self.pgconn.pipeline_status != OFF):
            self.give_up(error)

    def close(self) -> Any:
        """Close the connection. Idempotent; whoever gives it up has it closed."""
        fork.look()  # in a child it says goodbye to nobody
        if self.unread or self._waiting:
            self.give_up(errors.OperationalError("the connection was closed in the middle of an answer"))
        if not self.gave_up:
            return super().close()  # type: ignore[misc]  # psycopg's
        return None

    def __del__(self, *_: Any) -> None:
        # psycopg's warns of one that was not closed: what is in a pool ends with the program.
        pass

    # What is sent. All of these are generators of psycopg's, which hold its lock.

    def _exec_command(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return (yield from super()._exec_command(*args, **kwargs))  # type: ignore[misc]
        except errors.InternalError as error:
            if error.sqlstate is not None:
                raise
            # More answers than one: a pooler that has lost its server adds its own error to that of the server.
            self.finish()
            raise errors.OperationalError(f"the connection was lost: {error}") from error

    def _start_query(self) -> Any:
        begins = not self._autocommit and self.pgconn.transaction_status == IDLE
        if begins and self._defers:
            self._due = True  # and note() comes, unless the parameters cannot be sent
            return
        if not self._sees:
            self._began_other = True
            self.sent.note_unseen()
        self._ended = self._ended and self._autocommit
        if begins:
            yield from super()._start_query()  # type: ignore[misc]

    def note(self, text: bytes) -> Kind:
        """Note a statement, or several in one text, about to be sent; return what kind it is."""
        kind = kind_of(text)
        if kind.begins or not self._autocommit:
            self._ended = False
        if not kind.rows_only:
            self._began_other = True
        if kind.changes:
            self.sent.note_change(text)
        return kind

    def _commit_gen(self) -> Any:
        self.commit_sent = False
        if self._num_transactions or self._tpc or self._pipeline:  # which raises, or waits for all answers
            self.commit_sent = self._pipeline is not None
            yield from super()._commit_gen()  # type: ignore[misc]
            return
        if self.settled or (self._autocommit and not self.in_transaction):
            return
        if self.happened() & ~select.POLLIN:
            self.pgconn.finish()
            raise errors.OperationalError(CLOSED_BEFORE_COMMIT)
        self.commit_sent = True
        result = yield from self._exec_command(b"COMMIT")
        self._note_end()
        if result is not None and result.command_status == b"ROLLBACK":
            self.commit_sent = False
            raise not_committed(self.database)

    def _rollback_gen(self) -> Any:
        if self.settled:
            return
        if self._num_transactions or self._tpc or self._pipeline:
            yield from super()._rollback_gen()  # type: ignore[misc]
            return
        yield from self._exec_command(b"ROLLBACK")
        other = self._began_other
        self._note_end()
        if other:  # psycopg does it always, which costs a round trip and all that was prepared
            self._prepared.clear()
            yield from self._prepared.maintain_gen(self)

    def _tpc_finish_gen(self, action: str, xid: Any) -> Any:
        self.commit_sent = action == "COMMIT"
        yield from super()._tpc_finish_gen(action, xid)  # type: ignore[misc]

    def _note_end(self) -> None:
        self._ended = self.pgconn.transaction_status == IDLE
        self._began_other = False

    def is_pooled(self) -> Any:
        """Ask, as one of psycopg's generators, whether a pooler stands between: the server process that answers is not
        the one that the connection was told of as it began."""
        result = yield from self._exec_command(b"SELECT pg_backend_pid()")
        return int(result.get_value(0, 0)) != self.pgconn.backend_pid

    def _ping_gen(self) -> Any:
        self.pgconn.send_query(b"")
        results = yield from generators.execute(self.pgconn)
        for result in results:
            if result.status == pq.ExecStatus.FATAL_ERROR:
                raise errors.error_from_result(result)

    def was_heard(self, idle_s: float) -> bool:
        """Whether the connection lives, as far as can be told without asking: it was heard less than `idle_s` seconds
        ago, and nothing has come since. Raises the driver's error if the server has closed it."""
        self.refuse_if_lost()
        if self.pgconn.transaction_status != IDLE:
            self.pgconn.finish()
            raise errors.OperationalError("the connection was left in the middle of a transaction")
        seen = self.happened()
        if seen & ~select.POLLIN:
            self.pgconn.finish()
            raise errors.OperationalError("the server has closed the connection")
        return not seen and monotonic() - self._heard < idle_s  # what has come may be a notice

    def _reset_gen(self) -> Any:
        """Take back what the session has set, and set again what was set as it was opened."""
        self._tpc = None
        if not self.settled:
            yield from self._exec_command(b"ROLLBACK")
        yield from self._exec_command(b"DISCARD ALL")
        self._prepared.clear()
        self._prepared._to_flush.clear()  # the server has none any more
        del self._notify_handlers[:]
        self._notifies_backlog = deque()
        for text in self.sent.settings or ():
            yield from self._exec_command(text)
        if self.pgconn.transaction_status != IDLE:
            yield from self._exec_command(b"COMMIT")
        self._note_end()
