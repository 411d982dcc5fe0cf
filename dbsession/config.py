"""What a database is configured as: validated once, frozen, from a mapping, a callable or the environment."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeGuard

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from dbsession.errors import ConfigError, UnknownDatabase

Entry = str | URL | Mapping[str, Any]
Databases = Mapping[str, Entry] | Callable[[str], Entry | None]

TIMEOUTS = ("connect_timeout_s", "read_timeout_s", "write_timeout_s")
KEYS = ("url", "options", "session", "busy_timeout_s", *TIMEOUTS, "reset", "kill_abandoned")
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

    The rest is for MySQL and MariaDB through PyMySQL:

        connect_timeout_s: seconds for connecting, the handshake included.
        read_timeout_s, write_timeout_s: seconds without a byte from or to the server. The default for reading is above
            innodb_lock_wait_timeout (50), so that a lock wait arrives as error 1205 and not as a lost connection.
        reset: what a returned connection gets: "rollback", or "connection", after which nothing of the session's
            state at the server is left.
        kill_abandoned: whether a statement that nobody waits for any more is killed at the server.
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
        return DatabaseConfig(name, _url(name, entry))
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
    if "busy_timeout_s" in entry:
        rest["busy_timeout_s"] = seconds(name, "busy_timeout_s", entry["busy_timeout_s"])
    for key in TIMEOUTS:
        if key in entry:
            rest[key] = _timeout(name, key, entry[key], url, options)
    if "reset" in entry:
        if entry["reset"] not in RESETS:
            raise ConfigError(f"Database {name!r}: `reset` is {shown(entry['reset'])}: give one of {RESETS}.")
        rest["reset"] = entry["reset"]
    if "kill_abandoned" in entry:
        if not isinstance(entry["kill_abandoned"], bool):
            raise ConfigError(f"Database {name!r}: `kill_abandoned` must be True or False.")
        rest["kill_abandoned"] = entry["kill_abandoned"]
    return DatabaseConfig(name, url, options, session, **rest)


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


class Source(Protocol):
    """Where configurations come from."""

    def lookup(self, name: str) -> DatabaseConfig:
        """The configuration of `name`. Raises UnknownDatabase, ConfigError; a user's callable may switch greenlets."""

    def known(self) -> Iterable[str]:
        """The names that are known to exist."""


class MappingSource:
    """A mapping given to `configure`, validated as a whole."""

    def __init__(self, databases: Mapping[Any, Any]) -> None:
        self._configs = {name: parse(name, entry) for name, entry in databases.items()}

    def lookup(self, name: str) -> DatabaseConfig:
        try:
            return self._configs[name]
        except (KeyError, TypeError):  # TypeError: an unhashable name
            raise UnknownDatabase.named(name, self._configs, "Configured are") from None

    def known(self) -> Iterable[str]:
        return self._configs


class CallableSource:
    """A callable `name -> entry` given to `configure`. None, `{}` or LookupError from it means: unknown."""

    def __init__(self, find: Callable[[str], Any]) -> None:
        self._find = find
        self._resolved: set[str] = set()  # only for the error's text; grows by one set operation

    def lookup(self, name: str) -> DatabaseConfig:
        try:
            entry = self._find(name)
        except LookupError:
            entry = None
        if entry is None or entry == {}:
            raise UnknownDatabase.named(name, self._resolved, "The callable given to configure() resolved so far")
        config = parse(name, entry)
        self._resolved.add(name)
        return config

    def known(self) -> Iterable[str]:
        return tuple(self._resolved)


class EnvironmentSource:
    """`DBSESSION_URL` (the database `default`) and `DBSESSION_<NAME>_URL`, read when a name is first used."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}  # variable -> the name that first used it

    def lookup(self, name: str) -> DatabaseConfig:
        if not isinstance(name, str) or not name:
            raise UnknownDatabase.named(name, self.known(), "The environment has")
        variable = f"DBSESSION_{re.sub(r'[^A-Z0-9]', '_', name.upper())}_URL"
        url = os.environ.get(variable)
        if name == "default":
            short = os.environ.get("DBSESSION_URL")
            if short and url and short != url:
                raise ConfigError(
                    "Database 'default': DBSESSION_URL and DBSESSION_DEFAULT_URL are both set and differ: unset one."
                )
            url = short or url
        if not url:
            wanted = "DBSESSION_URL" if name == "default" else variable
            raise UnknownDatabase.named(
                name, self.known(), f"Nothing was given to configure(), and {wanted} is not set; the environment has"
            )
        first = self._names.setdefault(variable, name)
        if first != name:
            raise ConfigError(
                f"Databases {first!r} and {name!r} are both configured by {variable}: rename one of them, or give "
                "configure() a mapping."
            )
        return parse(name, url)

    def known(self) -> Iterable[str]:
        found = {"default"} if os.environ.get("DBSESSION_URL") else set()
        for variable, value in os.environ.items():
            match = re.fullmatch(r"DBSESSION_(.+)_URL", variable)
            if match and value:
                found.add(self._names.get(variable, match[1].lower()))
        return found


def source(databases: object) -> Source:
    """The source that `databases` is: a mapping, a callable, or None for the environment. Raises ConfigError."""
    if databases is None:
        return EnvironmentSource()
    if isinstance(databases, Mapping):
        return MappingSource(databases)
    if callable(databases):
        return CallableSource(databases)
    raise ConfigError(
        f"configure() was given a {type(databases).__name__}: give a mapping of names to URLs, a callable that returns "
        "the entry of a name, or nothing to read the environment."
    )
