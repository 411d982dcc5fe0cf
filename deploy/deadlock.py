"""A deadlock, and its counterpart on SQLite, which `run_in_transaction` survives: for trouble.py, by its button."""

from __future__ import annotations

import time
from typing import Any

import gevent
from gevent.event import Event
from gevent.pool import Group
from sqlalchemy import Column, Integer, MetaData, Table, insert, select, text, update
from sqlalchemy.exc import DBAPIError

import dbsession
from dbsession.errors import describe

MEET_S = 1.5  # that both units of work hold what the other one wants
END_S = 40.0  # that they may take in all

orders = dbsession.get_dbsession("default")
accounts = Table(
    "trouble_accounts",
    MetaData(),
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("cents", Integer, nullable=False),
    mysql_engine="InnoDB",
    mariadb_engine="InnoDB",
)


def deadlock() -> str:
    """Two units of work that meet. Each takes what the other one wants next, so the database has to end one of them."""
    engine = dbsession.get_engine("default")
    accounts.metadata.create_all(engine)
    if orders.scalar(select(accounts.c.id).limit(1)) is None:
        orders.execute(insert(accounts), [{"id": 1, "cents": 500}, {"id": 2, "cents": 500}])
        orders.commit()
    dbsession.release_dbsession()
    before = retries()
    began = Event(), Event()
    both = Group()
    try:
        both.add(first := gevent.spawn(transfer, 1, 2, *began))
        both.add(second := gevent.spawn(transfer, 2, 1, *reversed(began)))
        gevent.joinall([first, second], timeout=END_S)
        ends = [first.get(block=False), second.get(block=False)]
    except gevent.Timeout:
        return f"The two units of work did not end within {END_S:.0f} s, and were killed."
    finally:
        both.kill()
    told = [
        f"Transfer {name}: " + ", ".join(f"attempt {number} {end}" for number, end in enumerate(attempts, 1))
        for name, attempts in zip(("1 to 2", "2 to 1"), ends, strict=True)
    ]
    counted = retries() - before
    return f"{'. '.join(told)}. dbsession counted {counted} {'retry' if counted == 1 else 'retries'}."


def transfer(source: int, target: int, mine: Event, other: Event) -> list[str]:
    """What became of each attempt to move a cent, or to give it back."""
    attempts: list[str] = []

    def work(session: Any) -> None:
        attempts.append("committed")
        move = update(accounts).where(accounts.c.id == source).values(cents=accounts.c.cents - 1)
        take = update(accounts).where(accounts.c.id == target).values(cents=accounts.c.cents + 1)
        try:
            if session.get_bind().dialect.name == "sqlite":  # it locks no rows, but what was read must still be true
                session.execute(text("BEGIN"))
                session.execute(select(accounts.c.cents)).all()
            else:
                session.execute(move)
            if not (mine.is_set() and other.is_set()):
                mine.set()
                other.wait(END_S)
                time.sleep(MEET_S)  # so that it can be looked at
            if session.get_bind().dialect.name == "sqlite":
                session.execute(move)
            session.execute(take)
        except DBAPIError as error:
            attempts[-1] = f"was ended with {getattr(error.orig, 'sqlite_errorname', describe(error))}"
            raise

    dbsession.run_in_transaction(work, label=f"transfer {source} to {target}")
    return attempts


def retries() -> int:
    return sum(database.retries for database in dbsession.snapshot().databases)


_CHANGED = "each has changed the row that the other wants"
_KINDS = {
    "sqlite": ("SQLite", "SQLITE_BUSY_SNAPSHOT, SQLite's counterpart of a deadlock: both read, then both write"),
    "mysql": ("MariaDB", f"a deadlock, error 1213: {_CHANGED}"),
    "mariadb": ("MariaDB", f"a deadlock, error 1213: {_CHANGED}"),
    "postgresql": ("PostgreSQL", f"a deadlock, error 40P01: {_CHANGED}"),
}


def kind_of(engine: Any) -> tuple[str, str]:
    """The database's name, and what two units of work that meet come to there."""
    name = engine.dialect.name
    return _KINDS.get(name, (name, f"a deadlock: {_CHANGED}"))
