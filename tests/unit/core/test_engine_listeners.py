"""on_engine_created: each engine once, of every manager, whatever the function does."""

from __future__ import annotations

import logging
import os
import threading

import gevent
import pytest
from sqlalchemy import event, text

import dbsession
from dbsession import SessionManager
from dbsession.core import engine as created
from support.processes import run_python


@pytest.fixture(autouse=True)
def no_other_listeners(monkeypatch):
    monkeypatch.setattr(created, "listeners", [])


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path}/a.db"


class Told(list):
    """The calls that it got, as far as they are of these tests' engines."""

    def __init__(self, url):
        super().__init__()
        self.url = url

    def __call__(self, name, engine):
        if str(engine.url) == self.url:
            self.append((name, engine))


def test_function_is_called_with_each_engine_when_it_is_built(url):
    told = Told(url)
    assert dbsession.on_engine_created(told) is told
    first = SessionManager({"default": url, "audit": url})
    assert told == [("default", first.engine()), ("audit", first.engine("audit"))]
    second = SessionManager(lambda name: url)
    assert len(told) == 2
    second.get("reports")
    second.engine("reports")
    assert told[2:] == [("reports", second.engine("reports"))]
    first.configure({"default": url})
    assert told[3:] == [("default", first.engine())]


def test_function_is_called_at_once_with_engines_there_are(url):
    manager, told = SessionManager({"default": url}), Told(url)
    replaced = manager.engine()
    manager.configure({"default": url, "audit": url})
    dbsession.on_engine_created(told)
    dbsession.on_engine_created(told)
    assert sorted(name for name, _ in told) == ["audit", "default"]
    assert replaced not in dict(told).values()


def test_function_may_be_a_decorated_one_and_a_bound_method(url):
    class Both:
        def __init__(self):
            self.names = []

        def heard(self, name, engine):
            self.names.append(name)

    both, names = Both(), []
    dbsession.on_engine_created(both.heard)

    @dbsession.on_engine_created
    def heard(name, engine):
        names.append(name)

    with pytest.raises(dbsession.ConfigError):
        SessionManager({"good": url, "bad": {"url": url, "options": {"pool_size": "many", "no_such": 1}}})
    SessionManager({"other": url})
    assert both.names[-1] == names[-1] == "other"


def test_function_that_fails_is_named_and_the_engine_used(url, caplog):
    told = Told(url)

    def broken(name, engine):
        raise ValueError("secret")

    dbsession.on_engine_created(broken)
    dbsession.on_engine_created(told)
    with caplog.at_level(logging.WARNING, "dbsession.created"):
        manager = SessionManager({"unlucky": url})
    (message,) = [each for each in caplog.messages if "'unlucky'" in each]
    assert "on_engine_created function test_function_that_fails_is_named_and_the_engine_used.<locals>.broken" in message
    assert "failed with ValueError at " in message and f"{os.path.basename(__file__)}:" in message
    assert "secret" not in message
    assert len(told) == 1
    with manager.scope():
        assert manager.get("unlucky")().scalar(text("SELECT 1")) == 1
    manager.dispose()


def test_function_that_is_killed_builds_nothing(url):
    def killed(name, engine):
        if name == "killed":
            raise gevent.GreenletExit

    dbsession.on_engine_created(killed)
    with pytest.raises(gevent.GreenletExit):
        SessionManager({"killed": url})


def test_function_is_called_after_our_own_listeners(url):
    """What it listens to comes after ours: a connection is noted as in use when its `checkout` listener runs."""
    in_use = []

    @dbsession.on_engine_created
    def listen(name, engine):
        event.listen(engine, "checkout", lambda *_: in_use.append(len(database.held.notes())))

    manager = SessionManager({"default": url})
    database = manager.database("default")
    with manager.engine().connect():
        pass
    assert in_use == [1]
    manager.dispose()


def test_function_is_called_once_when_threads_build_and_register_at_once(url):
    for _ in range(50):
        told, manager, barrier = Told(url), SessionManager(lambda name: url), threading.Barrier(2)

        def build(manager=manager, barrier=barrier):
            barrier.wait()
            manager.engine()

        thread = threading.Thread(target=build)
        thread.start()
        barrier.wait()
        dbsession.on_engine_created(told)
        thread.join()
        assert [each for each in told if each[1] is manager.engine()] == [("default", manager.engine())]
        created.listeners.clear()
        manager.dispose()


def test_function_is_not_called_again_in_a_forked_child(url):
    told = Told(url)
    dbsession.on_engine_created(told)
    manager = SessionManager({"default": url})
    pid = os.fork()
    if pid == 0:
        try:
            manager.engine()
            dbsession.on_engine_created(told)
            os._exit(0 if len(told) == 1 else 1)
        finally:
            os._exit(2)
    assert os.waitpid(pid, 0)[1] == 0


def test_engine_of_either_half_is_told_at_once_whichever_half_is_asked(tmp_path):
    run_python(
        """
        import asyncio
        import sys
        import dbsession
        from dbsession import aio

        dbsession.configure({"default": "sqlite:///" + sys.argv[1]})
        dbsession.get_engine()

        async def main():
            aio.get_engine()
            for ask in (dbsession.on_engine_created, aio.on_engine_created):
                seen = []
                ask(lambda name, engine: seen.append(engine.dialect.driver))
                assert sorted(seen) == ["aiosqlite", "pysqlite"], seen

        asyncio.run(main())
        """,
        str(tmp_path / "a.db"),
    )
