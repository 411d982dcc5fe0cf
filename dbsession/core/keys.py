"""The keys of an entry, and what is said of one that is unknown where it stands: what was meant, where it belongs."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Iterable, Mapping
from functools import cache
from typing import Any

from sqlalchemy.engine import URL, Dialect
from sqlalchemy.orm import Session, sessionmaker

from dbsession.core.config import TIMEOUTS, DatabaseConfig, shown
from dbsession.errors import ConfigError, did_you_mean

COMMON_KEYS = ("url", "options", "session", "leak_after_s", "idle_in_transaction_s", "guard")
"""What an entry of any database may have; its backend takes others."""

KEYS = (
    *COMMON_KEYS,
    *("readonly", "busy_timeout_s", *TIMEOUTS, "reset", "kill_abandoned", "ping_idle_s"),
)
"""The keys of an entry that at least one kind of database takes."""

OPTIONS = (
    *("async_creator", "connect_args", "creator", "echo", "echo_pool", "enable_from_linting", "execution_options"),
    *("hide_parameters", "insertmanyvalues_page_size", "isolation_level", "json_deserializer", "json_serializer"),
    *("label_length", "logging_name", "max_identifier_length", "max_overflow", "module", "paramstyle", "plugins"),
    *("pool", "pool_logging_name", "pool_pre_ping", "pool_recycle", "pool_reset_on_return", "pool_size"),
    *("pool_timeout", "pool_use_lifo", "poolclass", "query_cache_size", "skip_autocommit_rollback"),
    "use_insertmanyvalues",
)
"""Arguments of create_engine."""

_IN_THE_URL = ("user", "username", "passwd", "password", "host", "port", "db", "database", "drivername")

CONNECT_ARGS = (
    *("autocommit", "bind_address", "charset", "client_flag", "collation", "connect_timeout", "conv", "cursorclass"),
    *("init_command", "local_infile", "max_allowed_packet", "program_name", "read_default_file", "read_default_group"),
    *("read_timeout", "sql_mode", "ssl", "ssl_ca", "ssl_cert", "ssl_key", "unix_socket", "write_timeout"),  # PyMySQL
    *("cached_statements", "check_same_thread", "detect_types"),  # sqlite3
    *("application_name", "server_settings", "sslmode"),  # PostgreSQL's drivers
)
"""Arguments of drivers' connect() that are looked for elsewhere."""


@cache
def session_arguments() -> tuple[str, ...]:
    """Return the arguments that `session` may have, by SQLAlchemy's signatures."""
    found = [*inspect.signature(sessionmaker.__init__).parameters, *inspect.signature(Session.__init__).parameters]
    return tuple(dict.fromkeys(each for each in found if each not in ("self", "kw", "bind", "binds")))


def hint(key: object, here: str, known: Iterable[str] = ()) -> str:
    """Return a sentence, with a space before it, on a `key` that is unknown where it stands; "" if none is known.

    Args:
        key: the key; no value of it is needed, nor shown.
        here: where it stands: "entry", "options", "session" or "connect_args".
        known: the keys that may stand there, where they are not those that this module lists: then only what is very
            like one of them is a misspelling.
    """
    places = {"entry": KEYS, "options": OPTIONS, "session": session_arguments(), "connect_args": CONNECT_ARGS}
    places[here] = tuple(known) or places[here]
    if not isinstance(key, str):
        return ""
    found = _where(key, here, places) or did_you_mean(key, places[here], "`", 0.85 if known else 0.6)
    return found or ("" if known else _elsewhere(key, here, places))


def _where(key: str, here: str, places: Mapping[str, Collection[str]]) -> str:
    """Say where a key belongs that is right in another place."""
    if f"{key}_s" in TIMEOUTS:
        other = "" if here == "connect_args" else "; elsewhere it belongs into `connect_args` in `options`"
        return f" On MySQL, MariaDB and PostgreSQL its key is `{key}_s`, beside `url`{other}."
    if key in ("bind", "binds"):
        return ""
    if key in _IN_THE_URL and here != "connect_args":
        return " It is a part of the `url`."
    for place, belongs in (
        ("entry", "It belongs beside `url`, into the entry itself."),
        ("options", "It is an argument of create_engine and belongs into `options`."),
        ("session", "It is an argument of sessionmaker and belongs into `session`."),
        ("connect_args", "It is an argument of the driver and belongs into `connect_args` in `options`."),
    ):
        if place != here and key in places[place]:
            return f" {belongs}"
    return ""


def _elsewhere(key: str, here: str, places: Mapping[str, Collection[str]]) -> str:
    """Say what a key may be a misspelling of that belongs to another place."""
    for place, names in places.items():
        meant = did_you_mean(key, names, "`") if place != here else ""
        if meant:
            return f"{meant}{_where(meant.split('`')[1], here, places)}"
    return ""


def refused_option(name: str, error: Exception, by: str, advice: str) -> ConfigError:
    """Return the error for when `by`, create_engine or its like, raises `error` for an argument in `options`."""
    # The names of refused arguments; their values are not shown, they may be secrets.
    refused = re.findall(r"'(\w+)'", str(error).split(" sent to ")[0]) if "Invalid argument" in str(error) else []
    what = ", ".join(f"`{key}`" for key in refused) or "one of its values"
    meant = "".join(hint(key, "options") for key in refused)
    return ConfigError(
        f"Database {name!r}: {by} refuses {what} in `options` ({type(error).__name__}).{meant} Remove or correct it; "
        f"{advice}."
    )


def refused_session(name: str, error: Exception) -> ConfigError:
    """Return the error for when a session class raises `error` for an argument in `session`."""
    refused = re.findall(r"unexpected keyword argument '(\w+)'", str(error))
    meant = "".join(hint(key, "session") for key in refused)
    return ConfigError(f"Database {name!r}: the session class refuses what `session` says: {error}.{meant}")


def refuse_misspelt(config: DatabaseConfig, dialect: Dialect, url: URL) -> None:
    """Raise ConfigError if an argument of the driver's connect(), in `connect_args` or in the URL, is misspelt.

    What is like none of those that the driver takes is left to the driver: a listener of `do_connect` may be for it.
    """
    if "creator" in config.options or "async_creator" in config.options:
        return
    known = _taken_by(dialect)
    if not known:
        return
    in_url = dialect.create_connect_args(url)[1]
    given: Any = config.options.get("connect_args", {})
    for where, keys in (("`connect_args` in `options`", given), ("the query of its URL", in_url)):
        for key in keys:
            meant = "" if key in known else hint(key, "connect_args", known)
            if meant:
                raise ConfigError(f"Database {config.name!r} has the unknown key {shown(key)} in {where}.{meant}")


def _taken_by(dialect: Dialect) -> frozenset[str]:
    """Return the arguments of the driver's connect(); none if its signature does not tell them."""
    module: Any = dialect.loaded_dbapi
    module = getattr(module, dialect.driver, module)  # behind SQLAlchemy's adapter of an asyncio driver
    try:
        found = inspect.signature(module.connect).parameters.values()
    except (AttributeError, TypeError, ValueError):
        return frozenset()
    if any(each.kind is each.VAR_KEYWORD for each in found):
        return frozenset()
    return frozenset(each.name for each in found)
