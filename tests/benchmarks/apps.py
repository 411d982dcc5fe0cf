"""The WSGI applications of the benchmarks that serve requests: each peer serves the same ones, of `work`.

    /select    one row by its primary key
    /insert    one row, committed
    /nothing   a session is asked for (where the peer has such a thing), and no query sent

Those that have no session but a cursor, or a block of their own, serve a part of them. For gunicorn this module's `app`
is the one named by BENCH_APP, on the database BENCH_URL (see work.SCHEMA).
"""

from __future__ import annotations

import contextlib
import os
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from sqlalchemy import create_engine
from sqlalchemy.engine import make_url
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from .work import RAW, ROWS, WORK, WRITES, Entry, Item

POOL = {"pool_size": 20, "max_overflow": 0, "pool_recycle": 3600}
"""What the pattern gives its engines, and dbsession by default; the peers get the same."""

WSGI = Callable[[dict[str, Any], Any], list[bytes]]
Answer = Callable[[str], str]


def by_orm(session: Callable[[], Any]) -> Answer:
    """The application's own code, the same for every peer; `session` is how it gets one."""

    def answer(path: str) -> str:
        return str(WORK[path](session()))

    return answer


def plain(answer: Answer, clear: Callable[[], None] | None = None) -> WSGI:
    """A bare WSGI application; `clear` in a `finally`, where the peer needs one."""

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        body = answer(environ["PATH_INFO"]).encode()
        start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
        return [body]

    def clearing(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        try:
            return app(environ, start_response)
        finally:
            clear()

    return clearing if clear else app


def flask(answer: Answer, **config: Any) -> Any:
    from flask import Flask

    app = Flask(__name__)
    app.config.update(config)
    for path in WORK:
        app.add_url_rule(path, path, lambda path=path: answer(path))
    return app


def hello(url: str) -> WSGI:
    return plain(lambda path: "done")


def ours(url: str, readonly: bool = False) -> WSGI:
    import dbsession

    manager = dbsession.SessionManager({"default": {"url": url, "readonly": True} if readonly else url})
    return dbsession.DBSessionMiddleware(plain(by_orm(lambda: manager.get("default"))))


def ours_readonly(url: str) -> WSGI:
    return ours(url, readonly=True)


def ours_in_flask(url: str) -> WSGI:
    import dbsession
    import dbsession.flask

    app = flask(by_orm(lambda: dbsession.get_dbsession("default")), DBSESSION_DATABASES={"default": url})
    dbsession.flask.init_app(app)
    return app


def by_hand(url: str) -> WSGI:
    from . import pattern

    pattern.urls["default"] = url
    return plain(by_orm(lambda: pattern.get_dbsession("default")), pattern.clear_dbsession)


def by_hand_with_psycogreen(url: str) -> WSGI:
    """By psycopg2, as its users have it under gevent."""
    import psycogreen.gevent

    psycogreen.gevent.patch_psycopg()
    return by_hand(url)


def by_hand_in_flask(url: str) -> WSGI:
    from . import pattern

    pattern.urls["default"] = url
    app = flask(by_orm(lambda: pattern.get_dbsession("default")))
    app.teardown_request(lambda _: pattern.clear_dbsession())
    return app


def raw_scoped(url: str) -> WSGI:
    session = scoped_session(sessionmaker(bind=create_engine(url, **POOL), autoflush=False))
    return plain(by_orm(session), session.remove)


def flask_sqlalchemy(url: str) -> WSGI:
    from flask_sqlalchemy import SQLAlchemy

    db = SQLAlchemy(session_options={"autoflush": False}, engine_options=POOL)
    app = flask(by_orm(lambda: db.session), SQLALCHEMY_DATABASE_URI=url)
    db.init_app(app)
    return app


def flask_sqlalchemy_lite(url: str) -> WSGI:
    from flask_sqlalchemy_lite import SQLAlchemy

    db = SQLAlchemy(session_options={"autoflush": False}, engine_options=POOL)
    app = flask(by_orm(lambda: db.session), SQLALCHEMY_ENGINES={"default": url})
    db.init_app(app)
    return app


def alchemical(url: str) -> WSGI:
    from alchemical.flask import Alchemical

    db = Alchemical(session_options={"autoflush": False}, engine_options=POOL)
    app = flask(by_orm(lambda: db.session), ALCHEMICAL_DATABASE_URL=url, ALCHEMICAL_ENGINE_OPTIONS=POOL)
    db.init_app(app)
    return app


def svcs_flask(url: str) -> WSGI:
    import svcs

    app = svcs.flask.init_app(flask(by_orm(lambda: svcs.flask.get(Session))))
    svcs.flask.register_factory(app, Session, sessionmaker(bind=create_engine(url, **POOL), autoflush=False))
    return app


def oslo_db(url: str) -> WSGI:
    """Its own way of work: a reader's or a writer's block, which commits."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from oslo_db.sqlalchemy import enginefacade

    class Context:
        session = None

    context = enginefacade.transaction_context_provider(Context)
    manager = enginefacade.transaction_context()
    manager.configure(connection=url, max_pool_size=20, max_overflow=0)

    def answer(path: str) -> str:
        if path == "/select":
            with manager.reader.using(context()) as session:
                return session.get(Item, random.randint(1, ROWS)).name
        if path == "/insert":
            with manager.writer.using(context()) as session:
                session.add(Entry(text="entry"))
        return "done"

    return plain(answer)


def by_cursor(connection: Callable[[], contextlib.AbstractContextManager[Any]], commit: bool) -> Answer:
    def answer(path: str) -> str:
        if path == "/nothing":
            return "done"
        with connection() as held:
            found = RAW[path](held)
            if commit and path in WRITES:
                held.commit()
        return str(found)

    return answer


def login(url: str) -> dict[str, Any]:
    parts = make_url(url)
    return {
        "host": parts.host,
        "port": parts.port,
        "user": parts.username,
        "password": parts.password,
        "database": parts.database,
    }


def raw_pymysql(url: str) -> WSGI:
    """Twenty connections in a gevent.queue, in autocommit mode, and no cleaning at all."""
    import gevent.queue
    import pymysql

    idle: Any = gevent.queue.LifoQueue()
    for _ in range(20):
        idle.put(None)

    @contextlib.contextmanager
    def connection() -> Iterator[Any]:
        held = idle.get()
        try:
            held = held or pymysql.connect(autocommit=True, **login(url))
            yield held
        finally:
            idle.put(held)

    return plain(by_cursor(connection, commit=False))


def dbutils(url: str) -> WSGI:
    import pymysql
    from dbutils.pooled_db import PooledDB

    pool = PooledDB(pymysql, maxcached=20, maxconnections=20, blocking=True, **login(url))
    return plain(by_cursor(lambda: contextlib.closing(pool.dedicated_connection()), commit=True))


def peewee(url: str) -> WSGI:
    import peewee
    from playhouse.pool import PooledMySQLDatabase

    arguments = login(url)
    database = PooledMySQLDatabase(arguments.pop("database"), max_connections=20, timeout=0, **arguments)

    class PItem(peewee.Model):
        id = peewee.IntegerField(primary_key=True)
        name = peewee.CharField()

        class Meta:
            table_name = "item"

    class PEntry(peewee.Model):
        text = peewee.CharField()

        class Meta:
            table_name = "entry"

    database.bind([PItem, PEntry])

    def answer(path: str) -> str:
        if path == "/nothing":
            return "done"
        with database.connection_context():
            if path == "/select":
                return PItem.get_by_id(random.randint(1, ROWS)).name
            with database.atomic():
                PEntry.create(text="entry")
        return "done"

    return plain(answer)


APPS: dict[str, Callable[[str], Any]] = {
    "hello": hello,
    "dbsession": ours,
    "dbsession read-only": ours_readonly,
    "the pattern": by_hand,
    "Flask: dbsession": ours_in_flask,
    "Flask: the pattern": by_hand_in_flask,
    "Flask: Flask-SQLAlchemy": flask_sqlalchemy,
    "Flask: Flask-SQLAlchemy-Lite": flask_sqlalchemy_lite,
    "Flask: alchemical": alchemical,
    "Flask: svcs": svcs_flask,
    "scoped_session": raw_scoped,
    "oslo.db": oslo_db,
    "peewee": peewee,
    "DBUtils": dbutils,
    "raw PyMySQL": raw_pymysql,
}

BY_PSYCOGREEN = "the pattern, psycogreen"
ALL = APPS | {BY_PSYCOGREEN: by_hand_with_psycogreen}
"""And those that are only measured against PostgreSQL."""


def request(app: Any, path: str) -> None:
    """One request of `app`, as a server makes it."""
    environ = {
        "REQUEST_METHOD": "GET",
        "PATH_INFO": path,
        "SCRIPT_NAME": "",
        "QUERY_STRING": "",
        "SERVER_NAME": "localhost",
        "SERVER_PORT": "80",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "wsgi.url_scheme": "http",
    }
    status: list[str] = []
    body = app(environ, lambda line, headers, exc_info=None: status.append(line))
    for _ in body:
        pass
    if hasattr(body, "close"):
        body.close()
    assert status == ["200 OK"], status


if "BENCH_APP" in os.environ:
    app = ALL[os.environ["BENCH_APP"]](os.environ["BENCH_URL"])
