"""Each peer's way to a session, in one form: what the micro and the memory benchmarks call.

A builder is given the URL of a database that is never connected to, and returns a Peer. It imports what it needs, so
that a process that measures memory has one peer in it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

Inside = Callable[[], None]


class Peer(NamedTuple):
    """`unit(inside)` is a unit of work: it asks for a session, calls `inside()`, and ends. The expression `how` is the
    session once more, where `get` is what an application has at hand; it may be evaluated inside a unit only."""

    unit: Callable[[Inside], None]
    get: Any
    how: str = "get()"


def nothing() -> None:
    pass


def no_session(url: str) -> Peer:
    return Peer(lambda inside: inside(), nothing)


def ours(url: str) -> Peer:
    from dbsession import clear_dbsession, configure, get_dbsession

    configure({"default": url})

    def unit(inside: Inside) -> None:
        get_dbsession("default")()
        inside()
        clear_dbsession()

    return Peer(unit, get_dbsession, "get('default')()")


def ours_in_a_scope(url: str) -> Peer:
    from dbsession import configure, get_dbsession, session_scope

    configure({"default": url})

    def unit(inside: Inside) -> None:
        with session_scope():
            get_dbsession("default")()
            inside()

    return Peer(unit, get_dbsession, "get('default')()")


def by_hand(url: str) -> Peer:
    from . import pattern

    pattern.urls["default"] = url

    def unit(inside: Inside) -> None:
        pattern.get_dbsession("default")()
        inside()
        pattern.clear_dbsession()

    return Peer(unit, pattern.get_dbsession, "get('default')()")


def _scoped(url: str, scopefunc: Callable[[], Any] | None) -> Peer:
    from sqlalchemy import create_engine
    from sqlalchemy.orm import scoped_session, sessionmaker

    session = scoped_session(sessionmaker(bind=create_engine(url), autoflush=False), scopefunc)

    def unit(inside: Inside) -> None:
        session()
        inside()
        session.remove()

    return Peer(unit, session)


def raw_scoped(url: str) -> Peer:
    return _scoped(url, None)


def raw_scoped_by_greenlet(url: str) -> Peer:
    from greenlet import getcurrent

    return _scoped(url, getcurrent)


def _flask_unit(app: Any, session: Callable[[], Any], get: Any = None, how: str = "get()") -> Peer:
    def unit(inside: Inside) -> None:
        with app.app_context():
            session()
            inside()

    return Peer(unit, get or session, how)


def flask_context(url: str) -> Peer:
    from flask import Flask

    return _flask_unit(Flask(__name__), nothing)


def flask_sqlalchemy(url: str) -> Peer:
    from flask import Flask
    from flask_sqlalchemy import SQLAlchemy

    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = url
    return _flask_unit(app, SQLAlchemy(app, session_options={"autoflush": False}).session)


def flask_sqlalchemy_lite(url: str) -> Peer:
    from flask import Flask
    from flask_sqlalchemy_lite import SQLAlchemy

    app = Flask(__name__)
    app.config["SQLALCHEMY_ENGINES"] = {"default": url}
    db = SQLAlchemy(app, session_options={"autoflush": False})
    return _flask_unit(app, lambda: db.session, db, "get.session")


def alchemical(url: str) -> Peer:
    from alchemical.flask import Alchemical
    from flask import Flask

    app = Flask(__name__)
    app.config["ALCHEMICAL_DATABASE_URL"] = url
    db = Alchemical(app)
    return _flask_unit(app, lambda: db.session, db, "get.session")


def svcs_container(url: str) -> Peer:
    import svcs
    from sqlalchemy import create_engine
    from sqlalchemy.orm import Session, sessionmaker

    registry = svcs.Registry()
    registry.register_factory(Session, sessionmaker(bind=create_engine(url), autoflush=False))
    in_hand: list[Any] = []

    def unit(inside: Inside) -> None:
        container = svcs.Container(registry)
        in_hand[:] = [container]
        container.get(Session)
        inside()
        container.close()

    return Peer(unit, lambda: in_hand[0].get(Session))


def oslo_db(url: str) -> Peer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from oslo_db.sqlalchemy import enginefacade

    class Context:
        session = None

    context_class = enginefacade.transaction_context_provider(Context)
    manager = enginefacade.transaction_context()
    manager.configure(connection=url)
    in_hand: list[Any] = []

    def unit(inside: Inside) -> None:
        context = context_class()
        in_hand[:] = [context]
        with manager.reader.using(context):
            inside()

    def get() -> Any:
        with manager.reader.using(in_hand[0]) as session:
            return session

    return Peer(unit, get)


PATTERN = "the pattern"
BUILDERS: dict[str, Callable[[str], Peer]] = {
    "nothing": no_session,
    "dbsession": ours,
    "dbsession, session_scope()": ours_in_a_scope,
    PATTERN: by_hand,
    "scoped_session (gevent.local)": raw_scoped,
    "scoped_session (getcurrent)": raw_scoped_by_greenlet,
    "bare Flask app context": flask_context,
    "Flask-SQLAlchemy": flask_sqlalchemy,
    "Flask-SQLAlchemy-Lite": flask_sqlalchemy_lite,
    "alchemical": alchemical,
    "svcs": svcs_container,
    "oslo.db": oslo_db,
}
