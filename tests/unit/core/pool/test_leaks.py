"""The leak watch, in both halves: says once what is held too long, and when it came back; takes nothing away from
anybody and holds nobody up."""

from __future__ import annotations

import gc
import logging
import re

import pytest
from sqlalchemy import text

from dbsession.aio import holders as aio_holders
from dbsession.core.pool import leaks
from dbsession.green import holders as green_holders
from support.halves import HALVES, done, entered, on_both_halves, sync
from support.waiting import wait_until

DEADLINE_S = 30
WATCHES = {"gevent": green_holders.leak_watches, "aio": aio_holders.leak_watches}


@pytest.fixture(params=HALVES)
def half(request):
    return HALVES[request.param]


@pytest.fixture
def managed(half, tmp_path):
    """Makes managers of one SQLite database each; `managed(name, **entry)`."""
    managers = []

    def make(name="default", **entry):
        entry = {"url": f"sqlite:///{tmp_path}/{name}.db", **entry}
        managers.append(half.verbs.SessionManager({name: entry}))
        return managers[-1]

    async def dispose():
        for manager in managers:
            await done(manager.dispose())

    yield make
    half.run(dispose)


class Heard(logging.Handler):
    """What the leak watch said: `lines` has (level, text)."""

    def __init__(self, half):
        super().__init__()
        self.half, self.lines = half, []

    def emit(self, record):
        said = record.levelname, record.getMessage()
        # An earlier test's connection may come back just now, whose task or greenlet is gone.
        if said[0] != "INFO" or " that is gone " not in said[1]:
            self.lines.append(said)

    async def told(self, level, part):
        """The one such line, as soon as it is there."""

        def found():
            return [said for heard, said in list(self.lines) if heard == level and part in said]

        await self.half.until(found)
        (said,) = found()
        return said


@pytest.fixture
def heard(half, monkeypatch):
    monkeypatch.setattr(leaks, "_LONGEST_S", 0.05)  # so that the tests need not wait for the next look
    logger, handler = logging.getLogger("dbsession.leaks"), Heard(half)
    logger.addHandler(handler)
    logger.setLevel("INFO")
    yield handler
    logger.setLevel(logging.NOTSET)
    logger.removeHandler(handler)


def watch_of(database):
    return database.held.tell.__self__


def held_in(half, manager, label, end, *statements):
    """A job that holds a connection until `end`."""

    async def hold():
        async with entered(manager.scope(label)):
            for statement in statements or ("SELECT 'secret'",):
                await done(manager.get().execute(text(statement)))
            (ended := end.wait()) is True or await ended

    return half.spawn(hold)


@on_both_halves
async def test_leak_is_told_once_with_holder_and_stack_and_its_return(half, managed, heard):
    """Two connections: each is told of by itself; what comes back in time is not."""
    manager = managed(leak_after_s=0.5)
    end, other = half.event(), half.event()
    jobs = [held_in(half, manager, label, end) for label in ("the import", "the export")]
    said = await heard.told("WARNING", "the import")
    assert "Database 'default'" in said and "leak_after_s=0.5 s" in said
    assert "secret" not in said and "last statement: SELECT ?" in said
    said, _, stack = said.partition(" Its stack now, innermost first:\n")
    first = stack.splitlines()[0]
    assert first.startswith(f"    {__file__}:") and first.endswith(" in held_in.<locals>.hold")
    assert f", now at {first.strip()}" in said and "checked out" not in said + stack
    await heard.told("WARNING", "the export")
    for _ in range(20):  # in much less than leak_after_s each, however busy the machine is
        async with entered(manager.scope("short")):
            await done(manager.get().execute(text("SELECT 1")))
    third = held_in(half, manager, "the third", other)  # after the first leak: with its call site
    said = await heard.told("WARNING", "the third")
    now, _, taken = said.partition(" The stack of its checkout, innermost first:\n")
    for told in (now, taken):
        assert re.search(r"^    .* in held_in.<locals>.hold$", told, re.M), said
    assert ", checked out at " in now and len(heard.lines) == 3, heard.lines
    end.set()
    for job in jobs:
        await half.join(job)
    assert re.search(r"was returned after \d+\.\d s\.$", await heard.told("INFO", "the import"))
    await heard.told("INFO", "the export")
    other.set()
    await half.join(third)
    await heard.told("INFO", "the third")
    assert len(heard.lines) == 6, heard.lines


