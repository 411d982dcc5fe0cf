"""Who holds a connection: noted at its checkout, forgotten at its return, and told of in PoolTimeout."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from pathlib import Path

import gevent
import gevent.event
import pytest
from sqlalchemy import create_engine, event, exc, pool, select, text
from sqlalchemy.orm import Session

import dbsession
from dbsession import DBSessionMiddleware, PoolTimeout, SessionManager, snapshot
from dbsession.core.connection_info import CHECKOUT
from dbsession.core.pool import callsites
from dbsession.core.pool.holders import Holder
from dbsession.errors import SHOWN_HOLDERS
from support.models import Base, Order
from support.pools import make
from support.processes import run_python


@pytest.fixture
def managed(tmp_path):
    """Makes managers of one SQLite database; `managed(**entry)`."""
    managers = []

    def make(**entry):
        options = {"pool_size": 2, "pool_timeout": 0.05, **entry.pop("options", {})}
        url = f"sqlite:///{tmp_path}/a.db"
        managers.append(SessionManager({"default": {"url": url, "options": options, **entry}}))
        return managers[-1]

    yield make
    gevent.sleep(0)  # the hub closes what ended greenlets have left
    for manager in managers:
        manager.clear()
        manager.dispose()


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
    assert not database.held.notes() and database.engine.pool.checkedout() == 0


# -- PoolTimeout -------------------------------------------------------------------------------------------------------


def full(manager):
    """The error of a caller that finds every connection in use, with one of another holder."""
    first, second = manager.engine().connect(), manager.engine().connect()
    try:
        first.execute(text("SELECT :p, 'in the text'"), {"p": "a parameter"})
        with pytest.raises(exc.TimeoutError) as caught:
            manager.engine().connect()
        return caught.value
    finally:
        first.close()
        second.close()


def test_pool_timeout_is_sqlalchemys_and_has_what_its_text_says(managed):
    error = full(managed())
    assert type(error) is PoolTimeout and isinstance(error, (exc.TimeoutError, dbsession.DBSessionError))
    assert (error.database, error.size, error.in_use, error.waiting) == ("default", 2, 2, 0)
    assert 0.05 <= error.waited_s < 60
    assert [type(holder) for holder in error.holders] == [Holder] * 2
    said = str(error)
    assert "Database 'default'" in said and "QueuePool limit of size 2 overflow 0 reached" in said
    assert f"timed out after {error.waited_s:.2f} s with 2 in use and 0 others waiting" in said
    assert "last statement: SELECT ?, ?" in said and "in full" in said
    assert "a parameter" not in said and "in the text" not in said
    assert "a parameter" not in repr(error) and "in the text" not in repr(error.holders)
    assert said.endswith("[DBS-POOL-TIMEOUT]")
    assert error.holders[0].held_s >= error.holders[1].held_s


@pytest.mark.parametrize("again", [lambda error: pickle.loads(pickle.dumps(error)), copy.copy, copy.deepcopy])
def test_pool_timeout_is_the_same_when_pickled(managed, again):
    error = full(managed())
    same = again(error)
    assert type(same) is PoolTimeout and str(same) == str(error) and same.holders == error.holders
    assert (same.database, same.in_use, same.waited_s) == (error.database, error.in_use, error.waited_s)


def test_pool_timeout_of_a_pool_that_no_manager_made_has_no_database():
    of_nobody = make(1, timeout=0.01)
    connection = of_nobody.connect()
    with pytest.raises(PoolTimeout, match=r"^A pool: QueuePool limit") as caught:
        of_nobody.connect()
    assert caught.value.database is None and caught.value.holders[0].place.startswith(__file__)
    connection.close()


def test_pool_timeout_shows_the_longest_ten_and_says_how_many_more(managed):
    manager = managed(options={"pool_size": SHOWN_HOLDERS + 3})
    connections = []
    for n in range(SHOWN_HOLDERS + 3):
        with manager.scope(f"job {n:02}"):
            connections.append(manager.engine().connect())
    with pytest.raises(PoolTimeout) as caught:
        manager.engine().connect()
    lines = str(caught.value).splitlines()
    assert [line.split()[1] for line in lines[1:-2]] == [f"{n:02}" for n in range(SHOWN_HOLDERS)]
    assert lines[-2] == "  and 3 more" and len(caught.value.holders) == SHOWN_HOLDERS + 3
    for connection in connections:
        connection.close()
    nothing_left(manager)


def test_pool_timeout_says_how_many_are_being_opened(managed):
    """They are in use, and nobody holds them yet."""
    manager = managed(options={"pool_size": 1})
    opening, go_on = threading.Event(), threading.Event()

    @event.listens_for(manager.engine(), "do_connect")
    def slow(*_):
        opening.set()
        assert go_on.wait(20)

    thread = threading.Thread(target=lambda: manager.engine().connect().close())
    thread.start()
    assert opening.wait(20)
    try:
        with pytest.raises(PoolTimeout, match="1 more being opened") as caught:
            manager.engine().connect()
    finally:
        go_on.set()
        thread.join(20)
    assert caught.value.in_use == 1 and caught.value.holders == ()
    nothing_left(manager)


# -- the place ---------------------------------------------------------------------------------------------------------


def by_proxy(manager):
    manager.get().execute(text("SELECT 1"))  # by_proxy


def by_session(manager):
    manager.get()().connection()  # by_session


def by_orm_query(manager):
    list(manager.get().scalars(select(Order)))  # by_orm_query


def by_legacy_query(manager):
    manager.get().query(Order).count()  # by_legacy_query


def by_lazy_load(manager):
    session = manager.get()
    order = session.get(Order, 1)
    session.commit()
    session.refresh(order)
    manager.release()
    return order.lines  # by_lazy_load


def by_flush(manager):
    manager.get().add(Order())
    manager.get().flush()  # by_flush


def by_comprehension(manager):
    [manager.get().scalar(text("SELECT 1")) for _ in range(1)]  # by_comprehension


def by_generator(manager):
    def rows():
        yield manager.get().scalar(text("SELECT 1"))  # by_generator

    list(rows())


def by_engine(manager):
    return manager.engine().connect()  # by_engine


def by_begin(manager):
    with manager.engine().begin():  # by_begin
        return held(manager)[0]


def by_raw_connection(manager):
    return manager.engine().raw_connection()  # by_raw_connection


def by_pool(manager):
    return manager.engine().pool.connect()  # by_pool


def by_other_session(manager):
    session = Session(manager.engine())
    session.execute(text("SELECT 1"))  # by_other_session
    return session


def by_transaction(manager):
    found = []

    def work(session):
        session.execute(text("SELECT 1"))  # by_transaction
        found.append(held(manager)[0])

    manager.run_in_transaction(work)
    return found[0]


def by_nested_listener(manager):
    found = []

    @event.listens_for(manager.engine(), "before_cursor_execute", once=True)
    def listener(*_):
        with manager.engine().connect():  # by_nested_listener
            found.append(held(manager)[1])

    with manager.engine().connect() as outer:
        outer.execute(text("SELECT 1"))
    return found[0]


def by_middleware(manager):
    found = []

    def app(environ, start_response):
        start_response("200 OK", [])
        manager.get().execute(text("SELECT 1"))  # by_middleware
        found.append(held(manager)[0])
        return []

    DBSessionMiddleware(app)({"REQUEST_METHOD": "GET", "PATH_INFO": "/orders/7"}, lambda *_: None)
    assert found[0].scope == "GET /orders/7"
    return found[0]


def by_flask(manager):
    from flask import Flask

    import dbsession.flask

    app = Flask(__name__)
    dbsession.flask.init_app(app)

    @app.get("/orders/<int:number>")
    def order(number):
        manager.get().execute(text("SELECT 1"))  # by_flask
        found.append(held(manager)[0])
        return ""

    found = []
    with app.test_client().get("/orders/7?customer=secret"):
        pass
    assert found[0].scope == "GET /orders/7"
    return found[0]


PLACES = [value for name, value in list(globals().items()) if name.startswith("by_")]


@pytest.mark.parametrize("use", PLACES, ids=lambda use: use.__name__)
def test_place_is_the_innermost_line_outside_sqlalchemy_and_dbsession(managed, use):
    manager = managed()
    Base.metadata.create_all(manager.engine())
    with manager.engine().begin() as connection:
        connection.execute(text("INSERT OR IGNORE INTO orders VALUES (1)"))
    with manager.scope("a job"):
        used = use(manager)
        holder = used if isinstance(used, Holder) else held(manager)[0]
        assert holder.place.startswith(line_of(use.__name__)), holder.place
        assert holder.stack[0] == holder.place
        del used
    gc.collect()
    nothing_left(manager)


def test_stack_goes_outwards_for_three_frames_and_all_the_way_after_a_leak(managed):
    manager = managed()

    def deep(n):
        return deep(n - 1) if n else manager.engine().connect()

    with deep(10):
        (holder,) = held(manager)
        assert len(holder.stack) == 3
        assert all(place.endswith(".<locals>.deep") for place in holder.stack)
    manager.database("default").held.note_whole_stacks()
    with deep(10):
        (holder,) = held(manager)
        assert [place.rpartition(".")[2] for place in holder.stack[:11]] == ["deep"] * 11
        assert "test_stack_goes_outwards" in holder.stack[11]
    manager.database("default").held.note_whole_stacks()
    with deep(300):
        assert len(held(manager)[0].stack) == 200


@pytest.mark.parametrize("helpers", range(12))
def test_place_of_a_listener_is_its_own_however_deep_it_stands(managed, helpers, monkeypatch):
    """One of SQLAlchemy's frames outside it is then as deep as in a statement that takes a connection itself."""
    monkeypatch.setattr(callsites, "_known", {depth: {} for depth in callsites._known})
    # without what the other tests have taught it
    manager = managed(guard="off")
    found = []

    def help_(n):
        if n:
            help_(n - 1)
        else:
            with manager.engine().connect():  # deep_listener
                found.append(held(manager)[-1])

    with manager.scope():
        manager.get().execute(text("SELECT 1"))
    event.listen(manager.get()(), "do_orm_execute", lambda _: help_(helpers))
    manager.get().execute(text("SELECT 1"))
    assert found[0].place.startswith(line_of("deep_listener")), found[0].place


