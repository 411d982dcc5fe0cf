"""One unit of work, what may end it, and what its caller was told: for tests that kill it.

`Managed` and `Bare` are the two worlds it may live in: dbsession, and SQLAlchemy alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import gevent
import greenlet
from sqlalchemy import create_engine, text
from sqlalchemy.orm import scoped_session, sessionmaker

from dbsession import SessionManager
from support.dialects import dialect_of


class Boom(Exception):
    """What `gevent.Timeout(seconds, Boom)` raises: an exception like any other."""


KILLS: dict[str, Callable[[], BaseException]] = {
    "GreenletExit": gevent.GreenletExit,
    "Timeout": lambda: gevent.Timeout(1),  # never started
    "Boom": Boom,
    "TimeoutError": TimeoutError,
}


@dataclass(frozen=True)
class Variant:
    """What the victim does, and with which engine."""

    cold: bool = False  # the engine has not connected yet, nor asked the server what it can
    names: tuple[str, ...] = ("a",)
    payload: int = 0  # bytes inserted beside the token
    stream: bool = False  # reads a server-side cursor in part
    commit: bool = True  # else it leaves its writes to the teardown
    holders: int = 0  # others that hold a connection when it comes
    entry: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


VARIANTS = {
    "small": Variant(),
    "cold": Variant(cold=True),
    "large": Variant(payload=300_000),
    "stream": Variant(stream=True),
    "no_ping": Variant(options={"pool_pre_ping": False}),
    "reset": Variant(entry={"reset": "connection"}),
    "uncommitted": Variant(commit=False),
    "two": Variant(names=("a", "b")),
    "queued": Variant(holders=2),
}


# -- the worlds in which a victim lives --------------------------------------------------------------------


class Managed:
    """dbsession, by a manager of its own."""

    def __init__(self, url: str, variant: Variant) -> None:
        self.dialect = dialect_of(url)
        options = {"pool_size": 2, "pool_timeout": 10, **variant.options}
        entry = {"url": url, "options": options, **variant.entry}
        self._manager = SessionManager(dict.fromkeys(variant.names, entry))
        self.get, self.scope, self.dispose = self._manager.get, self._manager.scope, self._manager.dispose
        self.engines = [self._manager.engine(name) for name in variant.names]


class Bare:
    """SQLAlchemy's QueuePool and a scoped session, removed at the end of each unit of work."""

    def __init__(self, url: str, variant: Variant) -> None:
        self.dialect = dialect_of(url)
        engine = create_engine(url, pool_size=2, max_overflow=0, pool_timeout=4, pool_pre_ping=True)
        self._session = scoped_session(sessionmaker(engine, autoflush=False), scopefunc=greenlet.getcurrent)
        self.engines, self.dispose = [engine], engine.dispose

    def get(self, _: str) -> Any:
        return self._session

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        try:
            yield
        finally:
            self._session.remove()


# -- one unit of work --------------------------------------------------------------------------------------


@dataclass
class Told:
    """What the caller of a unit of work was told."""

    error: BaseException | None = None
    committed: set[str] = field(default_factory=set)  # the names whose commit() returned
    scope: Any = None
    body_ended: bool = False  # what came after it came from the teardown

    @property
    def outcome(self) -> Any:
        return getattr(self.scope, "outcome", None)

    def lie(self, name: str, stored: int) -> str:
        """What is wrong with it when the server has the row of database `name` `stored` times; "" if nothing."""
        if name in self.committed:
            return "" if stored == 1 else f"commit() returned, stored {stored} times"
        warned = self.outcome in ("committed", "unknown") or "committed" in str(getattr(self.error, "__notes__", ""))
        if stored > 1 or (stored and not warned):
            return f"stored {stored} times, and the caller believes that it was rolled back"
        return ""


class WrongRow(Exception):
    """A query was answered with what another one asked for."""


def expect(found: object, wanted: object) -> None:
    if found != wanted:
        raise WrongRow(f"{found!r} instead of {wanted!r}")


COUNT = text("SELECT COUNT(*) FROM unit WHERE token = :token")


def work(world: Any, variant: Variant, token: str, told: Told) -> None:
    with world.scope() as told.scope:
        for name in variant.names:
            session, mine = world.get(name), {"token": f"{token}-{name}"}
            expect(session.scalar(text("SELECT :token"), mine), mine["token"])
            if variant.stream:
                rows = text(f"SELECT :token FROM {world.dialect.numbers(20)}")
                part = session.execute(rows, mine, execution_options={"stream_results": True}).fetchmany(3)
                expect([row[0] for row in part], [mine["token"]] * 3)
            row = mine | {"payload": "x" * variant.payload}
            session.execute(text("INSERT INTO unit (token, payload) VALUES (:token, :payload)"), row)
            if variant.commit:
                session.commit()
                told.committed.add(name)
            expect(session.scalar(COUNT, mine), 1)
        told.body_ended = True
