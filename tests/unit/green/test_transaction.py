"""run_in_transaction and transactional, on SQLite; tests/faults has the deadlocks of a real server."""

from __future__ import annotations

import sqlite3

import gevent
import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import OperationalError

from dbsession import ConfigError, RollbackRequired, SessionManager, UnsavedWork
from dbsession.green import scope


@pytest.fixture
def manager(tmp_path):
    manager = SessionManager({name: f"sqlite:///{tmp_path}/{name}.db" for name in ("default", "other")})
    for name in ("default", "other"):
        with manager.engine(name).begin() as connection:
            connection.execute(text("CREATE TABLE t (n INT)"))
    yield manager
    manager.clear()
    manager.dispose()


def insert(manager, n, name="default"):
    manager.get(name).execute(text("INSERT INTO t VALUES (:n)"), {"n": n})


def rows(manager, name="default"):
    with manager.engine(name).connect() as connection:
        return sorted(connection.scalars(text("SELECT n FROM t")))


def busy():
    error = sqlite3.OperationalError("database is locked")
    error.sqlite_errorcode = sqlite3.SQLITE_BUSY
    return OperationalError(None, None, error)


def test_it_commits_in_a_scope_of_its_own_and_returns_what_fn_returned(manager):
    outer = manager.get()()

    def work():
        assert scope.current().label == "import of orders"
        assert manager.get()() is not outer
        insert(manager, 1)
        return "done"

    assert manager.run_in_transaction(work, label="import of orders") == "done"
    assert rows(manager) == [1] and manager.get()() is outer


def test_fn_that_takes_an_argument_gets_the_session(manager):
    assert manager.run_in_transaction(lambda session: session is manager.get("other"), name="other")
    assert manager.run_in_transaction(lambda *all_of_them: all_of_them) == ()
    assert manager.run_in_transaction(dict) == {}


def test_error_rolls_back_and_is_not_tried_again(manager):
    calls = []

    def work():
        calls.append(1)
        insert(manager, 1)
        raise KeyError("mine")

    with pytest.raises(KeyError):
        manager.run_in_transaction(work)
    assert calls == [1] and rows(manager) == []


def test_retryable_error_runs_the_whole_again_with_a_fresh_session(manager):
    seen = []

    def work():
        seen.append(manager.get()())
        insert(manager, len(seen))
        if len(seen) < 3:
            raise busy()

    manager.run_in_transaction(work, backoff_s=0.001)
    assert len(set(map(id, seen))) == 3 and rows(manager) == [3]


def test_last_attempt_raises_its_error(manager):
    calls = []

    def work():
        calls.append(1)
        raise busy()

    with pytest.raises(OperationalError):
        manager.run_in_transaction(work, attempts=2, backoff_s=0.001)
    assert len(calls) == 2


def test_kill_in_the_pause_ends_it(manager):
    calls = []

    def work():
        calls.append(1)
        raise busy()

    victim = gevent.spawn(manager.run_in_transaction, work, backoff_s=2.0, attempts=1000)
    while not calls:
        gevent.sleep(0)
    victim.kill(timeout=5)
    assert isinstance(victim.value, gevent.GreenletExit)


def test_nested_use_joins_and_commits_once_at_the_end(manager):
    commits = []
    event.listen(manager.engine(), "commit", commits.append)

    @manager.transactional
    def inner(n):
        insert(manager, n)
        return scope.current()

    @manager.transactional(name="default", attempts=2)
    def outer():
        insert(manager, 1)
        assert inner(2) is scope.current()
        assert commits == []

    outer()
    assert rows(manager) == [1, 2] and len(commits) == 1


def test_nested_use_on_another_database_is_a_unit_of_its_own(manager):
    def outer():
        insert(manager, 1)
        manager.run_in_transaction(lambda: insert(manager, 2, "other"), name="other")
        raise KeyError

    with pytest.raises(KeyError):
        manager.run_in_transaction(outer)
    assert (rows(manager), rows(manager, "other")) == ([], [2])


def test_part_that_failed_and_was_caught_refuses_the_whole(manager):
    def part():
        insert(manager, 2)
        raise KeyError

    def whole():
        insert(manager, 1)
        try:
            manager.run_in_transaction(part)
        except KeyError:
            pass

    with pytest.raises(RollbackRequired, match=r"KeyError.*\[DBS-ROLLBACK\]$"):
        manager.run_in_transaction(whole)
    assert rows(manager) == []


def test_unsaved_work_on_another_database_is_not_lost_in_silence(manager):
    def work():
        insert(manager, 1)
        insert(manager, 2, "other")

    with pytest.raises(UnsavedWork, match="'other'"):
        manager.run_in_transaction(work)
    assert (rows(manager), rows(manager, "other")) == ([], [])


@pytest.mark.parametrize(
    "options",
    [{"attempts": 0}, {"attempts": "3"}, {"attempts": True}, {"backoff_s": -1}, {"backoff_s": float("nan")}],
)
def test_bad_arguments_are_said_before_anything_runs(manager, options):
    with pytest.raises(ConfigError):
        manager.run_in_transaction(pytest.fail, **options)
    with pytest.raises(ConfigError):
        manager.transactional(**options)(lambda: None)


def test_decorator_refuses_what_runs_after_its_call(manager):
    def generator():
        yield

    with pytest.raises(TypeError, match="generator"):
        manager.transactional(generator)
    with pytest.raises(TypeError, match="keyword"):
        manager.transactional("reports")


def test_outcome_is_readable_on_the_scope(manager):
    with manager.scope() as unit:
        assert unit.outcome is None
        insert(manager, 1)
        manager.get().commit()
        assert unit.outcome == "committed"
        manager.get().execute(text("SELECT 1"))
        manager.get().rollback()  # it wrote nothing, so this says nothing of the work
        assert unit.outcome == "committed"
        insert(manager, 2)
    assert unit.outcome == "rolled back"
    with manager.scope() as unit:
        insert(manager, 3)
        with manager.get().begin_nested():
            insert(manager, 4)
        assert unit.outcome is None
    assert unit.outcome == "rolled back" and rows(manager) == [1]
