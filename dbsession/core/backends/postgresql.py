"""PostgreSQL, whichever driver and half: which keys they take, what a session is given, what an error means."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from sqlalchemy.engine import Connection

from dbsession.core.backends import postgresql_errors
from dbsession.core.backends.base import Backend, Verdict
from dbsession.core.config import TIMEOUTS
from dbsession.core.connection_info import driver_of
from dbsession.errors import ConfigError

READ_ONLY = "SELECT pg_is_in_recovery() OR current_setting('transaction_read_only')::bool"
"""Whether the server takes no writes now."""

_BY_ALL = {"connect_timeout_s", "read_timeout_s", "ping_idle_s"}
_READ_ONLY = "default_transaction_read_only"


class PostgreSQL(Backend):
    """The rules of one engine's PostgreSQL. Lives as long as the engine."""

    TITLE = "PostgreSQL"
    KEYS = frozenset({"readonly"})
    DRIVER_KEYS: ClassVar[dict[str, frozenset[str]]] = {
        "psycopg": frozenset({*_BY_ALL, *TIMEOUTS, "reset", "kill_abandoned"}),
        "psycopg2": frozenset({*_BY_ALL, *TIMEOUTS, "reset", "kill_abandoned"}),
        "asyncpg": frozenset({*_BY_ALL, "reset"}),
    }
    ASYNC_DRIVERS: ClassVar[dict[str, str]] = {"psycopg2": "asyncpg"}
    PAUSES: ClassVar[dict[str, str]] = {"postgresql": "SELECT pg_sleep(0.05)"}

    savepoints_hold = True
    has_to_go = "to a savepoint that was set before it, or the whole transaction,"

    pooled: bool | None = None
    """A pooler (PgBouncer, say) stands between, and each transaction may be in another session; None: nobody has
    asked yet."""

    @staticmethod
    def product(connection: Connection) -> str:
        return f"PostgreSQL {connection.exec_driver_sql('SHOW server_version').scalar()}"

    def on_do_connect(self, dialect: Any, record: Any, args: Any, arguments: dict[str, Any]) -> None:
        """Have a `readonly` database's sessions start read-only: a SET would, behind a pooler, be left to whoever gets
        the server's session next."""
        if not self.config.readonly:
            return
        if dialect.driver == "asyncpg":
            settings = arguments.get("server_settings") or {}
            arguments["server_settings"] = {**settings, _READ_ONLY: "on"}
        else:
            arguments["options"] = f"{arguments.get('options') or ''} -c {_READ_ONLY}=on".strip()

    def connected(self, connection: Any, info: dict[Any, Any]) -> None:
        if self.config.readonly and reported(connection, _READ_ONLY) == "off":  # PostgreSQL 14 and later tell it
            connection.close()
            raise ConfigError(
                f"Database {self.config.name!r} is `readonly`, but its session has begun with {_READ_ONLY} off: "
                "something in between has dropped what was asked for at its start, as PgBouncer does by its "
                "ignore_startup_parameters. Give the URL of the server itself; or that of an account that may only "
                "read, without `readonly`."
            )

    def takes_writes(self, connection: Any) -> bool:
        cursor = connection.cursor()
        try:
            cursor.execute(READ_ONLY)
            return not cursor.fetchone()[0]
        finally:
            cursor.close()
            connection.rollback()

    def autocommits(self, connection: Any) -> bool | None:
        known: bool | None = getattr(driver_of(connection), "autocommits", None)
        return super().autocommits(connection) if known is None else known

    def classify(self, error: BaseException) -> Verdict:
        return postgresql_errors.classify(error)

    @staticmethod
    def is_full(error: BaseException) -> bool:
        return postgresql_errors.is_full(error)

    def is_failover(self, error: BaseException, connection: Any) -> bool:
        # Its transaction is of no use any more, so nothing can be asked in it; but PostgreSQL 14 and later tell these
        # two as they change. The session's user may have begun a READ ONLY transaction.
        told = [reported(connection, name) for name in ("in_hot_standby", _READ_ONLY)]
        return "on" in told or None in told

    def may_have_committed(self, error: BaseException, is_disconnect: bool) -> bool:
        return postgresql_errors.commit_may_have_happened(error, is_disconnect)

    def undoes_more(self, error: BaseException) -> bool:
        # Until a savepoint is rolled back to the server refuses whatever comes, and makes a ROLLBACK of a COMMIT,
        # without an error: https://www.postgresql.org/docs/current/sql-commit.html
        return postgresql_errors.state(error) is not None

    @staticmethod
    def is_retryable(error: BaseException) -> bool:
        return postgresql_errors.is_retryable(error)


def reported(connection: Any, name: str) -> str | None:
    """Return a setting of the server as it has told by itself on a connection, without asking; None: it does not tell,
    or the driver does not."""
    driver = driver_of(connection)
    if hasattr(driver, "get_parameter_status"):  # psycopg2
        found = driver.get_parameter_status(name)
    elif hasattr(driver, "get_settings"):  # asyncpg
        found = getattr(driver.get_settings(), name, None)
    else:
        ask: Callable[[str], str | None] | None = getattr(getattr(driver, "info", None), "parameter_status", None)
        found = None if ask is None else ask(name)
    return found if isinstance(found, str) else None
