"""What a database is configured as: validated once, frozen."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeGuard

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from dbsession.errors import ConfigError

Entry = str | URL | Mapping[str, Any]
Databases = Mapping[str, Entry] | Callable[[str], Entry | None]

TIMEOUTS = ("connect_timeout_s", "read_timeout_s", "write_timeout_s")
WATCH = ("leak_after_s", "idle_in_transaction_s")
KEYS = (
    *("url", "options", "session", "busy_timeout_s", "readonly", *TIMEOUTS, "reset", "kill_abandoned", "ping_idle_s"),
    *(*WATCH, "guard"),
)
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

    The rest is for MySQL and MariaDB through PyMySQL:

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

    @cached_property  # asked at the end of each transaction
    def isolation_level(self) -> str | None:
        """Of its engine; None: the server's."""
        return "AUTOCOMMIT" if self.readonly else self.options.get("isolation_level")

    @property
    def backend(self) -> str:
        """`mysql`, `mariadb`, `sqlite`, `postgresql` ..."""
        return self.url.get_backend_name()


def parse(name: object, entry: object) -> DatabaseConfig:
    """The configuration that `entry` describes.

    Args:
        name: the database's name, a non-empty string.
        entry: a URL string, a `sqlalchemy.URL`, or a mapping whose keys are among KEYS.

    Raises:
        ConfigError: [DBS-CONFIG] naming the database, the key and the fix.
    """
    if not isinstance(name, str) or not name:
        raise ConfigError(f"A database's name must be a non-empty string, not {name!r}.")
    if "://" in name:
        raise ConfigError("A database's name looks like a URL: give a mapping of names to URLs, and not the reverse.")
    if isinstance(entry, (str, URL)):
        entry = {"url": entry}
    if not isinstance(entry, Mapping):
        raise ConfigError(
            f"Database {name!r} is configured with a {type(entry).__name__}: give a URL string, a sqlalchemy.URL or a "
            f"mapping with the keys {_listed(KEYS)}."
        )
    for key in entry:
        if key not in KEYS:
            raise ConfigError(
                f"Database {name!r} has the unknown key {shown(key)}: the keys are {_listed(KEYS)}. Arguments of "
                "create_engine belong into `options`, those of sessionmaker into `session`."
            )
    if "url" not in entry:
        raise ConfigError(f"Database {name!r} has no `url`: add one, such as 'mysql+pymysql://user@host/database'.")
    options = _arguments(name, "options", entry, "create_engine")
    session = _arguments(name, "session", entry, "sessionmaker")
    for key in ("bind", "binds"):
        if key in session:
            raise ConfigError(
                f"Database {name!r}: `session` has the key {key!r}, but its sessions are bound to the engine of that "
                "name. Remove the key, or configure a second database under another name."
            )
    url = _url(name, entry["url"])
    rest: dict[str, Any] = {}
    for key in ("busy_timeout_s", "ping_idle_s", *WATCH):
        if key in entry:
            rest[key] = seconds(name, key, entry[key])
    for key in TIMEOUTS:
        if key in entry:
            rest[key] = _timeout(name, key, entry[key], url, options)
    if "reset" in entry:
        if entry["reset"] not in RESETS:
            raise ConfigError(f"Database {name!r}: `reset` is {shown(entry['reset'])}: give one of {RESETS}.")
        rest["reset"] = entry["reset"]
    for key in ("kill_abandoned", "readonly"):
        if key in entry:
            if not isinstance(entry[key], bool):
                raise ConfigError(f"Database {name!r}: `{key}` must be True or False.")
            rest[key] = entry[key]
    rest["guard"] = entry.get("guard", os.environ.get("DBSESSION_GUARD") or "off")
    if rest["guard"] not in GUARDS:
        whose = "`guard`" if "guard" in entry else "DBSESSION_GUARD"
        raise ConfigError(f"Database {name!r}: {whose} is {shown(rest['guard'])}: give one of {GUARDS}.")
    if rest.get("readonly"):
        _check_readonly(name, url, options)
    return DatabaseConfig(name, url, options, session, **rest)


def refused_option(name: str, error: Exception, by: str, hint: str) -> ConfigError:
    """The error when `by`, create_engine or its like, raises `error` for an argument in `options`."""
    # The names of refused arguments; their values are not shown, they may be secrets.
    refused = re.findall(r"'(\w+)'", str(error).split(" sent to ")[0]) if "Invalid argument" in str(error) else []
    what = ", ".join(f"`{key}`" for key in refused) or "one of its values"
    return ConfigError(
        f"Database {name!r}: {by} refuses {what} in `options` ({type(error).__name__}). Remove or correct it; {hint}."
    )


def shown(word: object) -> str:
    """`word` for an error's text, unless it may be a URL that stands in the wrong place, with a password in it."""
    return repr(word) if not isinstance(word, str) or re.fullmatch(r"[\w.+ -]*", word) else "(not shown: no plain word)"


def seconds(name: str, key: str, value: object) -> float:
    """`value` as a number of seconds, at most a year and not negative, or ConfigError."""
    if not _is_finite(value) or value < 0:
        raise ConfigError(f"Database {name!r}: `{key}` is {shown(value)}: give a number of seconds, from 0 to a year.")
    return float(value)


def positive_seconds(value: object, what: str) -> float:
    """`value` as a number of seconds, above 0 and at most a year, or ConfigError, where `what` says whose it is."""
    if not _is_finite(value) or value <= 0:
        raise ConfigError(f"{what} is {shown(value)}: give a number of seconds above 0, at most a year.")
    return float(value)


def _is_finite(value: object) -> TypeGuard[float]:
    # Not math.isfinite(), which fails on a whole number too large for a float.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST_S


def _check_readonly(name: str, url: URL, options: Mapping[str, Any]) -> None:
    if url.get_backend_name() not in ("mysql", "mariadb", "sqlite"):
        raise ConfigError(
            f"Database {name!r}: `readonly` is for MySQL, MariaDB and SQLite; give {url.get_backend_name()!r} a user "
            "that may only read."
        )
    if "isolation_level" in options:
        raise ConfigError(
            f"Database {name!r}: `readonly` sets the isolation level AUTOCOMMIT: remove the one in `options`."
        )


def _timeout(name: str, key: str, value: object, url: URL, options: Mapping[str, Any]) -> float:
    argument = key.removesuffix("_s")
    connect_args = options.get("connect_args")
    if argument in url.query or (isinstance(connect_args, Mapping) and argument in connect_args):
        raise ConfigError(f"Database {name!r}: `{key}` and the driver's `{argument}` are both given: remove one.")
    return positive_seconds(value, f"Database {name!r}: `{key}`")


def _url(name: str, value: object) -> URL:
    if isinstance(value, URL):
        return value
    if not isinstance(value, str):
        raise ConfigError(f"Database {name!r}: `url` is a {type(value).__name__}: give a string or a sqlalchemy.URL.")
    try:
        return make_url(value)
    except (ArgumentError, ValueError):
        pass  # neither the text nor the cause is shown: they may hold a piece of the password
    raise ConfigError(
        f"Database {name!r}: `url` cannot be read as a URL: write 'dialect+driver://user:password@host:port/database' "
        "with special characters of the password percent-encoded, or build it with sqlalchemy.URL.create()."
    )


def _arguments(name: str, key: str, entry: Mapping[Any, Any], target: str) -> dict[str, Any]:
    value = entry.get(key, {})
    if not isinstance(value, Mapping) or not all(isinstance(argument, str) for argument in value):
        raise ConfigError(f"Database {name!r}: `{key}` must be a mapping of keyword arguments for {target}.")
    return dict(value)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