def test_equal_code_of_two_files_has_two_places(managed, tmp_path):
    """Python takes them for the same, but for their names."""
    manager, connections = managed(), []
    for name in ("one.py", "two.py"):
        path = tmp_path / name
        namespace = {}
        exec(compile("def use(engine):\n    return engine.connect()\n", path, "exec"), namespace)
        connections.append(namespace["use"](manager.engine()))
    assert [holder.place for holder in held(manager)] == [
        f"{tmp_path}/{name}:2 in use" for name in ("one.py", "two.py")
    ]
    for connection in connections:
        connection.close()


# -- what it is busy with, and for whom --------------------------------------------------------------------------------


def test_state_says_what_the_connection_is_busy_with(managed):
    manager = managed()
    Base.metadata.create_all(manager.engine())
    seen = []

    with manager.engine().connect() as connection:
        connection.connection.dbapi_connection.create_function("look", 0, lambda: seen.append(held(manager)[0]))
        connection.execute(text("SELECT look()"))
        seen.append(held(manager)[0])
        connection.execute(text("INSERT INTO orders VALUES (:n)"), [{"n": 4711}, {"n": 4712}])
        seen.append(held(manager)[0])
        connection.rollback()
        seen.append(held(manager)[0])
        with pytest.raises(exc.OperationalError):
            connection.execute(text("SELECT 'secret' FROM nowhere"))
        seen.append(held(manager)[0])
    waits = "idle in transaction"
    assert [holder.state for holder in seen] == ["executing", waits, waits, "idle", waits]
    insert = "INSERT INTO orders VALUES (?)"
    statements = ["SELECT look()", "SELECT look()", insert, insert, "SELECT ? FROM nowhere"]
    assert [holder.statement for holder in seen] == statements
    assert all(0 <= holder.state_s <= holder.held_s for holder in seen)


