"""What a database, its driver and its pool have said of themselves: plain values, for the findings and for JSON."""

from __future__ import annotations

from dataclasses import dataclass

from dbsession.core.backends import KINDS
from dbsession.core.backends.base import Backend


@dataclass(frozen=True)
class PoolFacts:
    """What is known of one process's pool.

    Attributes:
        limit: connections that it opens at most; None: as many as are asked for.
        keeps: whether it keeps idle ones.
        recycle_s: age at which one is replaced; None: never.
        pre_ping: whether one is tested at its checkout.
    """

    limit: int | None
    keeps: bool
    recycle_s: int | None
    pre_ping: bool


@dataclass(frozen=True)
class Limit:
    """A bound on the connections of some who share it, besides the server's own.

    Attributes:
        check: the name of the finding that compares it with the budget.
        owner: whose it is: names of one server with the same owner are reckoned together.
        setting: what it is called there.
        most: the number of connections.
    """

    check: str
    owner: str
    setting: str
    most: int


@dataclass(frozen=True)
class ServerFacts:
    """What any server says of itself; a subclass for each kind of database has the rest. `host` and `port` are by its
    own account, and not by the URL's."""

    host: str
    port: int
    account: str
    tls: str | None
    time_zone: str
    utc_offset_s: int
    isolation: str
    max_connections: int

    @property
    def identity(self) -> object:
        """What two names have in common that lead to one server, whatever their URLs are."""
        return self.host, self.port

    @property
    def in_use(self) -> int:
        """The connections of everybody at the moment, with the one that asked."""
        raise NotImplementedError

    @property
    def reserved(self) -> int:
        """How many of `max_connections` an ordinary account never gets."""
        return 0

    @property
    def pooled(self) -> bool:
        """Whether a pooler stands between, so that our connections are not the server's."""
        return False

    @property
    def limits(self) -> tuple[Limit, ...]:
        """The bounds on our connections besides `max_connections`."""
        return ()


@dataclass(frozen=True)
class FileFacts:
    """What SQLite says of its file. `writable`: None if the database is configured as read-only, or somebody holds its
    lock."""

    journal_mode: str
    writable: bool | None


@dataclass(frozen=True)
class Facts:
    """One database. `version` is None when it could not be reached; `error` says why, or what went wrong later.

    Attributes:
        driver: as in the URL, `mysql+pymysql`.
        latency_ms: a round trip, the median of probe.ROUND_TRIPS.
        cooperative: whether another greenlet ran while the driver waited; None: not patched, or not measured.
        error_number: the driver's; of PostgreSQL, the SQLSTATE.
    """

    name: str
    driver: str
    pool: PoolFacts
    version: str | None = None
    latency_ms: float | None = None
    cooperative: bool | None = None
    server: ServerFacts | None = None
    file: FileFacts | None = None
    error: str | None = None
    error_number: int | str | None = None

    @property
    def is_file(self) -> bool:
        """Whether the database is a file, and no server."""
        return KINDS.get(self.backend_name, Backend).IS_FILE

    @property
    def backend_name(self) -> str:
        """SQLAlchemy's name of the dialect, `mysql`."""
        return self.driver.partition("+")[0]
