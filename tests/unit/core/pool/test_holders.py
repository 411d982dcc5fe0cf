"""Who holds a connection, in both halves: noted at its checkout, found out when somebody asks, forgotten at its
return."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
from sqlalchemy import event, exc, pool, text
from sqlalchemy.orm import Session

import dbsession
from dbsession import PoolTimeout
from dbsession.core.connection_info import CHECKOUT
from dbsession.core.pool import callsites, holders
from dbsession.core.pool.holders import HeldConnections, Holder
from dbsession.errors import SHOWN_HOLDERS
from support.halves import HALVES, done, entered, on_both_halves, sync
from support.models import Base, Order


@pytest.fixture(params=HALVES)
def half(request):
    return HALVES[request.param]


@pytest.fixture
def managed(half, tmp_path):
    """Makes managers of one SQLite database; `managed(**entry)`."""
    managers = []

    def make(**entry):
        options = {"pool_size": 2, "pool_timeout": 0.05, **entry.pop("options", {})}
        entry = {"url": f"sqlite:///{tmp_path}/a.db", "options": options, **entry}
        managers.append(half.verbs.SessionManager({"default": entry}))
        return managers[-1]

    async def dispose():
        for manager in managers:
            await done(manager.dispose())

    yield make
    half.run(dispose)


def held(manager):
    """Its Holders, whatever else this process has."""
    return manager.database("default").held.holders()


def line_of(part):
    """`file:line` of the only line of this file that ends with the comment `# part`."""
    lines = Path(__file__).read_text().splitlines()
    (number,) = [number for number, line in enumerate(lines, 1) if line.endswith(f"# {part}")]
    return f"{__file__}:{number} in "


def nothing_left(manager):
    database = manager.database("default")
    assert not database.held.notes() and sync(database.engine).pool.checkedout() == 0


# -- PoolTimeout -------------------------------------------------------------------------------------------------------


@on_both_halves
async def test_pool_timeout_says_who_holds_the_connections_and_where_each_is_now(half, managed):
    manager = managed()
    ready, end = half.event(), half.event()

    async def labelled():
        async with entered(manager.scope("import")):
            await done(manager.get().execute(text("SELECT :p, 'in the text'"), {"p": "a parameter"}))
            ready.set()
            (ended := end.wait()) is True or await ended  # waits

    first = half.spawn(labelled)
    (is_ready := ready.wait()) is True or await is_ready
    second = await half.call(sync(manager.engine()).connect)
    with pytest.raises(exc.TimeoutError) as caught:
        await half.call(sync(manager.engine()).connect)
    error = caught.value
    end.set()
    await half.join(first)
    await half.call(second.close)
    assert type(error) is PoolTimeout and isinstance(error, dbsession.DBSessionError)
    assert (error.database, error.size, error.in_use, error.waiting) == ("default", 2, 2, 0)
    assert 0.05 <= error.waited_s < 60
    assert [type(holder) for holder in error.holders] == [Holder] * 2
    assert error.holders[0].held_s >= error.holders[1].held_s
    assert error.holders[0].place.startswith(line_of("waits")) and error.holders[0].stack[0] == error.holders[0].place
    said = str(error).splitlines()
    assert said[0].startswith("Database 'default': QueuePool limit of size 2 overflow 0 reached, connection timed out")
    assert f"after {error.waited_s:.2f} s with 2 in use and 0 others waiting. Held, longest first:" in said[0]
    assert said[1].startswith("  import (") and f", now at {line_of('waits')}" in said[1]
    assert "checked out at" not in str(error) and "idle in transaction for " in said[1]
    assert said[1].endswith("last statement: SELECT ?, ?") and said[-1].endswith("[DBS-POOL-TIMEOUT]")
    assert "a parameter" not in repr(error) + str(error) and "in the text" not in repr(error.holders)
    nothing_left(manager)


def holder_of(scope, **more):
    values = {"greenlet": "Greenlet-1", "held_s": 2.0, "state": "idle", "state_s": 1.0, "place": "a.py:1 in f"}
    values |= {"stack": ("a.py:1 in f",), "statement": None, **more}
    return Holder(database="default", scope=scope, **values)


@pytest.mark.parametrize("again", [lambda error: pickle.loads(pickle.dumps(error)), copy.copy, copy.deepcopy])
def test_pool_timeout_is_the_same_when_pickled(again):
    error = PoolTimeout("default", 2, 0, 2, 1, 30.0, [holder_of("import", taken_at=("b.py:2 in g",))])
    same = again(error)
    assert type(same) is PoolTimeout and str(same) == str(error) and same.holders == error.holders
    assert (same.database, same.in_use, same.waited_s) == (error.database, error.in_use, error.waited_s)


def test_pool_timeout_shows_the_longest_ten_and_says_how_many_more():
    count = SHOWN_HOLDERS + 3
    error = PoolTimeout("default", count, 0, count, 0, 30.0, [holder_of(f"job {n:02}") for n in range(count)])
    lines = str(error).splitlines()
    assert [line.split()[1] for line in lines[1:-2]] == [f"{n:02}" for n in range(SHOWN_HOLDERS)]
    assert lines[-2] == "  and 3 more" and len(error.holders) == count


def test_crowd_that_waits_in_vain_for_a_large_pool_is_told_of_its_holders_once(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(holders, "monotonic", lambda: clock.now)
    size, looks = SHOWN_HOLDERS + 1, []

    class Held(HeldConnections):
        def holders(self):
            clock.now += 1.0  # as long as it takes
            looks.append(clock.now)
            return tuple(holder_of(f"look {len(looks)}") for _ in range(size))

    held = Held("default")
    full = SimpleNamespace(size=lambda: size, overflow=lambda: 0, checkedout=lambda: size)
    first, *others = [held.timeout(full, 0, 30.0) for _ in range(1000)]
    assert len(looks) == 1 and all(each.holders is first.holders for each in others)
    clock.now += 4.0
    assert held.timeout(full, 0, 30.0).holders[0].scope == "look 2"
    held.forget()  # they are the parent's
    assert held.timeout(full, 0, 30.0).holders[0].scope == "look 3"
    clock.now, size = clock.now + 4.0, SHOWN_HOLDERS
    assert [held.timeout(full, 0, 30.0).holders[0].scope for _ in range(2)] == ["look 4", "look 5"]


def test_holder_is_written_on_one_line():
    where = "Greenlet-1 for 2.0 s, idle for 1.0 s, now at a.py:1 in f"
    assert str(holder_of("Greenlet-1")) == where
    more = holder_of("Greenlet-1", taken_at=("b.py:2 in g", "c.py:3 in h"), statement="SELECT ?")
    assert str(more) == f"{where}, checked out at b.py:2 in g, last statement: SELECT ?"
    ended = holder_of("Greenlet-1", place="its greenlet has ended", stack=())
    assert str(ended) == "Greenlet-1 for 2.0 s, idle for 1.0 s, its greenlet has ended"


# -- where it was checked out ------------------------------------------------------------------------------------------


def by_engine(engine, _):
    return engine.connect()  # by_engine


def by_begin(engine, found):
    with engine.begin():  # by_begin
        found()


def by_raw_connection(engine, _):
    return engine.raw_connection()  # by_raw_connection


def by_pool(engine, _):
    return engine.pool.connect()  # by_pool


def by_session(engine, _):
    session = Session(engine)
    session.execute(text("SELECT 1"))  # by_session
    return session


def by_lazy_load(engine, _):
    session = Session(engine)
    order = session.get(Order, 1)
    session.commit()
    session.refresh(order)
    session.rollback()
    assert order.lines == []  # by_lazy_load
    return session


def by_flush(engine, _):
    session = Session(engine)
    session.add(Order())
    session.flush()  # by_flush
    return session


def by_generator(engine, _):
    def rows():
        yield engine.connect()  # by_generator

    return next(rows())


def by_listener(engine, found):
    @event.listens_for(engine, "before_cursor_execute", once=True)
    def listener(*_):
        with engine.connect():  # by_listener
            found()

    with engine.connect() as outer:
        outer.execute(text("SELECT 1"))


CALL_SITES = [value for name, value in list(globals().items()) if name.startswith("by_")]


@pytest.mark.parametrize("use", CALL_SITES, ids=lambda use: use.__name__)
@on_both_halves
async def test_call_site_is_the_innermost_line_of_the_users(half, managed, use):
    manager, found = managed(), []
    engine = sync(manager.engine())
    await half.call(Base.metadata.create_all, engine)
    async with manager.engine().begin() if half.name == "aio" else entered(engine.begin()) as connection:
        await done(connection.execute(text("INSERT OR IGNORE INTO orders VALUES (1)")))
    manager.database("default").held.recording = True
    used = await half.call(use, engine, lambda: found.append(held(manager)[-1]))
    holder = found[0] if found else held(manager)[0]
    assert holder.taken_at[0].startswith(line_of(use.__name__)), holder.taken_at
    assert any("test_call_site_is_the_innermost" in site for site in holder.taken_at), "all the way out"
    assert not any("sqlalchemy" in site or "/asyncio/" in site for site in holder.taken_at)
    if used is not None:
        await half.call(used.close)
    gc.collect()
    nothing_left(manager)


@on_both_halves
async def test_call_site_of_our_own_verbs_is_the_line_that_calls_them(half, managed):
    manager, found = managed(), []
    manager.get()
    manager.database("default").held.recording = True

    async def work(session):
        await done(session.execute(text("SELECT 1")))  # in run_in_transaction
        found.append(held(manager)[0])

    def work_now(session):
        session.execute(text("SELECT 1"))  # in run_in_transaction, gevent
        found.append(held(manager)[0])

    async with entered(manager.scope("a job")):
        await done(manager.get().execute(text("SELECT 1")))  # by a proxy
        found.append(held(manager)[0])
    await done(manager.run_in_transaction(work if half.name == "aio" else work_now))
    inside = "in run_in_transaction" + (", gevent" if half.name == "gevent" else "")
    for holder, line in zip(found, ("by a proxy", inside), strict=True):
        sites = [site for site in holder.taken_at if "support/halves.py" not in site]  # where it is awaited
        assert sites[0].startswith(line_of(line)), holder
    assert found[0].scope == "a job"


@on_both_halves
async def test_call_sites_and_scopes_are_recorded_after_the_first_pool_timeout(half, managed):
    """Before, a scope that has ended is forgotten; after, it is still told."""
    manager = managed(options={"pool_size": 1})

    async def take(label):
        async with entered(manager.scope(label)):
            return await half.call(sync(manager.engine()).connect)  # takes

    connection = await take("the first")
    with pytest.raises(PoolTimeout) as caught:
        await half.call(sync(manager.engine()).connect)
    (holder,) = caught.value.holders
    assert holder.taken_at == () and holder.scope == holder.greenlet
    await half.call(connection.close)
    connection = await take("the second")
    with pytest.raises(PoolTimeout) as caught:
        await half.call(sync(manager.engine()).connect)
    (holder,) = caught.value.holders
    assert any(site.startswith(line_of("takes")) for site in holder.taken_at) and holder.scope == "the second"
    assert f", checked out at {holder.taken_at[0]}" in str(caught.value)
    await half.call(connection.close)


@on_both_halves
async def test_holder_of_a_connection_that_is_handed_on_meanwhile_is_the_next_one(half, managed, monkeypatch):
    """In another thread, between two lines of ours."""
    manager = managed()
    connection = await half.call(sync(manager.engine()).connect)
    held_here = manager.database("default").held
    (note,) = held_here.notes()
    stack_of, steps = held_here.stack_of, []

    def handed_on(note):
        steps.append(note.since)
        if len(steps) == 1:
            note.since += 1.0
            return "the first one's"
        return stack_of(note)

    monkeypatch.setattr(held_here, "stack_of", handed_on)
    (holder,) = held(manager)
    assert len(steps) == 2 and holder.place != "the first one's"

    def given_back(note):
        note.in_use = False
        return "nobody's"

    monkeypatch.setattr(held_here, "stack_of", given_back)
    assert held(manager) == ()
    note.in_use = True
    monkeypatch.undo()
    await half.call(connection.close)


def test_stack_ends_after_200_call_sites():
    def deep(n):
        return deep(n - 1) if n else callsites.users(callsites.outwards(__import__("sys")._getframe()))

    sites = callsites.written(deep(300))
    assert len(sites) == 200 == sum(".<locals>.deep" in site for site in sites)


# -- what it is busy with, and for whom --------------------------------------------------------------------------------


@on_both_halves
async def test_state_says_what_the_connection_is_busy_with(half, managed):
    manager, seen = managed(), []
    engine = sync(manager.engine())

    def work():
        def see():
            seen.append(held_now())

        with engine.connect() as connection:
            see()
            connection.connection.dbapi_connection.create_function("look", 0, see)
            connection.execute(text("SELECT look()"))
            see()
            connection.execute(text("INSERT INTO orders VALUES (:n)"), [{"n": 4711}, {"n": 4712}])
            see()
            connection.rollback()
            see()
            with pytest.raises(exc.OperationalError):
                connection.execute(text("SELECT 'secret' FROM nowhere"))
            see()
            connection.commit()
            see()
        with engine.connect():  # of the same connection: nothing is told of the checkout before
            see()

    database = manager.database("default")

    def held_now():  # SQLite calls it in a thread of aiosqlite's, which has no database of its own
        return database.held.holders()[0]

    await half.call(Base.metadata.create_all, engine)
    await half.call(work)
    waits = "idle in transaction"
    assert [holder.state for holder in seen] == ["idle", "executing", waits, waits, "idle", waits, "idle", "idle"]
    insert, last = "INSERT INTO orders VALUES (?)", "SELECT ? FROM nowhere"
    statements = [None, "SELECT look()", "SELECT look()", insert, insert, last, last, None]
    assert [holder.statement for holder in seen] == statements
    assert all(0 <= holder.state_s <= holder.held_s for holder in seen)


@pytest.mark.parametrize(("entry", "state"), [({}, "idle in transaction"), ({"readonly": True}, "idle")])
@on_both_halves
async def test_session_that_has_read_is_in_a_transaction_unless_each_statement_commits(half, managed, entry, state):
    """As its own `in_transaction()` says: it keeps its connection until it commits."""
    await done(managed().get().execute(text("SELECT 1")))  # makes the file
    manager = managed(**entry)
    async with entered(manager.scope()):
        (await done(manager.get().execute(text("SELECT name FROM sqlite_master")))).all()
        assert held(manager)[0].state == state


@on_both_halves
async def test_scope_is_that_of_the_session_else_the_one_of_the_checkout_while_it_is_open(half, managed):
    manager = managed(options={"pool_size": 5})
    connect = sync(manager.engine()).connect
    async with entered(manager.scope("outer")):
        session = manager.get()()
        async with entered(manager.scope("inner")):
            await done(session.execute(text("SELECT 1")))  # the outer one's
            connection = await half.call(connect)
            async with entered(manager.scope("innermost")):
                assert [each.scope for each in held(manager)] == ["outer", "inner"]
        await done(session.commit())
        await half.call(connection.close)
        connection = await half.call(connect)
        assert held(manager)[0].scope == "outer"
        await half.call(connection.close)
    connection = await half.call(connect)  # the same connection: no session of an earlier one's is said of it
    (holder,) = held(manager)
    assert holder.scope == holder.greenlet != "outer"
    async with entered(manager.scope("later")):
        assert held(manager)[0].scope == holder.scope, "a scope that began after the checkout is not the holder's"
    await half.call(connection.close)
    nothing_left(manager)


@on_both_halves
async def test_holder_that_has_ended_is_said_so_and_not_kept(half, managed):
    manager = managed()
    kept = []

    async def take():
        kept.append(await half.call(sync(manager.engine()).connect))

    job = half.spawn(take, name="taker")
    await half.join(job)
    (holder,) = held(manager)
    kind = "greenlet" if half.name == "gevent" else "task"
    assert holder.place == f"its {kind} has ended" and holder.stack == () and holder.greenlet.endswith("taker")
    gone = weakref.ref(job)
    del job
    await half.until(lambda: gc.collect() >= 0 and gone() is None)  # the loop lets go of it
    (holder,) = held(manager)
    assert holder.greenlet == f"a {kind} that is gone" and holder.place == f"its {kind} has ended"
    await half.call(kept.pop().close)
    nothing_left(manager)


@on_both_halves
async def test_connection_that_another_one_uses_is_said_of_who_took_it(half, managed):
    manager = managed()
    ready, end = half.event(), half.event()
    kept = []

    async def take():
        async with entered(manager.scope("the taker")):
            kept.append(await half.call(sync(manager.engine()).connect))
            ready.set()
            (ended := end.wait()) is True or await ended

    async def use():
        async with entered(manager.scope("the user")):
            await half.call(kept[0].execute, text("SELECT 'x'"))

    taker = half.spawn(take, name="taker")
    (is_ready := ready.wait()) is True or await is_ready
    await half.elsewhere(use)
    (holder,) = held(manager)
    assert holder.scope == "the taker" and holder.greenlet.endswith("taker") and holder.statement == "SELECT ?"
    end.set()
    await half.join(taker)
    await half.call(kept.pop().close)
    nothing_left(manager)


@pytest.mark.parametrize("said", ["import\x1b[2J\nERROR forged", "a\u202eb"])
@on_both_halves
async def test_label_and_name_cannot_forge_lines_or_command_a_terminal(half, managed, said):
    manager = managed(options={"pool_size": 1})
    ready, end = half.event(), half.event()

    async def hold():
        async with entered(manager.scope(said)):
            await done(manager.get().execute(text("SELECT 1")))
            ready.set()
            (ended := end.wait()) is True or await ended

    job = half.spawn(hold, name=said)
    (is_ready := ready.wait()) is True or await is_ready
    with pytest.raises(PoolTimeout) as caught:
        await half.call(sync(manager.engine()).connect)
    assert all(line.isprintable() for line in str(caught.value).split("\n")) and "\nERROR" not in str(caught.value)
    (holder,) = held(manager)
    assert holder.scope.isprintable() and holder.greenlet.isprintable() and said[-1] in holder.greenlet
    end.set()
    await half.join(job)


# -- the note goes with the checkout -----------------------------------------------------------------------------------


def detach(connection):
    connection.detach()
    connection.close()


def invalidate(connection):
    connection.invalidate()
    connection.close()


def invalidate_and_reconnect(connection):
    connection.execute(text("SELECT 1"))
    connection.rollback()
    connection.invalidate()
    connection.execute(text("SELECT 1"))
    connection.close()


def dispose_first(connection):
    connection.engine.dispose()
    connection.close()


def drop(connection):
    pass


def soft_invalidate(connection):
    connection.connection.invalidate(soft=True)
    connection.close()


def close_the_driver(connection):
    connection.connection.dbapi_connection.close()
    connection.close()


def fail_the_reset(connection):
    def reset(*_):
        raise OSError("the reset fails")

    event.listen(connection.engine, "reset", reset, once=True)
    connection.execute(text("SELECT 1"))
    connection.close()


ENDS = [detach, invalidate, invalidate_and_reconnect, dispose_first, drop]
ENDS += [soft_invalidate, close_the_driver, fail_the_reset]


@pytest.mark.parametrize("poolclass", [None, pool.QueuePool, pool.NullPool, pool.StaticPool])
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.filterwarnings("ignore:The garbage collector is trying to clean up:sqlalchemy.exc.SAWarning")
@on_both_halves
async def test_no_note_is_left_behind_however_the_connection_ends(half, tmp_path, end, poolclass, caplog):
    if poolclass is pool.StaticPool and end is detach:
        pytest.skip("a StaticPool does not survive that")
    if half.name == "aio" and poolclass is not None and not (poolclass is pool.NullPool and end is not drop):
        pytest.skip("it leaves a connection open, of which aiosqlite complains")
    caplog.set_level("CRITICAL", "sqlalchemy.pool")  # it logs the reset that fails with its traceback
    options = {"poolclass": poolclass} if poolclass else {"pool_size": 2}
    manager = half.verbs.SessionManager({"default": {"url": f"sqlite:///{tmp_path}/a.db", "options": options}})
    opened = []
    event.listen(sync(manager.engine()), "connect", lambda connection, _: opened.append(connection))
    connection = await half.call(sync(manager.engine()).connect)
    note = connection.connection.record_info[CHECKOUT]
    assert note.in_use and len(held(manager)) == 1
    await half.call(end, connection)
    del connection
    gc.collect()
    assert not manager.database("default").held.notes()
    assert not note.in_use and note.statement is None
    stats = manager.database("default").stats
    assert sum(stats.holds.counts) == stats.checkouts >= 1
    connection = await half.call(sync(manager.engine()).connect)
    assert len(held(manager)) == 1
    await half.call(connection.close)
    assert not held(manager)
    await done(manager.dispose())
    if half.name == "gevent":
        for driver in opened:  # SQLAlchemy's own pools leave some of them to the collector
            driver.close()


@on_both_halves
async def test_successive_pools_know_the_holders_of_both(half, managed):
    manager = managed(options={"pool_size": 1})
    engine = sync(manager.engine())
    old = await half.call(engine.connect)
    await half.call(engine.dispose)
    new = await half.call(engine.connect)
    assert len(held(manager)) == 2
    with pytest.raises(PoolTimeout) as caught:
        await half.call(engine.connect)
    assert caught.value.in_use == 1 and len(caught.value.holders) == 2
    await half.call(old.close)
    await half.call(new.close)
    nothing_left(manager)


@pytest.mark.parametrize("recording", [False, True])
@on_both_halves
async def test_note_keeps_no_frame(half, managed, recording):
    """Nor anything that one uses."""
    manager = managed()
    manager.get()
    manager.database("default").held.recording = recording

    class Used:
        pass

    for _ in range(2):
        used = Used()
        gone = weakref.ref(used)
        connection = await half.call(sync(manager.engine()).connect)
        gc.disable()
        try:
            del used
            assert gone() is None
            fairy = weakref.ref(connection.connection)
            await half.call(connection.close)
            del connection
            assert fairy() is None
        finally:
            gc.enable()


@on_both_halves
async def test_slot_is_kept_when_the_note_fails(half, managed, monkeypatch):
    """A signal, or the stack's end."""
    manager = managed(options={"pool_size": 1})
    connect = sync(manager.engine()).connect
    await half.call((await half.call(connect)).close)

    def fail(*_):
        raise KeyboardInterrupt

    held_by = manager.database("default").held
    held_by.recording = True
    with monkeypatch.context() as patched:
        patched.setattr(callsites, "users", fail)
        with pytest.raises(KeyboardInterrupt):
            await half.call(connect)
    nothing_left(manager)
    await half.call((await half.call(connect)).close)
