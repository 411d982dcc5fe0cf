"""Which greenlet or thread holds a connection, and where it is; what both halves have is in core/pool."""

from __future__ import annotations

import gc
import threading
import weakref
from pathlib import Path
from urllib.parse import urlsplit

import gevent
import gevent.event
import greenlet
import pytest
from sqlalchemy import create_engine, event, exc, text
from sqlalchemy.orm import Session

from dbsession import DBSessionMiddleware, PoolTimeout, SessionManager
from support.pools import make
from support.processes import run_python
from support.proxy import Proxy
from support.waiting import wait_until


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


def test_pool_timeout_of_a_pool_that_no_manager_made_has_no_database():
    of_nobody = make(1, timeout=0.01)
    connection = of_nobody.connect()
    with pytest.raises(PoolTimeout, match=r"^A pool: QueuePool limit") as caught:
        of_nobody.connect()
    assert caught.value.database is None and caught.value.holders[0].place.startswith(__file__)
    connection.close()


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


# -- where it is now ---------------------------------------------------------------------------------------------------


def test_place_is_the_line_at_which_each_greenlet_and_thread_waits(managed):
    manager = managed(options={"pool_size": 5})
    ready, end, stop = gevent.event.Event(), gevent.event.Event(), threading.Event()

    def request():
        with manager.engine().connect():
            end.wait(20)  # a greenlet waits

    def raw(connection):
        hub.switch()  # a raw greenlet waits
        connection.close()

    def thread():
        with manager.engine().connect():
            started.set()
            stop.wait(20)  # a thread waits

    def asks():
        with manager.engine().connect():
            return held(manager)  # asks

    started = threading.Event()
    hub = greenlet.getcurrent()
    job = gevent.spawn(request)
    gevent.sleep(0)
    other = greenlet.greenlet(lambda: raw(manager.engine().connect()))
    other.switch()
    threads = [threading.Thread(target=thread)]
    threads[0].start()
    assert started.wait(20) and not ready.is_set()
    waits = ("a greenlet waits", "a raw greenlet waits", "a thread waits")
    *found, own = asks()
    assert [holder.place.rpartition(" in ")[0] + " in " for holder in found] == [line_of(part) for part in waits]
    assert own.stack[1].startswith(line_of("asks"))
    stop.set()
    end.set()
    other.switch()
    threads[0].join(20)
    job.join(20)
    nothing_left(manager)


def test_place_of_a_greenlet_that_runs_in_another_thread_is_where_it_runs(managed):
    """Also where that thread has a hub, and the greenlet never gives way."""
    manager = managed()
    started, stop = threading.Event(), threading.Event()

    def busy():
        with manager.engine().connect():
            started.set()
            assert stop.wait(20)  # runs

    thread = threading.Thread(target=lambda: gevent.spawn(busy).join())
    thread.start()
    try:
        assert started.wait(20)
        (holder,) = held(manager)
        assert holder.place.startswith(line_of("runs")) and "busy in Greenlet-" in holder.greenlet
    finally:
        stop.set()
        thread.join(20)


def test_look_of_the_holder_itself_keeps_nobody_alive(managed):
    manager = managed()
    looks = []

    def holds():
        with manager.engine().connect():
            looks.extend(held(manager))

    gc.collect()
    gc.disable()
    try:
        job = gevent.spawn(holds)
        job.join()
        gone = weakref.ref(job)
        del job
        gevent.sleep(0)
        assert gone() is None and len(looks) == 1
    finally:
        gc.enable()


def test_place_of_a_request_is_the_applications_line(managed):
    """Whatever of ours, of SQLAlchemy's, the driver's and gevent's stands within or between."""
    manager, found = managed(), []

    def app(environ, start_response):
        start_response("200 OK", [])
        manager.get().execute(text("SELECT 1"))
        found.append(held(manager)[0])
        manager.get().connection().connection.create_function("look", 0, lambda: found.append(held(manager)[0]))
        manager.get().execute(text("SELECT look()"))  # executes
        return []

    DBSessionMiddleware(app)({"REQUEST_METHOD": "GET", "PATH_INFO": "/orders/7"}, lambda *_: None)
    assert [holder.scope for holder in found] == ["GET /orders/7"] * 2
    assert found[1].stack[2].startswith(line_of("executes")) and found[1].state == "executing"
    assert not any("dbsession/" in site or "sqlalchemy" in site or "/gevent/" in site for site in found[1].stack)


