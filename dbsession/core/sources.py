"""Where the configurations of databases come from: a mapping, a callable or the environment."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from sqlalchemy.engine import URL

from dbsession.core.config import DatabaseConfig, shown
from dbsession.core.entries import parse
from dbsession.errors import ConfigError, UnknownDatabase, did_you_mean, is_url


class Source(Protocol):
    """Where configurations come from."""

    def lookup(self, name: str) -> DatabaseConfig:
        """The configuration of `name`. Raises UnknownDatabase, ConfigError; a user's callable may switch greenlets."""

    def known(self) -> Iterable[str]:
        """The names that are known to exist."""


class MappingSource:
    """A mapping given to `configure`, validated as a whole."""

    def __init__(self, databases: Mapping[Any, Any]) -> None:
        self.configs = {name: parse(name, entry) for name, entry in databases.items()}

    def lookup(self, name: str) -> DatabaseConfig:
        try:
            return self.configs[name]
        except (KeyError, TypeError):  # TypeError: an unhashable name
            pass
        raise UnknownDatabase.named(name, self.configs, "Configured are")

    def known(self) -> Iterable[str]:
        return self.configs


class CallableSource:
    """A callable `name -> entry` given to `configure`. None, `{}` or LookupError from it means: unknown."""

    def __init__(self, find: Callable[[str], Any]) -> None:
        self.find = find
        self._resolved: set[str] = set()  # only for the error's text; grows by one set operation

    def lookup(self, name: str) -> DatabaseConfig:
        try:
            entry = self.find(name)
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
        if not isinstance(name, str) or not name or is_url(name):  # not with its variable, which has it in capitals
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
            raise self._unset(name, "DBSESSION_URL" if name == "default" else variable)
        first = self._names.setdefault(variable, name)
        if first != name:
            raise ConfigError(
                f"Databases {first!r} and {name!r} are both configured by {variable}: rename one of them, or give "
                "configure() a mapping."
            )
        return parse(name, url)

    def _unset(self, name: str, wanted: str) -> UnknownDatabase:
        """Return the error for a name whose variable is not set."""
        what = f"Nothing was given to configure(), and {wanted} is not set: call configure() or set {wanted}.{unread()}"
        others = list(self.known())
        if others:
            return UnknownDatabase.named(name, others, f"{what} The environment has the URLs of")
        return UnknownDatabase(f"No database {name!r} is configured. {what}")

    def known(self) -> Iterable[str]:
        found = {"default"} if os.environ.get("DBSESSION_URL") else set()
        for variable, value in os.environ.items():
            match = re.fullmatch(r"DBSESSION_(.+)_URL", variable)
            if match and value:
                found.add(self._names.get(variable, match[1].lower()))
        return found


VARIABLES = ("DBSESSION_URL", "DBSESSION_GUARD", "DBSESSION_INSPECT", "DBSESSION_METRICS")
"""What is read of the environment, besides DBSESSION_<NAME>_URL."""


def misspelt_variables() -> list[tuple[str, str]]:
    """List the variables of the environment that nothing reads, each with the one that it may be a misspelling of."""
    found = []
    for variable in sorted(os.environ):
        if "DB" in variable.upper() and variable not in VARIABLES and not re.fullmatch(r"DBSESSION_.+_URL", variable):
            meant = did_you_mean(variable, VARIABLES, likeness=0.85)
            if meant and re.fullmatch(r"\w+", variable):
                found.append((variable, meant.split("'")[1]))
    return found


def unread() -> str:
    """Say, where nothing is configured, what the environment has that was meant for us perhaps; "" if it has nothing.
    Begins with a space; no variable's value is shown."""
    text = "".join(
        f" The environment has {variable}. Did you mean {meant}?" for variable, meant in misspelt_variables()
    )
    if os.environ.get("DATABASE_URL") and not EnvironmentSource().known():
        text += " The environment has DATABASE_URL, which dbsession does not read: set DBSESSION_URL to its value."
    return text


process_wide: Source = EnvironmentSource()
"""What `dbsession.configure` was given last: for `dbsession.aio`, which is configured by it unless it has its own."""

followers: list[Callable[[], None]] = []
"""Called after `process_wide` was replaced. Grows only, at import."""


def replace_process_wide(source: Source) -> None:
    """Put `source` in the place of `process_wide`."""
    global process_wide
    process_wide = source
    for follow in followers:
        follow()


def source_of(databases: object) -> Source:
    """The source that `databases` is: a mapping, a callable, or None for the environment. Raises ConfigError."""
    if databases is None:
        return EnvironmentSource()
    if isinstance(databases, Mapping):
        refuse_one_entry(databases)
        return MappingSource(databases)
    if callable(databases):
        return CallableSource(databases)
    raise ConfigError(
        f"configure() was given a {type(databases).__name__}: give a mapping of names to URLs, such as "
        "{'default': 'sqlite:///shop.db'}, a callable that returns the entry of a name, or nothing to read the "
        "environment."
    )


def refuse_one_entry(databases: Mapping[Any, Any]) -> None:
    """Raise ConfigError if it is the entry of one database, where a mapping of names to entries belongs."""
    if not isinstance(databases.get("url"), (str, URL)) or any(
        isinstance(entry, URL) or is_url(entry) or (isinstance(entry, Mapping) and "url" in entry)
        for name, entry in databases.items()
        if name != "url"
    ):
        return
    raise ConfigError(
        f"configure() was given the entry of one database, with {', '.join(map(shown, databases))}, in place of a "
        "mapping of names to entries: write {'default': {'url': ...}}, with its name before it."
    )


def differing(old: Source, new: Source, what: Callable[[DatabaseConfig], object] = lambda config: config) -> list[str]:
    """List, as words for a text, the databases of `old` that `new` does not have, or has otherwise.

    Nobody is asked: two callables are alike if they are one, and what the environment says is left out.

    Args:
        what: what counts of a configuration; by default all of it.
    """
    if isinstance(old, MappingSource):
        others = new.configs if isinstance(new, MappingSource) else {}
        return sorted(
            repr(name)
            for name, config in old.configs.items()
            if name not in others or what(others[name]) != what(config)
        )
    if isinstance(old, CallableSource) and not (isinstance(new, CallableSource) and new.find == old.find):
        return sorted(map(repr, old.known())) or ["those that a callable finds"]
    return []
