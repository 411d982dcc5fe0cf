"""The asyncio twin of a database's configuration: the same database, by a driver that does not stop the event loop."""

from __future__ import annotations

from _thread import get_ident
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from dbsession.core import backends
from dbsession.core.config import DatabaseConfig
from dbsession.core.engine import driver_of
from dbsession.core.entries import refuse_useless_keys
from dbsession.core.sources import Source
from dbsession.errors import ConfigError


def twin(config: DatabaseConfig) -> DatabaseConfig:
    """Return `config` with its driver replaced by the asyncio one; unchanged if it has one already.

    Raises:
        ConfigError: [DBS-CONFIG] there is none, or an option has no asyncio counterpart.
    """
    own = driver_of(config, "'mysql+asyncmy://', 'sqlite+aiosqlite:///', 'postgresql+asyncpg://'")
    kind = backends.kind_of(config.url)
    driver = kind.ASYNC_DRIVERS.get(own)
    refuse_useless_keys(config, own, driver or own)  # those of the other half's driver, too: an entry may serve both
    if config.reset != "rollback" and "reset" not in kind.keys(driver or own):
        raise ConfigError(
            f"Database {config.name!r}: `reset` is {config.reset!r}, which dbsession.aio does not have here. Give "
            "aio.configure() an entry without it."
        )
    if "creator" in config.options:
        raise ConfigError(
            f"Database {config.name!r}: a `creator` opens connections that stop the event loop. Give aio.configure() "
            "an entry without it, with an `async_creator` perhaps."
        )
    if driver is None:
        return config
    url = config.url.set(drivername=f"{config.url.get_backend_name()}+{driver}")
    if backends.driver_of(url) is None:  # a dialect like PostgreSQL's, which has none for asyncio
        return config
    return replace(config, url=url)


class TwinSource:
    """A source of configurations whose drivers are asyncio's. Lives as long as the configuration.

    Every loop asks, each in its own thread, so all is written in one step: `_found` grows by `setdefault`; to `_asking`
    each thread adds, and takes from it, a pair of its own.
    """

    def __init__(self, source: Source) -> None:
        self.of = source
        self._found: dict[str, DatabaseConfig] = {}
        self._asking: set[tuple[int, str]] = set()  # (thread, name)

    def lookup(self, name: str) -> DatabaseConfig:
        """The configuration of `name`: the same one for ever once there is one, so that a user's callable is asked
        once. Raises UnknownDatabase, ConfigError."""
        found = self._found.get(name)
        if found is not None:
            return found
        mine = (get_ident(), name)
        if mine in self._asking:
            raise ConfigError(f"Database {name!r}: the callable that is asked for its entry asks for its session.")
        self._asking.add(mine)
        try:
            return self._found.setdefault(name, twin(self.of.lookup(name)))
        finally:
            self._asking.discard(mine)

    def known(self) -> Iterable[Any]:
        return self.of.known()
