"""interceptors: the dialect's methods are replaced in one place, in a written order, and keep their parameters."""

from __future__ import annotations

import inspect
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from sqlalchemy import create_engine, event, text
from sqlalchemy.engine.default import DefaultDialect

import dbsession
from dbsession import SessionManager
from dbsession.aio.connections import LoopConnections
from dbsession.core import interceptors
from dbsession.core.entries import parse
from dbsession.green.connections import GreenConnections

URLS = {
    GreenConnections: ("mysql+pymysql://u@h/d", "sqlite:///a.db", "postgresql+psycopg2://u@h/d"),
    LoopConnections: ("mysql+asyncmy://u@h/d", "sqlite+aiosqlite:///a.db", "postgresql+asyncpg://u@h/d"),
}
METHODS = [name for name in interceptors.REPLACED if name != "execution_ctx_cls"]


def layers_of(connections_class, url):
    connections = connections_class(parse("a", url))
    outcome = interceptors.TransactionWatch(connections.backend)
    return interceptors.StatementNotes, outcome, connections.backend, connections


def _put_in(name, layer, inner):
    """What install() makes of a layer's `executing` in place of the method."""
    engine = create_engine("sqlite://")
    setattr(engine.dialect, name, inner)
    interceptors.install(engine, [SimpleNamespace(executing=layer.executing)])
    return getattr(engine.dialect, name)


@pytest.mark.parametrize(
    ("connections_class", "url"), [(each, url) for each, urls in URLS.items() for url in urls], ids=str
)
def test_replaced_method_keeps_the_parameters_of_the_original(connections_class, url):
    for layer in layers_of(connections_class, url):
        for name in METHODS:
            around = getattr(layer, f"around_{name}", None)
            if around is None and name in interceptors.STATEMENTS and hasattr(layer, "executing"):
                around = partial(_put_in, name, layer)
            if around is None:
                continue
            original = list(inspect.signature(getattr(DefaultDialect, name)).parameters.values())[1:]
            replaced = inspect.signature(around(lambda *a, **k: None)).parameters.values()
            if [each.name for each in replaced] == ["a", "k"]:
                continue  # this layer has nothing to do with it here
            assert [(each.name, each.kind, each.default) for each in replaced] == [
                (each.name, each.kind, each.default) for each in original
            ], name


def test_sqlalchemys_retry_recipe_works(tmp_path):
    """It calls the dialect's method from a `do_execute` listener, with `context` by keyword."""
    manager = SessionManager({"default": f"sqlite:///{tmp_path}/a.db"})
    engine = manager.engine()
    calls = []

    @event.listens_for(engine, "do_execute")
    def retried(cursor, statement, parameters, context):
        calls.append(statement)
        engine.dialect.do_execute(cursor, statement, parameters, context=context)
        return True

    with manager.scope():
        assert manager.get().scalar(text("SELECT :n"), {"n": 7}) == 7
    assert calls == ["SELECT ?"]
    manager.dispose()


def test_do_execute_without_a_context_is_passed_on(tmp_path):
    manager = SessionManager({"default": f"sqlite:///{tmp_path}/a.db"})
    engine = manager.engine()
    with engine.connect() as connection:
        cursor = connection.connection.cursor()
        engine.dialect.do_execute(cursor, "SELECT ?", (3,))
        assert cursor.fetchone() == (3,)
        engine.dialect.do_execute_no_params(cursor, "SELECT 4")
        assert cursor.fetchone() == (4,)
        engine.dialect.do_execute_no_params(cursor, "CREATE TABLE t (n INTEGER)")
        engine.dialect.do_executemany(cursor, "INSERT INTO t VALUES (?)", [(1,), (2,)])
        assert cursor.rowcount == 2
        cursor.close()
    manager.dispose()


def test_layers_are_called_from_the_last_to_the_first_and_events_from_the_first_to_the_last():
    seen = []

    class Layer:
        def __init__(self, name):
            self.name = name

        def around_do_ping(self, inner):
            def do_ping(dbapi_connection):
                seen.append(self.name)
                return inner(dbapi_connection)

            return do_ping

        def on_do_execute_no_params(self, cursor, statement, context):
            seen.append(f"event {self.name}")

        def on_connect_first(self, connection, record):
            seen.append(f"first {self.name}")

        def on_connect(self, connection, record):
            seen.append(f"connect {self.name}")

    engine = create_engine("sqlite://")
    interceptors.install(engine, [Layer("inner"), Layer("outer")])
    with engine.connect() as connection:
        connection.execution_options(no_parameters=True).exec_driver_sql("SELECT 1")
        assert engine.dialect.do_ping(connection.connection.dbapi_connection)
    assert sorted(seen[:2]) == ["first inner", "first outer"]
    assert seen[2:] == ["connect inner", "connect outer", "event inner", "event outer", "outer", "inner"]
    engine.dispose()


def test_dialects_are_rewired_nowhere_else():
    """Not by assignment, not by setattr(); and no event of an engine is listened to elsewhere than in interceptors and
    in what follows another pool than ours."""
    package = Path(dbsession.__file__).parent
    assigned = re.compile(rf"\bdialect\.({'|'.join(interceptors.REPLACED)})\s*=|setattr\((\w+\.)?dialect\b")
    listened = re.compile(r"event\.listen\(engine")
    found = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if assigned.search(path.read_text()) or listened.search(path.read_text())
    }
    assert found == {"core/interceptors.py", "core/pool/holders.py", "green/connections.py"}