def test_session_that_has_only_read_is_idle_in_transaction(managed):
    """As its own `in_transaction()` says: it keeps its connection until it commits."""
    manager = managed()
    with manager.scope():
        manager.get().execute(text("SELECT name FROM sqlite_master")).all()
        assert manager.get()().in_transaction() and held(manager)[0].state == "idle in transaction"


def test_session_is_idle_when_each_statement_commits_by_itself(managed):
    manager = managed(readonly=True)
    with manager.scope():
        manager.get().execute(text("SELECT 1"))
        assert held(manager)[0].state == "idle"


def test_state_tells_nothing_of_the_checkout_before(managed):
    manager = managed()
    with manager.scope():
        manager.get().execute(text("SELECT 1"))
    connection = manager.engine().raw_connection()
    assert held(manager)[0].state == "idle"
    connection.close()


def test_scope_is_that_of_the_session_else_the_callers_else_its_function(managed):
    manager = managed(options={"pool_size": 5})
    told = {}

    def own(name):
        told[name] = held(manager)[-1]

    with manager.scope("outer"):
        session = manager.get()()
        with manager.scope("inner"):
            session.execute(text("SELECT 1"))  # the outer one's
            own("a session of the outer scope")
            with manager.engine().connect():
                own("a connection")

    def job():
        manager.get().execute(text("SELECT 1"))
        own("greenlet")

    class Work:
        def method(self):
            with manager.engine().connect():
                own("method")

    gevent.spawn(job).get(10)
    gevent.spawn(Work().method).get(10)
    thread = threading.Thread(target=job, name="importer")
    gevent.sleep(0)
    thread.start()
    thread.join()
    own_thread = told.pop("greenlet")
    assert own_thread.scope == own_thread.greenlet == "thread importer"
    assert str(own_thread).startswith("thread importer for ")
    assert told["a session of the outer scope"].scope == "outer"
    assert told["a connection"].scope == "inner"
    assert told["method"].scope == told["method"].greenlet
    assert "Work.method in Greenlet-" in told["method"].scope


