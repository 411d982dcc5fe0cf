"""What a database is configured as: validated once, frozen."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeGuard

from sqlalchemy.engine import URL

from dbsession.errors import ConfigError

Entry = str | URL | Mapping[str, Any]
Databases = Mapping[str, Entry] | Callable[[str], Entry | None]

TIMEOUTS = ("connect_timeout_s", "read_timeout_s", "write_timeout_s")
GUARDS = ("off", "warn", "raise")
RESETS = ("rollback", "connection")

_LARGEST_S = 31_536_000  # a year, which is also PyMySQL's limit


@dataclass(frozen=True)
class DatabaseConfig:
    """One database's configuration. Immutable. Its repr shows neither the URL nor the options: both may hold secrets.

    Attributes:
        url: where it is.
        options: keyword arguments for `sqlalchemy.create_engine`.
        session: keyword arguments for `sqlalchemy.orm.sessionmaker`.
        busy_timeout_s: seconds that a statement waits for SQLite's write lock.
        leak_after_s: a connection held longer is reported, once; 0: none is.
        idle_in_transaction_s: so is one whose transaction is open while no statement has run for so long; 0: none is.
        guard: what becomes of a Session object used by another greenlet or thread than the one whose scope owns it:
            "off", "warn" (logged, once a session) or "raise". Without the key the environment's DBSESSION_GUARD.
        readonly: each statement is a transaction of its own, and a write is refused (MySQL, MariaDB, SQLite).
        given: the keys that its entry had.

    The rest is for MySQL and MariaDB by PyMySQL, and but for `write_timeout_s` and `reset` by asyncmy and aiomysql:

        connect_timeout_s: seconds for connecting, the handshake included.
        read_timeout_s, write_timeout_s: seconds without a byte from or to the server. The default for reading is above
            innodb_lock_wait_timeout (50), so that a lock wait arrives as error 1205 and not as a lost connection.
        reset: what a returned connection gets: "rollback", or "connection", after which nothing of the session's
            state at the server is left.
        kill_abandoned: whether a statement that nobody waits for any more is killed at the server.
        ping_idle_s: at its checkout a connection that was idle for so many seconds is asked whether it lives; one that
            was not is looked at only, which costs no round trip. 0: always asked.
    """

    name: str
    url: URL = field(repr=False)
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    session: Mapping[str, Any] = field(default_factory=dict, repr=False)
    busy_timeout_s: float = 5.0
    connect_timeout_s: float = 10.0
    read_timeout_s: float = 60.0
    write_timeout_s: float = 60.0
    reset: str = "rollback"
    kill_abandoned: bool = True
    ping_idle_s: float = 1.0
    readonly: bool = False
    leak_after_s: float = 60.0
    idle_in_transaction_s: float = 0.0
    guard: str = "off"
    given: tuple[str, ...] = field(default=(), compare=False)

    @cached_property  # asked at the end of each transaction
    def isolation_level(self) -> str | None:
        """The engine's isolation level, or None for the server's default."""
        return "AUTOCOMMIT" if self.readonly else self.options.get("isolation_level")

    @property
    def backend(self) -> str:
        """The kind of database: `mysql`, `mariadb`, `sqlite`, `postgresql` ..."""
        return self.url.get_backend_name()


def shown(word: object) -> str:
    """Return `word` for an error's text, unless it may be a URL that stands in the wrong place, with a password in
    it."""
    if isinstance(word, str):
        return repr(word) if re.fullmatch(r"[\w.+ -]*", word) else "(not shown: no plain word)"
    return repr(word) if word is None or isinstance(word, (int, float)) else f"a {type(word).__qualname__}"


def seconds(name: str, key: str, value: object) -> float:
    """Return `value` as a number of seconds, from 0 to a year; raise ConfigError for anything else."""
    if not _is_finite(value) or value < 0:
        raise ConfigError(f"Database {name!r}: `{key}` is {shown(value)}: give a number of seconds, from 0 to a year.")
    return float(value)


def positive_seconds(value: object, what: str) -> float:
    """Return `value` as a number of seconds, above 0 and at most a year; raise ConfigError, in which `what` says whose
    it is, for anything else."""
    if not _is_finite(value) or value <= 0:
        raise ConfigError(f"{what} is {shown(value)}: give a number of seconds above 0, at most a year.")
    return float(value)


def _is_finite(value: object) -> TypeGuard[float]:
    # Not math.isfinite(), which fails on a whole number too large for a float.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST_S
