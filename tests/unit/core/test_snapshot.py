"""snapshot(): this process, right for its moment, wherever it is asked for."""

from __future__ import annotations

import dataclasses
import json
import os
import sqlite3
import threading

import gevent
import pytest
from sqlalchemy import event, exc, pool, text

from dbsession import SessionManager, session_scope, snapshot
from dbsession.core.pool.stats import BOUNDS_S, Histogram, quantile
from dbsession.core.snapshot import database_snapshot
from support.processes import run_python, run_script
from support.waiting import wait_until


@pytest.fixture
def managed(tmp_path):
    """Makes managers of one SQLite database each; `managed(name, **entry)`."""
    managers = []

    def make(name="default", **entry):
        options = {"pool_size": 2, "pool_timeout": 0.01, **entry.pop("options", {})}
        databases = {name: {"url": f"sqlite:///{tmp_path}/{name}.db", "options": options, **entry}}
        managers.append(SessionManager(databases))
        return managers[-1]

    yield make
    for manager in managers:
        manager.clear()
        manager.dispose()


def database(name="default"):
    (found,) = [each for each in snapshot().databases if each.name == name]
    return found


def counts(name="default"):
    found = database(name)
    return {count: getattr(found, count) for count in ("checkouts", "connects", "invalidated", "timeouts", "retries")}


def test_counts_are_exact_after_a_known_sequence(managed):
    manager = managed("counted")
    engine = manager.engine("counted")
    assert dataclasses.asdict(database("counted")) | {"waits": 0, "holds": 0} == {
        **{"name": "counted", "backend": "sqlite", "size": 2, "limit": 2, "in_use": 0, "idle": 0, "waiting": 0},
        **{"checkouts": 0, "connects": 0, "invalidated": 0, "timeouts": 0, "kills": 0, "teardown_failures": 0},
        **{"retries": 0, "waits": 0, "holds": 0},
    }
    for _ in range(3):
        with engine.connect() as connection:
            connection.execute(text("SELECT 1"))
    with engine.connect() as connection:
        connection.invalidate()
    first, second = engine.connect(), engine.connect()
    for _ in range(2):
        with pytest.raises(exc.TimeoutError):
            engine.connect()
    assert (database("counted").in_use, database("counted").idle) == (2, 0)
    first.close()
    assert (database("counted").in_use, database("counted").idle) == (1, 1)
    second.close()
    expected = {"checkouts": 6, "connects": 3, "invalidated": 1, "timeouts": 2, "retries": 0}
    assert counts("counted") == expected
    found = database("counted")
    assert sum(found.holds.counts) == 6 and sum(found.waits.counts) == 6 + 2
    assert found.holds.bounds_s == BOUNDS_S and len(found.holds.counts) == len(BOUNDS_S) + 1
    assert found.waits.counts[0] == 6 and found.waits.sum_s >= 0.02


def test_teardown_failures_and_retries_are_counted(managed, caplog):
    manager = managed("failing")
    with manager.scope():
        session = manager.get("failing")()
        session.execute(text("SELECT 1"))

        def close():
            raise OSError

        session.close = close
    attempts = []

    def work(session):
        attempts.append(1)
        if len(attempts) < 3:
            error = sqlite3.OperationalError("database is locked")
            error.sqlite_errorcode = sqlite3.SQLITE_BUSY
            raise exc.OperationalError("SELECT 1", None, error)

    manager.run_in_transaction(work, name="failing", backoff_s=0.001)
    assert database("failing").teardown_failures == 1
    assert (len(attempts), database("failing").retries) == (3, 2)


def test_scopes_have_their_sessions_and_holders_are_the_oldest_first(managed):
    manager, audit = managed("snap"), managed("snap_audit")
    before = snapshot()
    with manager.scope("outer"):
        manager.get("snap").execute(text("SELECT 1"))
        with manager.scope("inner"):
            manager.get("snap").execute(text("SELECT 'secret', :p"), {"p": "parameter"})
            audit.get("snap_audit")()
            found = snapshot()
        assert not before.holders
        for each in (before, found):  # those of other tests may go at any time
            assert {"snap", "snap_audit"} <= {database.name for database in each.databases}
    mine = [scope for scope in found.scopes if scope.label in ("outer", "inner")]
    assert [(scope.label, scope.kind) for scope in mine] == [("outer", "block"), ("inner", "block")]
    assert mine[0].age_s >= mine[1].age_s >= 0
    sessions = [(session.database, session.in_transaction) for session in mine[1].sessions]
    assert sorted(sessions) == [("snap", True), ("snap_audit", False)]
    assert [holder.scope for holder in found.holders] == ["outer", "inner"]
    assert found.holders[0].held_s >= found.holders[1].held_s
    written = json.dumps(found.as_dict())
    assert "secret" not in written and "parameter" not in written and str(os.getpid()) in written
    assert json.loads(written)["version"] == 1
    assert [row["scope"] for row in json.loads(written)["holders"]] == ["outer", "inner"]
    for part in (found, found.databases[0], found.holders[0], found.scopes[0], found.databases[0].waits):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, dataclasses.fields(part)[0].name, None)
    assert not any(scope.label in ("outer", "inner") for scope in snapshot().scopes)


