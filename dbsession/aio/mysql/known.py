"""Connections of asyncmy and aiomysql that know what was sent on them, by whomever.

Both drivers send each command, of raw cursors, too, by a private method, `_execute_command`; there is no public way to
see what goes out. tests/unit/test_private_names.py fails loudly when the name goes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pymysql.constants import SERVER_STATUS

from dbsession.core.backends.mysql_sent import RESET_CONNECTION, Sent
from dbsession.core.connection_info import ASIDE


def make_known(connection: Any, arguments: Mapping[str, Any]) -> None:
    """Give a connection that the driver has just opened with these arguments what `known_class` adds, unless a creator
    of the user's made something else."""
    if not hasattr(connection, "_execute_command"):
        return
    driver: Any = type(connection)
    connection.__class__ = known_class(driver)
    connection.sent = sent = Sent(several=True)  # both drivers ask the server for that
    connection.first_database = arguments.get("db") or arguments.get("database")
    if arguments.get("read_default_file") or arguments.get("stmt_cache_size"):
        sent.settings = None  # what that file says was set, or a reset would take prepared statements away
    elif sent.settings is not None:
        if arguments.get("sql_mode") is not None:
            sent.settings[b"SET sql_mode"] = f"SET sql_mode={arguments['sql_mode']}".encode()
        if arguments.get("init_command") is not None:
            sent.settings[b"init_command"] = str(arguments["init_command"]).encode()


def known_class(driver: Any) -> Any:
    """Return the driver's class of connections with a note of what is sent, and with ends of transactions that rest on
    it and not on the server's word."""

    class Connection(driver):  # type: ignore[misc]  # of Any: asyncmy's or aiomysql's
        sent: Sent
        first_database: str | None
        _cutting = "another statement was sent on its connection"

        def _execute_command(self, command: int, sql: Any) -> Any:
            self.sent.command(command, sql)
            result = self._result
            if result is not None and result.unbuffered_active:
                return self._execute_after_stream(result, command, sql)
            return driver._execute_command(self, command, sql)

        async def _execute_after_stream(self, result: Any, command: int, sql: Any) -> None:
            """Send a command for which the driver reads the rest of a server-side stream away, and say so to whoever
            may still fetch it; not when only its end was unread."""
            if await result._read_rowdata_packet_unbuffered() is not None:
                self._dbsession_wire.cut_stream(self._cutting)
            await driver._execute_command(self, command, sql)

        @property
        def settled(self) -> bool:
            """Whether it is known that no transaction is open; the server's word can only make us doubt it."""
            sent = self.sent
            if sent.ended_at != sent.count or self.server_status & SERVER_STATUS.SERVER_STATUS_IN_TRANS:
                return False
            return not sent.autocommit or self.told_autocommit

        @property
        def told_autocommit(self) -> bool:
            """Whether the connection is in autocommit, by the server's last answer."""
            return bool(self.server_status & SERVER_STATUS.SERVER_STATUS_AUTOCOMMIT)

        @property
        def autocommits(self) -> bool:
            """Whether each statement on the connection commits itself."""
            return self.sent.autocommits(self.told_autocommit)

        @property
        def still_open(self) -> bool:
            """Whether a transaction is open, by the server's last answer."""
            return bool(self.server_status & SERVER_STATUS.SERVER_STATUS_IN_TRANS)

        async def commit(self) -> None:
            before = self.sent.count
            self._cutting = "its transaction was committed"
            try:
                await driver.commit(self)
            finally:
                del self._cutting
            self.sent.ended(before)

        async def rollback(self) -> None:
            if not self.settled:
                before = self.sent.count
                await driver.rollback(self)
                self.sent.ended(before)

        async def autocommit(self, value: Any) -> None:
            self.autocommit_mode = bool(value)
            if self.sent.autocommit is not self.autocommit_mode or self.told_autocommit is not self.autocommit_mode:
                before = self.sent.count
                await self._send_autocommit_mode()
                self.sent.autocommit_set(self.autocommit_mode, before, self.told_autocommit)

        async def reset(self) -> bool:
            """Take back what the connection's user has set, and set again what was set as it was opened. Return whether
            that is enough."""
            sent = self.sent
            if sent.unsettable or sent.settings is None or (sent.moved and not self.first_database):
                return False
            sent.phase = ASIDE
            before = sent.count
            await self._execute_command(RESET_CONNECTION, b"")
            await self._read_ok_packet()
            sent.ended(before)
            if sent.moved:
                await self.select_db(self.first_database)
            for statement in list(sent.settings.values()):
                await self.query(statement)
            if sent.mode_at_first is not None:
                await self.autocommit(sent.mode_at_first)
            sent.returned()
            return True

    Connection.__name__ = Connection.__qualname__ = f"Known{driver.__name__}"
    return Connection