def test_greenlet_that_is_gone_is_said_so_and_not_kept(managed):
    manager, kept = managed(), []
    job = gevent.spawn(lambda: kept.append(manager.engine().connect()))
    job.join(10)
    gone = weakref.ref(job)
    del job
    gevent.sleep(0)  # the hub lets go of it
    gc.collect()
    assert gone() is None
    assert held(manager)[0].greenlet == "a greenlet that is gone"
    kept.pop().close()
    nothing_left(manager)


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


@pytest.mark.parametrize("poolclass", [None, pool.QueuePool, pool.NullPool, pool.StaticPool])
@pytest.mark.parametrize(
    "end",
    [
        *(detach, invalidate, invalidate_and_reconnect, dispose_first, drop, soft_invalidate, close_the_driver),
        fail_the_reset,
    ],
)
def test_no_note_is_left_behind_however_the_connection_ends(managed, end, poolclass, caplog):
    if poolclass is pool.StaticPool and end is detach:
        pytest.skip("a StaticPool does not survive that")
    caplog.set_level("CRITICAL", "sqlalchemy.pool")  # it logs the reset that fails with its traceback
    sized = {"pool_size": 2} if poolclass in (None, pool.QueuePool) else {}
    url = managed().engine().url
    options = {"poolclass": poolclass, **sized} if poolclass else sized
    manager = SessionManager({"default": {"url": url, "options": options}})
    connection = manager.engine().connect()
    note = connection.connection.record_info[CHECKOUT]
    assert note.in_use
    end(connection)
    del connection
    gc.collect()
    assert not manager.database("default").held.notes()
    assert not note.in_use
    (database,) = [each for each in snapshot().databases if each.in_use and each.name == "default"] or [None]
    assert database is None
    with manager.engine().connect():
        assert len(held(manager)) == 1
    assert not held(manager)
    manager.dispose()


@pytest.mark.parametrize("error", [gevent.GreenletExit, KeyboardInterrupt, OSError, exc.DisconnectionError])
@pytest.mark.parametrize("moment", ["connect", "checkout", "checkin"])
def test_no_note_is_left_behind_when_a_listener_of_the_users_fails(managed, moment, error, caplog):
    caplog.set_level("CRITICAL", "sqlalchemy.pool")
    manager = managed(options={"pool_size": 1})
    armed = []

    @event.listens_for(manager.engine(), moment)
    def listener(*_):
        if armed:
            raise armed.pop()

    def attempt():
        try:
            manager.engine().connect().close()
        except error:
            pass

    armed.append(error())
    attempt()
    armed.clear()
    if moment != "checkin":  # an error there costs the place, SQLAlchemy's own as well
        attempt()
    assert not manager.database("default").held.notes()


def test_successive_pools_know_the_holders_of_both(managed):
    manager = managed(options={"pool_size": 1})
    engine = manager.engine()
    old = engine.connect()
    engine.dispose()
    new = engine.connect()
    assert len(held(manager)) == 2
    with pytest.raises(PoolTimeout) as caught:
        engine.connect()
    assert caught.value.in_use == 1 and len(caught.value.holders) == 2
    old.close()
    new.close()
    nothing_left(manager)


# -- nothing is kept alive ---------------------------------------------------------------------------------------------


