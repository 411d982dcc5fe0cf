"""What a user gives for a database, parsed and checked: entries, and their keys."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from dbsession.core.backends import KINDS, kind_of
from dbsession.core.config import GUARDS, RESETS, TIMEOUTS, DatabaseConfig, positive_seconds, seconds, shown
from dbsession.core.keys import COMMON_KEYS, KEYS, hint
from dbsession.errors import ConfigError, is_url


def parse(name: object, entry: object) -> DatabaseConfig:
    """Parse the entry of a database.

    Args:
        name: the database's name, a non-empty string.
        entry: a URL string, a `sqlalchemy.URL`, or a mapping whose keys are among KEYS. Whether one of them
            would do nothing is seen when the engine is built, which knows the driver.

    Raises:
        ConfigError: [DBS-CONFIG] naming the database, the key and the fix.
    """
    if not isinstance(name, str) or not name:
        raise ConfigError(f"A database's name must be a non-empty string, not {shown(name)}.")
    if is_url(name):
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
            raise ConfigError(f"Database {name!r} has the unknown key {shown(key)}.{hint(key, 'entry') or _ALL_KEYS}")
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
    for key in ("busy_timeout_s", "ping_idle_s", "leak_after_s", "idle_in_transaction_s"):
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
    if rest.get("readonly") and "isolation_level" in options:
        raise ConfigError(
            f"Database {name!r}: `readonly` sets the isolation level AUTOCOMMIT: remove the one in `options`."
        )
    return DatabaseConfig(name, url, options, session, given=tuple(entry), **rest)


def refuse_useless_keys(config: DatabaseConfig, *drivers: str) -> None:
    """Raise ConfigError if a key that was given would do nothing by any of these drivers."""
    kind = kind_of(config.url)
    for key in sorted(set(config.given).difference(COMMON_KEYS, *map(kind.keys, drivers))):
        takers = []
        for other in dict.fromkeys(KINDS.values()):
            known = [driver for driver, keys in other.DRIVER_KEYS.items() if key in keys]
            if known or key in other.KEYS:
                takers.append(f"{other.TITLE} by {' or '.join(known)}" if known else other.TITLE)
        instead = "; give it a user that may only read" if key == "readonly" else ""
        raise ConfigError(
            f"Database {config.name!r}: `{key}` does nothing on {config.backend}+{drivers[0]}, it is for "
            f"{', '.join(takers)}. Remove it{instead}."
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
        url = make_url(value)
        # With an '@' in the password, a part of it is read as the host or the database, which drivers' errors show.
        if url.host is None or ("@" not in f"{url.host}{url.database}" and not is_url(url.database)):
            return url
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


_ALL_KEYS = (
    f" The keys are {_listed(KEYS)}; arguments of create_engine belong into `options`, those of sessionmaker into "
    "`session`."
)