def test_databases_are_those_that_are_configured_and_those_still_in_use(tmp_path):
    run_python(
        """
        import sys, dbsession
        def configure(name):
            dbsession.configure({name: f"sqlite:///{sys.argv[1]}/{name}.db"})
        def names():
            return [found.name for found in dbsession.snapshot().databases]
        configure("one")
        one = dbsession.get_engine("one")
        held = one.connect()
        configure("two")
        assert names() == ["one", "two"]
        assert [holder.database for holder in dbsession.snapshot().holders] == ["one"]
        assert dbsession.snapshot().databases[0].in_use == 1  # though its pool is another one by now
        held.close()
        assert names() == ["two"] and not dbsession.snapshot().holders
        """,
        tmp_path,
    )


@pytest.mark.parametrize(
    "poolclass, size, limit, in_use, idle",
    [(None, 2, 2, 1, 1), (pool.QueuePool, 2, None, 1, 1), (pool.NullPool, None, None, 1, 0)],
)
def test_pool_of_the_users_own_class_is_told_as_far_as_it_tells(tmp_path, poolclass, size, limit, in_use, idle):
    options = {"poolclass": poolclass} if poolclass else {}
    options |= {"pool_size": 2} if poolclass is not pool.NullPool else {}
    manager = SessionManager({f"own {poolclass}": {"url": f"sqlite:///{tmp_path}/a.db", "options": options}})
    engine = manager.engine(f"own {poolclass}")
    first, second = engine.connect(), engine.connect()
    second.close()
    found = database(f"own {poolclass}")
    assert (found.size, found.limit, found.in_use, found.idle) == (size, limit, in_use, idle)
    assert found.checkouts == 2 and sum(found.holds.counts) == 1
    first.close()
    manager.dispose()


def test_unlimited_pool_has_no_limit(managed):
    manager = managed("endless", options={"max_overflow": -1})
    manager.engine("endless")
    assert (database("endless").size, database("endless").limit) == (2, None)
    json.dumps(snapshot().as_dict())


def test_snapshot_may_be_taken_in_the_hub(managed):
    """Where nothing may wait."""
    manager = managed("hub")
    with manager.scope("in a request"):
        manager.get("hub").execute(text("SELECT 1"))
        taken = []
        gevent.get_hub().loop.run_callback(lambda: taken.append(snapshot()))
        gevent.sleep(0)
    assert [holder.scope for holder in taken[0].holders] == ["in a request"]


def test_main_thread_and_native_threads_have_names_people_know(mode, tmp_path):
    run_script(
        mode,
        """
        import sys, gevent
        from sqlalchemy import text
        dbsession.configure({"default": f"sqlite:///{sys.argv[1]}/a.db"})
        session = dbsession.get_dbsession()
        def names():
            return [holder.greenlet for holder in dbsession.snapshot().holders]
        session.execute(text("SELECT 1"))
        assert names() == ["thread MainThread" if MODE == "threads" else "the main thread"], names()
        def job():
            with dbsession.session_scope("in a thread"):
                session.execute(text("SELECT 1"))
                return names()[-1]
        name = gevent.get_hub().threadpool.apply(job)
        assert name.startswith("a _WorkerGreenlet at "), name
        dbsession.clear_dbsession()
        """,
        tmp_path,
    )


def test_forked_child_begins_at_0_and_has_no_holder_of_the_parents(mode, tmp_path):
    run_script(
        mode,
        """
        import os, sys, traceback
        from sqlalchemy import text
        dbsession.configure({"default": f"sqlite:///{sys.argv[1]}/a.db"})
        session = dbsession.get_dbsession()
        session.execute(text("SELECT 1"))
        assert len(dbsession.snapshot().holders) == 1
        pid = os.fork()
        if pid == 0:
            try:
                taken = dbsession.snapshot()
                assert taken.pid == os.getpid() and not taken.holders, taken
                (found,) = taken.databases
                assert (found.checkouts, found.connects, found.in_use, found.idle) == (0, 0, 0, 0), found
                assert not sum(found.waits.counts) and not sum(found.holds.counts), found
                assert not taken.scopes, taken.scopes
                session.execute(text("SELECT 1"))
                (found,) = dbsession.snapshot().databases
                assert (found.checkouts, found.connects, found.in_use) == (1, 1, 1), found
                (scope,) = dbsession.snapshot().scopes
                dbsession.clear_dbsession()
                assert sum(dbsession.snapshot().databases[0].holds.counts) == 1
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
        assert not os.waitpid(pid, 0)[1]
        (found,) = dbsession.snapshot().databases
        assert (found.checkouts, found.connects, found.in_use) == (1, 1, 1)
        assert len(dbsession.snapshot().holders) == 1, dbsession.snapshot().holders
        """,
        tmp_path,
    )


