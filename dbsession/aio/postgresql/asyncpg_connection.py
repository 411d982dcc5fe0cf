"""An asyncpg connection that knows what was sent on it, and whose abandoned statements are ended as the loop ends, too.

asyncpg itself asks the server to end what is cancelled, and sends nothing else until that was answered. The names with
an underscore are asyncpg's; each has its line in tests/unit/test_private_names.py.
"""

from __future__ import annotations

import asyncio
import select
from collections.abc import Callable
from functools import cache
from time import monotonic
from typing import Any

from dbsession.aio import teardown
from dbsession.aio.abandoned import EndsAbandoned
from dbsession.core.backends.postgresql_cancel import TIMEOUT_S, Cancels
from dbsession.core.backends.postgresql_sent import Sent, kind_of
from dbsession.core.connection_info import HUNG_UP
from dbsession.core.pool.stats import Stats

_SENDING = ("execute", "executemany", "fetch", "fetchrow", "fetchval", "fetchmany", "prepare", "cursor")
"""Methods of asyncpg's connections whose first argument is a statement."""

_COPYING = ("copy_from_table", "copy_from_query", "copy_to_table", "copy_records_to_table")
"""Methods of asyncpg's connections that COPY: one that is cancelled in its middle may break the connection."""

# What DISCARD ALL does, but for the prepared statements, which asyncpg keeps and knows; and the role.
_RESET = "DISCARD TEMP; DISCARD SEQUENCES; SET SESSION AUTHORIZATION DEFAULT;"


class Knows:
    """Before asyncpg's Connection among the bases of ours. Lives as long as its place in the pool, or until something
    interrupts it in the middle of an answer."""

    # asyncpg's.
    _cancel: Any
    _cancellations: set[Any]
    execute: Any
    is_closed: Callable[[], bool]
    is_in_transaction: Callable[[], bool]

    def __init__(self, protocol: Any, transport: Any, *rest: Any, **more: Any) -> None:
        super().__init__(protocol, transport, *rest, **more)  # type: ignore[call-arg]  # asyncpg's
        self.transport: asyncio.WriteTransport = transport
        self.sent = Sent()
        self.prepares = False
        """Its user has prepared a statement by SQL, which no reset of asyncpg's takes away."""
        self.tag: str | None = None
        """What the server has called the last statement without parameters: a COMMIT that has failed is a ROLLBACK."""
        self.asked_to_cancel = False
        """The server was asked to end a statement of this connection."""
        self.pinging = False
        self.streams = 0
        """How many server-side cursors of SQLAlchemy's are open."""
        self.heard = monotonic()
        """When the last answer came."""
        self.on_interrupted: Callable[[], Callable[[BaseException], None] | None] = lambda: None
        """Returns what gives this connection up, if somebody uses it."""
        self._look: Any = None

    def note(self, text: Any) -> None:
        """Note a statement, or several in one text, about to be sent."""
        if isinstance(text, str):
            sent = text.encode()
            if kind_of(sent).changes:
                self.sent.note_change(sent)
                self.prepares = self.prepares or b"prepare" in sent.lower()

    @property
    def in_transaction(self) -> bool:
        """Whether a transaction is open, by the server's last answer."""
        return not self.is_closed() and self.is_in_transaction()

    @property
    def streaming(self) -> bool:
        """Whether a server-side cursor is open."""
        return self.streams > 0 and self.in_transaction

    def happened(self) -> int:
        """What poll() knows of the socket, of POLLIN and HUNG_UP: 0 if nothing has come and it is open. Never waits."""
        look = self._look
        if look is None:
            socket = self.transport.get_extra_info("socket")
            if socket is None or not hasattr(select, "poll"):
                return select.POLLIN
            look = self._look = select.poll()
            look.register(socket.fileno(), select.POLLIN | HUNG_UP)
        found = look.poll(0)
        return int(found[0][1]) if found else 0

    def was_closed(self) -> bool:
        """Whether the server or we have closed it, whatever of it is unread. Never waits."""
        return self.is_closed() or self.transport.is_closing() or bool(self.happened() & ~select.POLLIN)

    def get_reset_query(self) -> str:
        """Return what asyncpg's `reset()` sends."""
        stock: str = super().get_reset_query()  # type: ignore[misc]
        return f"{stock}\n{_RESET}"

    def _cancel_current_command(self, *waiters: Any) -> None:  # one before asyncpg 0.32
        self.asked_to_cancel = True
        # asyncpg's own task would be cancelled with all others at the end of asyncio.run(), and nobody would ask.
        task = teardown.run_aside(self._ask_to_cancel(*waiters), TIMEOUT_S)
        self._cancellations.add(task)

    async def _ask_to_cancel(self, *waiters: Any) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            await self._cancel(*waiters)


def _noting(name: str) -> Callable[..., Any]:
    if name == "execute":

        async def execute(self: Any, query: Any, *arguments: Any, **more: Any) -> Any:
            self.note(query)
            self.tag = found = await super(Knows, self).execute(query, *arguments, **more)
            return found

        return execute

    def send(self: Any, query: Any, *arguments: Any, **more: Any) -> Any:
        self.note(query)
        return getattr(super(Knows, self), name)(query, *arguments, **more)

    send.__name__ = name
    return send


def _giving_up(name: str) -> Callable[..., Any]:
    async def copy(self: Any, *arguments: Any, **more: Any) -> Any:
        try:
            return await getattr(super(Knows, self), name)(*arguments, **more)
        except BaseException as error:
            give_up = None if isinstance(error, Exception) else self.on_interrupted()
            if give_up is not None:
                give_up(error)
            raise

    copy.__name__ = name
    return copy


for _name in _SENDING:
    setattr(Knows, _name, _noting(_name))
for _name in _COPYING:
    setattr(Knows, _name, _giving_up(_name))


@cache
def known_class(base: type[Any]) -> type[Any]:
    """Return asyncpg's class of connections, or the user's own, with what `Knows` adds."""
    return type(f"Known{base.__name__}", (Knows, base), {})


class LoopCloser(Cancels, EndsAbandoned):
    """Closes the connections that were given up, once the server has ended their statements. Lives as `EndsAbandoned`
    says."""

    bound_s = TIMEOUT_S

    def __init__(self, name: str, stats: Stats) -> None:
        Cancels.__init__(self, name, stats)
        EndsAbandoned.__init__(self)

    def abandon(self, connection: Any) -> None:
        """Have this connection closed. Does not wait."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:  # a destructor, or the loop has ended
            connection.terminate()
            return
        self.abandoned.append(connection)
        self.begin()

    async def end(self, connection: Any) -> None:
        try:
            await connection.close(timeout=TIMEOUT_S)
        except BaseException:
            connection.terminate()
            raise
        if connection.asked_to_cancel:
            self.sent()

    def failed(self, error: Exception, connection: Any) -> None:
        """Report it, and close the others: each would wait as long for a server that does not answer."""
        if connection.asked_to_cancel:
            self.not_sent(error)
        while self.abandoned:
            self.abandoned.popleft().terminate()
