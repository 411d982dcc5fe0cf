"""MySQL and MariaDB, whichever driver and half: which keys they take, what a session is given, what an error means."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from sqlalchemy.engine import Connection

from dbsession.core.backends import mysql_errors
from dbsession.core.backends.base import Backend, Verdict
from dbsession.core.backends.mysql_sent import Sent, sets_autocommit_on
from dbsession.core.config import TIMEOUTS
from dbsession.core.connection_info import ASIDE, TIMEOUT_UNDOES_ALL, USED, driver_of
from dbsession.errors import ConfigError

READ_ONLY = (
    "SHOW GLOBAL VARIABLES WHERE Variable_name IN ('read_only', 'super_read_only', 'innodb_read_only', "
    "'tx_read_only', 'transaction_read_only') AND Value NOT IN ('OFF', '0', 'NO')"
)
"""Answered with a row for each reason for which the server takes no writes."""

_BOTH_HALVES = {"connect_timeout_s", "read_timeout_s", "kill_abandoned", "ping_idle_s"}


class MySQL(Backend):
    """The rules of one engine's MySQL or MariaDB. Lives as long as the engine."""

    TITLE = "MySQL and MariaDB"
    KEYS = frozenset({"readonly"})
    DRIVER_KEYS: ClassVar[dict[str, frozenset[str]]] = {
        "pymysql": frozenset({*_BOTH_HALVES, *TIMEOUTS, "reset"}),
        "asyncmy": frozenset(_BOTH_HALVES),
        "aiomysql": frozenset(_BOTH_HALVES),
    }

    ASYNC_DRIVERS: ClassVar[dict[str, str]] = {"pymysql": "asyncmy", "mysqldb": "asyncmy"}

    PAUSES: ClassVar[dict[str, str]] = dict.fromkeys(("mysql", "mariadb"), "SELECT SLEEP(0.05)")

    # https://dev.mysql.com/doc/refman/en/implicit-commit.html
    ENDS = Backend.ENDS | {
        *("alter", "analyze", "begin", "cache", "check", "create", "drop", "flush", "grant", "install", "lock"),
        *("optimize", "rename", "repair", "reset", "revoke", "start", "truncate", "uninstall"),
    }
    NEUTRAL = frozenset({"checksum", "deallocate", "do", "handler", "help", "kill", "prepare", "unlock", "xa"})

    knows_autocommit = False  # a bit of the server's answers

    no_op = "DO 0"

    @staticmethod
    def product(connection: Connection) -> str:
        dialect: Any = connection.dialect
        name = "MariaDB" if dialect.is_mariadb else "MySQL"
        return f"{name} {connection.exec_driver_sql('SELECT VERSION()').scalar()}"

    def connected(self, connection: Any, info: dict[Any, Any]) -> None:
        if self.config.readonly:
            cursor = connection.cursor()
            cursor.execute("SET SESSION TRANSACTION READ ONLY")
            cursor.close()

    def around_detect_autocommit_setting(self, inner: Callable[[Any], bool]) -> Callable[[Any], bool]:
        def detect_autocommit_setting(dbapi_conn: Any) -> bool:
            # Asked with `skip_autocommit_rollback`, to leave out a ROLLBACK.
            settled: bool | None = getattr(driver_of(dbapi_conn), "settled", None)
            return inner(dbapi_conn) if settled is None else settled

        return detect_autocommit_setting

    def around_set_isolation_level(self, inner: Callable[..., None]) -> Callable[..., None]:
        def set_isolation_level(dbapi_connection: Any, level: Any) -> None:
            # That of one checkout is SQLAlchemy's to take back.
            sent: Sent | None = getattr(driver_of(dbapi_connection), "sent", None)
            if sent is None or sent.phase is not USED:
                inner(dbapi_connection, level)
                return
            sent.phase, sent.level_changed = ASIDE, True
            try:
                inner(dbapi_connection, level)
            finally:
                sent.phase = USED

        return set_isolation_level

    def takes_writes(self, connection: Any) -> bool:
        try:
            return not self._ask(connection, READ_ONLY)
        except Exception as failure:
            if not mysql_errors.is_refusal(failure):
                raise
            return False

    def autocommits(self, connection: Any) -> bool | None:
        driver = driver_of(connection)
        known: bool | None = getattr(driver, "autocommits", None)
        if known is None and hasattr(driver, "get_autocommit"):
            known = bool(driver.get_autocommit())
        return known

    def may_have_kept(self, connection: Any) -> bool:
        driver = connection.dbapi_connection  # driver_of(), without its call at the end of each transaction
        driver = getattr(driver, "driver_connection", driver)
        sent: Sent | None = getattr(driver, "sent", None)
        if sent is None:
            return self.autocommits(connection) is True
        return sent.kept or sent.autocommits(driver.told_autocommit)

    commits_by_setting = staticmethod(sets_autocommit_on)

    def classify(self, error: BaseException) -> Verdict:
        return mysql_errors.classify(error)

    @staticmethod
    def is_full(error: BaseException) -> bool:
        return mysql_errors.number(error) in mysql_errors.FULL

    def write_refused(self, error: BaseException, connection: Any) -> None:
        # Its user may have made the session READ ONLY where we have not seen it, as by a procedure.
        sent: Sent | None = getattr(driver_of(connection), "sent", None)
        if sent is not None and mysql_errors.number(error) == mysql_errors.READ_ONLY_TRANSACTION:
            sent.changed = True

    def is_failover(self, error: BaseException, connection: Any) -> bool:
        # The same number for a transaction that the program itself has begun READ ONLY.
        return mysql_errors.number(error) != mysql_errors.READ_ONLY_TRANSACTION or not self.takes_writes(connection)

    def may_have_committed(self, error: BaseException, is_disconnect: bool) -> bool:
        return mysql_errors.commit_may_have_happened(error)

    def undid_statement_only(self, error: BaseException, connection: Any) -> bool:
        if mysql_errors.number(error) != mysql_errors.LOCK_WAIT_TIMEOUT:
            return False
        # Asked once for each connection that needs it: behind the next one there may be another server.
        known: bool | None = connection.info.get(TIMEOUT_UNDOES_ALL)
        if known is None:
            try:
                known = bool(self._ask(connection, "SELECT @@innodb_rollback_on_timeout")[0][0])
            except Exception as failure:
                if not mysql_errors.is_refusal(failure):
                    raise
                known = True  # a server that does not tell: nothing of what it may have undone is to be committed
            connection.info[TIMEOUT_UNDOES_ALL] = known
        return not known

    def _ask(self, connection: Any, question: str) -> Any:
        """Return the rows that a DBAPI connection, or the pool's proxy of one, has for a question of ours."""
        cursor = connection.cursor()
        try:
            cursor.execute(question)
            return cursor.fetchall()
        finally:
            cursor.close()

    @staticmethod
    def is_retryable(error: BaseException) -> bool:
        return mysql_errors.is_retryable(error)

    def driver_arguments(self, **timeouts: float) -> dict[str, Any]:
        """Return the arguments of the driver's connect() below what the URL's query says: utf8mb4, and `timeouts`.

        Raises:
            ConfigError: [DBS-CONFIG] `connect_args` ask for rows that SQLAlchemy cannot read.
        """
        given = self.config.options.get("connect_args", {})
        for key in ("cursorclass", "cursor_cls"):
            if hasattr(given.get(key), "dict_type"):  # what each driver's DictCursor and SSDictCursor have
                raise ConfigError(
                    f"Database {self.config.name!r}: `{key}` in `connect_args` is {given[key].__name__}, whose rows "
                    "are dicts, and SQLAlchemy reads rows by position. Remove it, and use result.mappings(); a raw "
                    "cursor of your own can be given the class: raw_connection().cursor(DictCursor)."
                )
        defaults = {"charset": "utf8mb4", **timeouts}
        return {key: value for key, value in defaults.items() if key not in self.config.url.query}
