"""The sessionmaker of a database."""

from __future__ import annotations

from typing import Any

from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session, sessionmaker

from dbsession.core.config import DatabaseConfig
from dbsession.core.session import managed_class, refused, watch
from dbsession.green.guard import guarded


class SessionFactory(sessionmaker[Any]):
    """A sessionmaker whose call without arguments, which every first use in a scope makes, copies none."""

    def __call__(self, **arguments: Any) -> Any:
        return super().__call__(**arguments) if arguments else self.class_(**self.kw)


def make_factory(config: DatabaseConfig, engine: Engine) -> sessionmaker[Any]:
    """The sessionmaker of one database, bound to its engine.

    Raises:
        ConfigError: [DBS-CONFIG] an argument in `session` that the session class refuses.
    """
    arguments = {"autoflush": False, "close_resets_only": False, **config.session}
    managed: type[Any] = managed_class(config.name, arguments.pop("class_", Session))
    if config.guard != "off":
        managed = guarded(managed, config.name, config.guard)
    factory = SessionFactory(bind=engine, class_=managed, **arguments)
    if config.session:
        try:
            factory().close()
        except (TypeError, ValueError, LookupError) as error:
            raise refused(config.name, error) from error
    watch(factory)
    return factory