@pytest.mark.slow
def test_snapshots_are_whole_while_threads_change_everything(tmp_path):
    """Engines, connections, sessions and scopes come and go in four threads while two others look."""
    run_python(
        """
        import gc, json, sys, threading, time
        sys.setswitchinterval(1e-6)
        from sqlalchemy import text
        from dbsession import SessionManager, snapshot
        from dbsession.core.pool import leaks
        leaks._LONGEST_S = leaks._SHORTEST_S = 1e-5
        errors, over, seen = [], threading.Event(), []
        url = {"url": f"sqlite:///{sys.argv[1]}/a.db", "options": {"pool_size": 3}, "leak_after_s": 1000}
        shared = SessionManager({"shared": url})
        def guarded(work):
            def run():
                try:
                    while not over.is_set():
                        work()
                except BaseException as error:
                    errors.append(error)
                    over.set()
            return run
        rounds = [0]
        def use():
            with shared.scope("job"):
                shared.get("shared").execute(text("SELECT 1"))
                if rounds[0] % 7 == 0:
                    shared.get("shared")().invalidate()
            rounds[0] += 1
        def build():
            manager = SessionManager({"own": url})
            with manager.scope("own job"):
                manager.get("own").execute(text("SELECT 1"))
            manager.dispose()
            del manager
            gc.collect(0)
        def look():
            taken = snapshot()
            json.dumps(taken.as_dict())
            for found in taken.databases:
                assert 0 <= found.in_use and 0 <= found.idle and min(found.waits.counts) >= 0, found
            seen.append(len(taken.databases))
        threads = [threading.Thread(target=guarded(work)) for work in (use, use, build, build, look, look)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 20
        while not over.is_set() and len(seen) < 400 and time.monotonic() < deadline:
            over.wait(0.01)
        over.set()
        for thread in threads:
            thread.join(20)
        if errors:
            raise errors[0]
        (found,) = [each for each in snapshot().databases if each.name == "shared"]
        assert found.checkouts == sum(found.holds.counts) == sum(found.waits.counts) - found.timeouts, found
        assert found.in_use == 0 and not snapshot().holders and len(seen) > 10
        """,
        tmp_path,
    )


def test_histogram_takes_bounds_in_the_lower_bucket_and_the_rest_in_the_last():
    histogram, told = Histogram(), []
    histogram.tell = told.append
    for value in (0.0, 0.001, 0.0011, 300.0, 301.0, 1e9):
        histogram.add(value)
    assert (histogram.counts[0], histogram.counts[1], histogram.counts[-2], histogram.counts[-1]) == (2, 1, 1, 2)
    assert histogram.sum_s == sum(told) == pytest.approx(1e9 + 601.0021)


def test_quantile_lies_in_its_bucket():
    none = [0] * (len(BOUNDS_S) + 1)
    assert quantile(none, 0.5) is None
    for index, bound in enumerate(BOUNDS_S):
        only = [*none]
        only[index] = 10
        below = BOUNDS_S[index - 1] if index else 0.0
        assert below <= quantile(only, 0.0) <= quantile(only, 0.5) < quantile(only, 1.0) == bound
    assert quantile([*none[:-1], 3], 0.5) == BOUNDS_S[-1]
    assert quantile([1, *none[1:-1], 1], 0.99) == BOUNDS_S[-1]


def test_waiting_callers_are_counted(managed):
    manager = managed("waited", options={"pool_size": 1, "pool_timeout": 30})
    held = manager.engine("waited").connect()
    thread = threading.Thread(target=lambda: manager.engine("waited").connect().close())
    thread.start()
    wait_until(lambda: database("waited").waiting == 1)
    held.close()
    thread.join(20)
    found = database("waited")
    assert (found.waiting, found.timeouts, found.checkouts) == (0, 0, 2)
    assert sum(found.waits.counts) == 2


def test_waits_have_every_checkout_when_those_who_waited_before_could_not_connect(tmp_path):
    """An outage: each waits for the turn to open a connection, in vain. Counted as checkouts that waited, they would
    hide as many that come later."""
    manager = SessionManager({"default": {"url": f"sqlite:///{tmp_path}/a.db", "options": {"pool_size": 1}}})
    session, engine = manager.get(), manager.engine()
    down = True

    @event.listens_for(engine, "do_connect")
    def connect(*_):
        if down:
            gevent.sleep(0)  # the others line up meanwhile
            raise OSError("down")

    def work():
        with session_scope():
            session.execute(text("SELECT 1"))

    greenlets = [gevent.spawn(work) for _ in range(10)]
    assert len(gevent.joinall(greenlets, timeout=10)) == 10
    assert {type(greenlet.exception) for greenlet in greenlets} == {OSError}
    down = False
    for _ in range(3):
        work()
    database = database_snapshot(manager.database("default"))
    assert (database.checkouts, sum(database.waits.counts)) == (3, 9 + 3)
    manager.dispose()