def test_what_is_dropped_is_collected_and_its_connection_comes_back(managed):
    manager = managed(options={"pool_size": 1})

    class Canary:
        pass

    canary = Canary()
    gone = weakref.ref(canary)

    def use(canary):
        session = Session(manager.engine())
        session.info["canary"] = canary
        session.execute(text("SELECT 1"))
        return weakref.ref(session)

    session = use(canary)
    del canary
    gc.collect()
    assert session() is None and gone() is None
    nothing_left(manager)

    def greenlet(canary):
        manager.get().execute(text("SELECT 1"))
        raise Exit

    class Exit(gevent.GreenletExit):
        pass

    canary = Canary()
    gone = weakref.ref(canary)
    job = gevent.spawn(greenlet, canary)
    job.join(10)
    del job, canary
    gevent.sleep(0)
    gevent.sleep(0)
    gc.collect()
    assert gone() is None
    nothing_left(manager)


def test_checkouts_leave_nothing_behind(managed):
    manager = managed()
    engine = manager.engine()

    def use(times):
        for n in range(times):
            with engine.connect() as connection:
                connection.execute(text("SELECT 1"))
                if n % 100 == 0:
                    connection.invalidate()

    use(2000)
    gc.collect()
    before = len(gc.get_objects())
    use(20_000)
    gc.collect()
    assert len(gc.get_objects()) - before < 100
    nothing_left(manager)


def test_engine_that_is_dropped_is_collected(tmp_path):
    manager = SessionManager({"default": f"sqlite:///{tmp_path}/a.db"})
    with manager.scope():
        manager.get().execute(text("SELECT 1"))
    gone = [weakref.ref(manager.engine()), weakref.ref(manager.database("default"))]
    manager.dispose()
    del manager
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


def test_statement_that_the_users_listener_executes_is_let_through(managed):
    """SQLAlchemy's `do_execute` event, whose listener may do it in our place."""
    manager = managed()
    done = []

    @event.listens_for(manager.engine(), "do_execute")
    def listener(cursor, statement, parameters, context):
        cursor.execute(statement, parameters)
        done.append(statement)
        return True

    with manager.engine().connect() as connection:
        assert connection.scalar(text("SELECT 1")) == 1
        assert done == ["SELECT 1"] and held(manager)[0].state == "idle"


def test_dialect_of_a_stock_engine_is_left_alone(managed):
    managed().engine()
    assert "do_execute" not in vars(create_engine("sqlite://").dialect)


@pytest.mark.parametrize("said", ["import\x1b[2J\nERROR forged", "a\u202eb"])
def test_label_cannot_forge_lines_or_command_a_terminal(managed, caplog, said):
    manager = managed(options={"pool_size": 1}, leak_after_s=0.05)
    with dbsession.session_scope(said) as scope:
        manager.get().execute(text("SELECT 1"))
        greenlet = gevent.spawn(manager.get().execute, text("SELECT 1"))
        greenlet.name = said
        with pytest.raises(PoolTimeout) as caught:
            greenlet.get(timeout=10)
        assert all(line.isprintable() for line in str(caught.value).split("\n")) and "\nERROR" not in str(caught.value)
        (holder,) = held(manager)
        assert scope.label.isprintable() and holder.scope.isprintable()


def test_name_of_a_greenlet_cannot_forge_lines(managed):
    manager = managed(options={"pool_size": 1})
    ready, done = gevent.event.Event(), gevent.event.Event()

    def work():
        manager.get().execute(text("SELECT 1"))
        ready.set()
        done.wait(10)

    greenlet = gevent.spawn(work)
    greenlet.name = "a\nERROR forged"
    assert ready.wait(10)
    (holder,) = held(manager)
    done.set()
    greenlet.join(timeout=10)
    assert holder.greenlet.isprintable() and "ERROR forged" in holder.greenlet


def test_holder_is_called_by_its_threads_name_when_threads_are_greenlets(tmp_path):
    """gevent runs each in a greenlet whose function is `Thread._bootstrap`, whatever the thread is for."""
    run_python(
        """
        from gevent import monkey
        monkey.patch_all()
        import sys, threading
        import dbsession
        from sqlalchemy import text
        dbsession.configure({"default": f"sqlite:///{sys.argv[1]}/a.db"})
        ready, done = threading.Event(), threading.Event()
        def work():
            dbsession.get_dbsession().execute(text("SELECT 1"))
            ready.set()
            done.wait(10)
        thread = threading.Thread(target=work, name="nightly")
        thread.start()
        assert ready.wait(10)
        (holder,) = dbsession.snapshot().holders
        done.set()
        thread.join(10)
        assert holder.scope == holder.greenlet == "thread nightly", holder
        """,
        tmp_path,
    )
