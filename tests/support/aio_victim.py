"""One unit of work in asyncio, what may end it, and what its caller was told: for tests that cancel it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import text
from sqlalchemy.ext.asyncio import async_scoped_session, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from dbsession import aio
from dbsession.aio import scope as scopes
from dbsession.errors import MAYBE_COMMITTED


@dataclass(frozen=True)
class Variant:
    """What the victim does, and with which engine."""

    run: str = "in_block"  # a method of `Work`
    cold: bool = False  # the engine has not connected yet, nor asked the server what it can
    names: tuple[str, ...] = ("a",)
    payload: int = 0  # bytes inserted beside the token
    stream: bool = False  # reads a server-side cursor in part
    orm: bool = False  # inserts by a flush
    commit: bool = True  # else it leaves its writes to the teardown
    holders: int = 0  # others that hold a connection when it comes
    level: str = ""  # its isolation level, if it has one of its own
    between: str = ""  # a verb of the manager, called before the commit and after it
    options: dict[str, Any] = field(default_factory=dict)
    ping_idle_s: float = 60.0  # a connection used before is not pinged: nothing hides one that is out of step


VARIANTS = {
    "small": Variant(),
    "cold": Variant(cold=True),
    "large": Variant(payload=3_000_000),
    "stream": Variant(stream=True),
    "orm": Variant(orm=True),
    "pinged": Variant(ping_idle_s=0),
    "uncommitted": Variant(commit=False),
    "two": Variant(names=("a", "b")),
    "queued": Variant(holders=2),
    "implicit": Variant(run="in_its_task"),
    "transaction": Variant(run="in_transaction"),
    "middleware": Variant(run="in_request"),
    "cleared": Variant(between="clear"),
    "released": Variant(between="release"),
    "level": Variant(level="READ UNCOMMITTED"),  # which SQLite has, too
    "one_place": Variant(options={"pool_size": 1}),
}


class Base(DeclarativeBase):
    pass


class Row(Base):
    __tablename__ = "unit"
    id: Mapped[int] = mapped_column(primary_key=True)
    token: Mapped[str]
    payload: Mapped[str]


INSERT = text("INSERT INTO unit (token, payload) VALUES (:token, :payload)")
COUNT = text("SELECT COUNT(*) FROM unit WHERE token = :token")
MANY = text("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 20) SELECT :token FROM n")


class WrongRow(Exception):
    """A query was answered with what another one asked for."""


@dataclass
class Told:
    """What the caller of a unit of work was told."""

    error: BaseException | None = None
    committed: set[str] = field(default_factory=set)  # the names whose commit() returned
    scope: Any = None
    sessions: list[Any] = field(default_factory=list)

    @property
    def outcome(self) -> Any:
        return getattr(self.scope, "outcome", None)

    @property
    def noted(self) -> bool:
        """Whether the exception says that it may have been committed; when it was cancelled once more while the first
        cancellation was cleaned up after, that one says so."""
        error = self.error
        while error is not None and MAYBE_COMMITTED not in str(getattr(error, "__notes__", "")):
            error = error.__context__
        return error is not None

    def lie(self, name: str, stored: int) -> str:
        """What is wrong with it when the server has the row of database `name` `stored` times; "" if nothing."""
        if name in self.committed:
            return "" if stored == 1 else f"commit() returned, stored {stored} times"
        warned = self.noted or self.outcome in ("committed", "unknown")
        if stored > 1 or (stored and not warned):
            return f"stored {stored} times, and the caller believes that it was rolled back"
        return ""


class Managed:
    """dbsession.aio, by a manager of its own."""

    def __init__(self, url: str, variant: Variant) -> None:
        options = {"pool_size": 2, "pool_timeout": 10, **variant.options}
        entry = {"url": url, "options": options}
        if not url.startswith("sqlite"):
            entry["ping_idle_s"] = variant.ping_idle_s
        self._manager = manager = aio.SessionManager(dict.fromkeys(variant.names, entry))
        self.get, self.scope, self.dispose = manager.get, manager.scope, manager.dispose
        self.run_in_transaction = manager.run_in_transaction
        self.engines = [manager.engine(name) for name in variant.names]

    async def between(self, verb: str) -> None:
        await getattr(self._manager, verb)()

    def note(self, told: Told, name: str) -> None:
        """Remember what the victim works with."""
        told.sessions.append(self.get(name)())
        told.scope = scopes.current()

    def in_use(self) -> int:
        return sum(engine.pool.checkedout() for engine in self.engines)


class Bare:
    """SQLAlchemy's async_scoped_session, removed where everybody removes it: where the work went well."""

    def __init__(self, url: str, variant: Variant) -> None:
        engine = create_async_engine(url, pool_size=2, max_overflow=0, pool_timeout=4, pool_pre_ping=True)
        self._session = async_scoped_session(async_sessionmaker(engine, autoflush=False), asyncio.current_task)
        self.engines, self.dispose = [engine], engine.dispose

    def get(self, _: str) -> Any:
        return self._session

    @asynccontextmanager
    async def scope(self) -> Any:
        yield
        await self._session.remove()

    def note(self, *_: object) -> None:
        pass

    def in_use(self) -> int:
        return sum(engine.pool.checkedout() for engine in self.engines)