def test_label_of_a_holder_without_a_scope_is_its_function(managed):
    manager, told = managed(), {}

    class Work:
        def method(self):
            with manager.engine().connect():
                told["method"] = held(manager)[-1]

    def job():
        manager.get().execute(text("SELECT 1"))
        told["thread"] = held(manager)[-1]

    gevent.spawn(Work().method).get(10)
    thread = threading.Thread(target=job, name="importer")
    thread.start()
    thread.join()
    gevent.sleep(0)
    assert told["method"].scope == told["method"].greenlet and "Work.method in Greenlet-" in told["method"].scope
    assert told["thread"].scope == told["thread"].greenlet == "thread importer"
    assert str(told["thread"]).startswith("thread importer for ")


# -- the note goes with the checkout -----------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [gevent.GreenletExit, KeyboardInterrupt, OSError, exc.DisconnectionError])
@pytest.mark.parametrize("moment", ["connect", "checkout", "checkin"])
def test_no_note_is_left_behind_when_a_listener_of_the_users_fails(managed, moment, error, caplog):
    caplog.set_level("CRITICAL", "sqlalchemy.pool")
    manager = managed(options={"pool_size": 1})
    armed, opened = [], []
    event.listen(manager.engine(), "connect", lambda connection, _: opened.append(connection))

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
    for driver in opened:
        driver.close()


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


# -- what the connections of ours tell ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("server", "driver"),
    [
        pytest.param("mariadb", "pymysql", marks=pytest.mark.mariadb),
        pytest.param("postgresql", "psycopg", marks=pytest.mark.postgresql),
        pytest.param("postgresql", "psycopg2", marks=[pytest.mark.postgresql, pytest.mark.slow]),
    ],
    indirect=["server"],
)
def test_state_on_a_server_is_what_the_connection_is_busy_with(server, server_url, driver):
    """Each thread is seen by this one; a stalled proxy makes what is short last."""
    streams = {"mysql": "SELECT seq FROM seq_1_to_5000", "postgresql": "SELECT generate_series(1, 5000)"}
    states = []
    with Proxy(server.port) as proxy:
        url = server.url(urlsplit(server_url).path[1:], port=proxy.port, driver=driver)
        manager = SessionManager({"default": {"url": url, "ping_idle_s": 0, "options": {"pool_size": 1}}})
        engine = manager.engine()

        def stalled(state, work):
            proxy.stall()
            thread = threading.Thread(target=work)
            thread.start()
            try:
                wait_until(lambda: [each.state for each in held(manager)] == [state], 20, state)
                states.append(state)
            finally:
                proxy.resume()
                thread.join(20)

        with engine.connect() as connection:
            assert held(manager)[0].state == "idle"
            stalled("executing", lambda: connection.execute(text("SELECT 1")))
            assert held(manager)[0].state == "idle in transaction"
            connection.rollback()
            connection.execute(text("CREATE TABLE t (n INTEGER)"))
            connection.execute(text("INSERT INTO t VALUES (1)"))
            stalled("committing", connection.commit)
            assert held(manager)[0].state == "idle"
            stream = text(streams[engine.dialect.name]).execution_options(yield_per=10)
            result = connection.execute(stream)
            result.fetchone()
            assert held(manager)[0].state == "streaming"
            assert len(result.all()) == 4999
            assert held(manager)[0].state == "idle in transaction"
        stalled("pinging", lambda: engine.connect().close())
        assert states == ["executing", "committing", "pinging"]
        nothing_left(manager)
        manager.dispose()
