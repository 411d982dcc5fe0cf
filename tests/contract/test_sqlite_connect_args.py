"""SQLite with the connect_args that SQLAlchemy and sqlite3 document, in both halves."""

from __future__ import annotations

import sqlite3
import sys

import pytest
from sqlalchemy import text

import dbsession.green.sqlite
from dbsession.errors import ConfigError
from dbsession.watch.check.probe import gather
from support.halves import HALVES, done, on_both_halves
from support.processes import run_python


class AlwaysInTransaction(dbsession.green.sqlite.Connection):
    """What autocommit=False makes of a connection from Python 3.12 on: a transaction is open at all times."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.execute("BEGIN")

    def commit(self):
        super().commit()
        self.execute("BEGIN")

    def rollback(self):
        super().rollback()
        self.execute("BEGIN")


NEW = sys.version_info >= (3, 12)
ALWAYS = {"autocommit": False} if NEW else {"factory": AlwaysInTransaction}

CONNECT_ARGS = {
    "always in a transaction": ALWAYS,
    "always in one, and isolation_level": {**ALWAYS, "isolation_level": "IMMEDIATE"},
    "IMMEDIATE": {"isolation_level": "IMMEDIATE"},
    "EXCLUSIVE": {"isolation_level": "EXCLUSIVE"},
    "check_same_thread": {"check_same_thread": False},
    "detect_types": {"detect_types": sqlite3.PARSE_DECLTYPES},
    "cached_statements": {"cached_statements": 0},
}
if NEW:
    CONNECT_ARGS["as before 3.12"] = {"autocommit": sqlite3.LEGACY_TRANSACTION_CONTROL}
BY_STATEMENT = {"isolation_level None": {"isolation_level": None}}
if NEW:
    BY_STATEMENT["autocommit True"] = {"autocommit": True}


@pytest.fixture(params=HALVES)
def half(request):
    return HALVES[request.param]


async def ids(manager):
    return (await done(manager.get().scalars(text("SELECT id FROM item ORDER BY id")))).all()


@pytest.mark.parametrize("uri", [False, True])
@pytest.mark.parametrize("arguments", CONNECT_ARGS)
@on_both_halves
async def test_f39_new_file_is_opened_and_its_transactions_hold(half, tmp_path, arguments, uri):
    url = f"sqlite:///file:{tmp_path}/a.db?uri=true" if uri else f"sqlite:///{tmp_path}/a.db"
    entry = {"url": url, "options": {"connect_args": CONNECT_ARGS[arguments]}}
    manager, other = half.verbs.SessionManager({"default": entry}), half.verbs.SessionManager({"default": entry})
    session = manager.get()
    await done(session.execute(text("CREATE TABLE item (id INTEGER PRIMARY KEY)")))
    await done(session.commit())
    assert (await done(session.execute(text("PRAGMA journal_mode")))).scalar() == "wal"
    await done(session.rollback())
    for id, end in ((1, session.commit), (2, session.rollback), (3, manager.clear), (4, session.commit)):
        await done(session.execute(text("INSERT INTO item VALUES (:id)"), {"id": id}))
        assert id not in await ids(other)
        await done(other.clear())
        await done(end())
    assert await ids(manager) == await ids(other) == [1, 4]
    for each in (manager, other):
        await done(each.clear())
        await done(each.dispose())


@pytest.mark.parametrize("query", ["mode=ro&", "immutable=1&"])
@pytest.mark.parametrize("journal", ["DELETE", "WAL"])
@pytest.mark.parametrize("arguments", [*CONNECT_ARGS, *BY_STATEMENT])
@on_both_halves
async def test_f39_file_that_may_only_be_read_is_opened(half, tmp_path, arguments, journal, query):
    with sqlite3.connect(tmp_path / "a.db") as made:
        made.execute(f"PRAGMA journal_mode={journal}")
        made.execute("CREATE TABLE item (id INTEGER PRIMARY KEY)")
        made.execute("INSERT INTO item VALUES (1)")
    made.close()
    options = {"connect_args": {**CONNECT_ARGS, **BY_STATEMENT}[arguments]}
    manager = half.verbs.SessionManager(
        {"default": {"url": f"sqlite:///file:{tmp_path}/a.db?{query}uri=true", "options": options}}
    )
    assert await ids(manager) == [1]
    await done(manager.clear())
    assert await ids(manager) == [1]
    await done(manager.clear())
    await done(manager.dispose())


@pytest.mark.parametrize("arguments", BY_STATEMENT)
@on_both_halves
async def test_f39_each_statement_is_a_transaction_where_the_driver_was_told_so(half, tmp_path, arguments):
    entry = {"url": f"sqlite:///{tmp_path}/a.db", "options": {"connect_args": BY_STATEMENT[arguments]}}
    manager = half.verbs.SessionManager({"default": entry})
    await done(manager.get().execute(text("CREATE TABLE item (id INTEGER PRIMARY KEY)")))
    await done(manager.get().execute(text("INSERT INTO item VALUES (1)")))
    await done(manager.get().rollback())
    assert await ids(manager) == [1]
    await done(manager.clear())
    await done(manager.dispose())


@on_both_halves
async def test_f39_readonly_database_that_is_always_in_a_transaction_is_refused(half, tmp_path):
    entry = {"url": f"sqlite:///{tmp_path}/a.db", "readonly": True, "options": {"connect_args": {"autocommit": False}}}
    with pytest.raises(ConfigError, match="`autocommit` False"):
        half.verbs.SessionManager({"default": entry})


def test_f39_check_tells_of_a_file_that_is_always_in_a_transaction(tmp_path):
    entry = {"url": f"sqlite:///{tmp_path}/a.db", "options": {"connect_args": ALWAYS}}
    manager = dbsession.SessionManager({"default": entry})
    facts = gather("default", manager.engine())
    assert facts.error is None and facts.file.writable and facts.file.journal_mode == "wal"
    manager.dispose()


EVENTLET = """
    import sys, types

    patched = set()
    patcher = types.ModuleType("eventlet.patcher")
    patcher.is_monkey_patched = lambda name: name in patched
    sys.modules["eventlet.patcher"] = patcher
    if sys.argv[1] == "before":
        patched.add("select")
        import select
        del select.poll
    import dbsession
    from dbsession.errors import ConfigError
    from sqlalchemy import text

    def refused(work):
        try:
            work()
        except ConfigError as error:
            assert "eventlet" in str(error) and "gevent" in str(error), error
        else:
            raise AssertionError("not refused")

    if sys.argv[1] == "before":
        refused(lambda: dbsession.configure)
        refused(lambda: dbsession.DBSessionMiddleware)
        sys.exit()
    dbsession.configure({"default": f"sqlite:///{sys.argv[2]}/a.db"})
    patched.add("socket")
    refused(lambda: dbsession.get_dbsession().execute(text("SELECT 1")))
    refused(lambda: dbsession.SessionManager({"default": f"sqlite:///{sys.argv[2]}/a.db"}))
    patched.clear()
    assert dbsession.get_dbsession().scalar(text("SELECT 1")) == 1
    dbsession.clear_dbsession()
    dbsession.dispose()
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_f39_process_that_eventlet_has_patched_is_told_so(when, tmp_path):
    run_python(EVENTLET, when, tmp_path)