class Work:
    """Units of work of one variant in one world."""

    def __init__(self, world: Any, variant: Variant) -> None:
        self.world, self.variant = world, variant

    def start(self, token: str, told: Told) -> Awaitable[None]:
        unit: Callable[[str, Told], Awaitable[None]] = getattr(self, self.variant.run)
        return unit(token, told)

    async def in_block(self, token: str, told: Told) -> None:
        async with self.world.scope():
            await self._all(token, told)

    async def in_its_task(self, token: str, told: Told) -> None:
        await self._all(token, told)

    async def in_request(self, token: str, told: Told) -> None:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            await receive()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await self._all(token, told)
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        async def receive() -> dict[str, Any]:
            await asyncio.sleep(0)
            return {"type": "http.request"}

        async def send(_: object) -> None:
            await asyncio.sleep(0)

        request = {"type": "http", "method": "GET", "path": "/", "headers": []}
        await aio.DBSessionMiddleware(app)(request, receive, send)

    async def in_transaction(self, token: str, told: Told) -> None:
        (name,) = self.variant.names

        async def unit(session: Any) -> None:
            self.world.note(told, name)
            await self._read_and_write(session, f"{token}-{name}")

        await self.world.run_in_transaction(unit, name=name)
        told.committed.add(name)

    async def _all(self, token: str, told: Told) -> None:
        for name in self.variant.names:
            self.world.note(told, name)
            session, mine = self.world.get(name), f"{token}-{name}"
            await self._read_and_write(session, mine)
            if self.variant.commit:
                await session.commit()
                told.committed.add(name)
                if self.variant.between:
                    await self.world.between(self.variant.between)
                    self.world.note(told, name)
            expect(await session.scalar(COUNT, {"token": mine}), 1)

    async def _read_and_write(self, session: Any, mine: str) -> None:
        if self.variant.between:
            expect(await session.scalar(text("SELECT :token"), {"token": mine}), mine)
            await self.world.between(self.variant.between)
        if self.variant.level:
            level = self.variant.level
            if session.get_bind().dialect.driver == "asyncpg":  # for which SQLAlchemy has not that one
                level = "REPEATABLE READ"
            await session.connection(execution_options={"isolation_level": level})
        expect(await session.scalar(text("SELECT :token"), {"token": mine}), mine)
        await asyncio.sleep(0)  # something else, while the transaction is open
        if self.variant.stream:
            result = await session.stream(MANY, {"token": mine})
            expect([row[0] for row in await result.fetchmany(3)], [mine] * 3)
            await result.close()
        if self.variant.orm:
            session.add(Row(token=mine, payload=""))
            await session.flush()
        else:
            await session.execute(INSERT, {"token": mine, "payload": "x" * self.variant.payload})


def expect(found: object, wanted: object) -> None:
    if found != wanted:
        raise WrongRow(f"{found!r} instead of {wanted!r}")
