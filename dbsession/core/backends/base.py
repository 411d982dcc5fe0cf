"""Backend: the rules of one kind of database, for whatever has no rules of its own."""

from __future__ import annotations

from enum import Enum
from typing import Any, ClassVar

from sqlalchemy.engine import Connection

from dbsession.core.config import DatabaseConfig
from dbsession.core.discards import Discards


class Verdict(Enum):
    """What has to follow an error."""

    DISCONNECT = "the connection is of no use any more, nor are those opened before it"
    FAILOVER = "the server takes no writes now: another one may be the primary, so connect anew"
    RETRY = "the whole unit of work may be run again, after a rollback"
    FATAL = "the statement failed, and that is all"


class Backend:
    """The rules of one engine's database: any that has no class of its own. Lives as long as the engine.

    A subclass in core says what a kind of database needs whichever half uses it; its subclasses in green and aio, one
    for each driver that they know, add the connections. No other module asks which database it is. What a subclass
    replaces in the dialect, and which events it listens to, it says by methods that `interceptors.install` finds:
    `around_<method of the dialect>` and `on_<event>`.
    """

    TITLE: ClassVar[str] = "other databases"
    KEYS: ClassVar[frozenset[str]] = frozenset()
    """Keys of an entry that it takes besides the common ones, whatever its driver is."""
    DRIVER_KEYS: ClassVar[dict[str, frozenset[str]]] = {}
    """Keys of an entry that it takes by a driver."""

    ASYNC_DRIVERS: ClassVar[dict[str, str]] = {}
    """Drivers that wait in the calling thread, and what stands in for them in asyncio. One that has both, such as
    psycopg, is taken as it is."""

    PAUSES: ClassVar[dict[str, str]] = {}
    """A statement that waits at the server for a moment, by SQLAlchemy's name of the dialect."""
    IS_FILE: ClassVar[bool] = False
    """It has no server, and its connections cost none anything."""

    ENDS: ClassVar[frozenset[str]] = frozenset({"commit", "end"})
    """Verbs of statements that end the transaction, besides ROLLBACK: nothing written before can be lost then."""
    NEUTRAL: ClassVar[frozenset[str]] = frozenset(
        {"begin", "start", "lock", "listen", "unlisten", "declare", "fetch", "move", "close", "discard", "reset"}
    )
    """Verbs of statements that write nothing which a ROLLBACK would undo, besides those that read."""

    knows_autocommit: ClassVar[bool] = True
    """SQLAlchemy's word that a connection is in autocommit is the client's own knowledge, and not the server's word."""

    savepoints_hold = False
    """An error that has undone a part of a transaction has undone nothing before the savepoint that was set last."""
    has_to_go = "the whole transaction (a savepoint is not enough)"
    """What has to be rolled back after such an error, for its text."""
    in_process = False
    """Nothing can be lost on the way to it, and it undoes nothing behind our back."""
    no_op = "SELECT 1"
    """A statement that does nothing."""

    def __init__(self, config: DatabaseConfig) -> None:
        self.config = config
        self.discards = Discards()

    @classmethod
    def keys(cls, driver: str) -> frozenset[str]:
        """Return the keys of an entry that it takes by `driver`, besides the common ones."""
        return cls.KEYS | cls.DRIVER_KEYS.get(driver, frozenset())

    @staticmethod
    def product(connection: Connection) -> str:
        """Return the name and version of the database that answers. Switches."""
        dialect = connection.dialect
        return " ".join([dialect.name, ".".join(map(str, dialect.server_version_info or ()))]).strip()

    # What its engine is made with.

    def engine_options(self) -> dict[str, Any]:
        """Return the arguments of create_engine that stand below the user's own.

        Raises:
            ConfigError: [DBS-CONFIG] the URL cannot be used so.
        """
        return {}

    def fair_pool_options(self) -> dict[str, Any]:
        """Return the arguments of create_engine that are needed besides, where the pool is ours."""
        return {}

    # Its connections.

    def connected(self, connection: Any, info: dict[Any, Any]) -> None:
        """Give a DBAPI connection just opened what it needs; `info` is its pool record's. May switch."""

    def takes_writes(self, connection: Any) -> bool:
        """Return whether the server of a DBAPI connection, or of the pool's proxy of one, takes writes; False if it
        does not say. May switch."""
        return True

    async def closed(self) -> None:
        """Wait, in asyncio, for what ends aside after its connections were closed; bounded."""

    def close_before_fork(self) -> bool:
        """Return whether its idle connections have to be closed before a fork."""
        return False

    def abandon(self, inherited: list[Any]) -> None:
        """Forget, in a forked child, whoever waited in the parent, whose connections are `inherited`. Never waits."""

    def still_open(self, connection: Any) -> bool:
        """Return whether the server says that a transaction is open, after a COMMIT or ROLLBACK on this DBAPI
        connection."""
        return False

    @staticmethod
    def in_transaction(connection: Any) -> bool:
        """Return whether a transaction may be open on a DBAPI connection, as far as the client itself knows."""
        return True

    def autocommits(self, connection: Any) -> bool | None:
        """Return whether each statement on SQLAlchemy's proxy of a DBAPI connection commits itself; None: by its
        isolation level, since the driver does not tell."""
        connection = getattr(connection, "dbapi_connection", connection)
        found = getattr(connection, "autocommit", None)  # psycopg's, among others
        return found if isinstance(found, bool) else None

    def may_have_kept(self, connection: Any) -> bool:
        """Return whether something written on it since the last COMMIT or ROLLBACK was committed by itself."""
        return self.autocommits(connection) is True

    @staticmethod
    def commits_by_setting(statement: str) -> bool:
        """Return whether a statement that begins with SET commits what was written before it, and goes on in
        autocommit."""
        return False

    # What an error means.

    def classify(self, error: BaseException) -> Verdict:
        """Return what has to follow `error`, the driver's or SQLAlchemy's wrapper of it."""
        return Verdict.FATAL

    @staticmethod
    def is_full(error: BaseException) -> bool:
        """Return whether an error at connecting says that the server, or a proxy, has no room for one more."""
        return False

    def write_refused(self, error: BaseException, connection: Any) -> None:
        """Note that a write was refused on a connection by an `error` that is FAILOVER. No I/O."""

    def is_failover(self, error: BaseException, connection: Any) -> bool:
        """Return whether it is the server that takes no writes, after an `error` that is FAILOVER, and not something of
        this session. May switch."""
        return True

    def may_have_committed(self, error: BaseException, is_disconnect: bool) -> bool:
        """Return whether a COMMIT that ended with the driver's `error` may have been carried out all the same;
        `is_disconnect` is SQLAlchemy's word for it."""
        return is_disconnect

    def undid_statement_only(self, error: BaseException, connection: Any) -> bool:
        """Return whether a retryable `error` has undone its statement only, so that the transaction can go on; asked
        where it goes on, with SQLAlchemy's proxy of its DBAPI connection. May ask the server, and switch."""
        return False

    def undoes_more(self, error: BaseException) -> bool:
        """Return whether the driver's `error`, which is not retryable, has undone more than its statement."""
        return False

    @staticmethod
    def is_retryable(error: BaseException) -> bool:
        """Return whether `error`, of any driver, is one of this kind of database after which the whole unit of work may
        be run again."""
        return False