@on_both_halves
async def test_leak_of_a_holder_that_has_ended_says_so(half, managed, heard):
    manager = managed(leak_after_s=0.1)
    kept = []

    async def take():
        kept.append(await half.call(sync(manager.engine()).connect))

    await half.elsewhere(take)
    said = await heard.told("WARNING", "leak_after_s")
    kind = "greenlet" if half.name == "gevent" else "task"
    assert f", its {kind} has ended" in said and said.endswith(f"innermost first:\n    its {kind} has ended")
    await half.call(kept.pop().close)


@on_both_halves
async def test_idle_transaction_is_told_once_and_only_while_nothing_runs(half, managed, heard):
    manager = managed(leak_after_s=0, idle_in_transaction_s=0.3)
    async with entered(manager.scope("tables")):
        await done(manager.get().execute(text("CREATE TABLE t (n INTEGER)")))
        await done(manager.get().commit())
    end = half.event()
    rolled_back = await half.call(sync(manager.engine()).connect)
    await half.call(rolled_back.execute, text("SELECT 'rolled back'"))
    await half.call(rolled_back.rollback)
    writer = held_in(half, manager, "the import", end, "SELECT 1", "INSERT INTO t VALUES (4711)")
    reader = held_in(half, manager, "the reader", end)  # a SELECT that was read is one, too: for SQLAlchemy
    said = await heard.told("WARNING", "the import")
    assert "idle_in_transaction_s=0.3 s" in said and "4711" not in said and "INSERT INTO t VALUES (?)" in said
    await heard.told("WARNING", "the reader")
    end.set()
    for job in (writer, reader):
        await half.join(job)
    for label in ("the import", "the reader"):
        await heard.told("INFO", label)
    await half.call(rolled_back.close)
    assert len(heard.lines) == 4, heard.lines


@on_both_halves
async def test_each_database_has_its_own_limits_and_none_is_watched_when_both_are_0(half, managed, heard):
    unwatched, slow = managed(leak_after_s=0), managed("slow", leak_after_s=1000)
    watched, end = managed("watched", leak_after_s=0.1), half.event()
    first = held_in(half, unwatched, "not watched", end)
    async with entered(watched.scope("both")):
        await done(slow.get("slow").execute(text("SELECT 1")))
        await done(watched.get("watched").execute(text("SELECT 1")))
        await heard.told("WARNING", "'watched'")
    await done(slow.clear())
    await heard.told("INFO", "'watched'")
    own = watch_of(unwatched.database("default"))
    assert own not in [reference() for reference in list(WATCHES[half.name]._all)]
    end.set()
    await half.join(first)
    assert len(heard.lines) == 2, heard.lines


@on_both_halves
async def test_report_of_a_checkout_that_is_over_says_nothing_of_the_next_one(half, managed, heard):
    """The watcher's thread reads a note while others go on: what it says holds for the checkout that it saw."""
    manager = managed(leak_after_s=1000)
    connect = sync(manager.engine()).connect
    database = manager.database("default")
    watch = watch_of(database)
    connection = await half.call(connect)
    (note,) = database.held.notes()
    taken = note.since
    await half.call(connection.close)
    connection = await half.call(connect)
    watch._report("leak", note, taken, taken + 1001)
    assert not note.reported
    note.reported, note.reported_since = ("leak",), taken  # written a moment later still
    watch.look()
    await half.call(connection.close)
    connection = await half.call(connect)
    assert not note.reported and not heard.lines
    await half.call(connection.close)


def test_watches_end_with_their_engines(half, tmp_path, heard):
    async def used():
        manager = half.verbs.SessionManager({"default": f"sqlite:///{tmp_path}/a.db"})
        await half.call((await half.call(sync(manager.engine()).connect)).close)
        own = watch_of(manager.database("default"))
        (watch,) = [each for each in list(WATCHES[half.name]._all) if each() is own]
        await done(manager.dispose())
        return watch

    watch = half.run(used)
    wait_until(lambda: gc.collect() >= 0 and watch() is None, DEADLINE_S)
