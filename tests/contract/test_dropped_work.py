"""Work that a unit of work drops without an error is said, once a minute and database; what is meant is not."""

from __future__ import annotations

import asyncio
import logging
import threading

import flask
import gevent
import greenlet
import pytest
from sqlalchemy import exc, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

import dbsession.flask
from dbsession import aio
from dbsession.core import unsaved
from support.halves import HALVES, done, entered, on_both_halves
from support.processes import run_python
from support.waiting import wait_until


class Base(DeclarativeBase):
    pass


class Item(Base):
    __tablename__ = "item"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(default="none")


@pytest.fixture(params=HALVES)
def half(request):
    return HALVES[request.param]


def make(half, tmp_path):
    manager = half.verbs.SessionManager({name: f"sqlite:///{tmp_path}/{name}.db" for name in ("default", "other")})

    async def prepare():
        for name in ("default", "other"):
            await done(
                manager.get(name).execute(text("CREATE TABLE IF NOT EXISTS item (id INTEGER PRIMARY KEY, name TEXT)"))
            )
            await done(manager.get(name).execute(text("INSERT INTO item VALUES (1, 'one')")))
            await done(manager.get(name).commit())

    half.run(prepare)
    return manager


@pytest.fixture
def manager(half, tmp_path):
    manager = make(half, tmp_path)
    yield manager

    async def dispose():
        await done(manager.dispose())

    half.run(dispose)


@pytest.fixture
def said(caplog, monkeypatch):
    """The lines so far; a minute is over after each look."""
    monkeypatch.setattr(unsaved, "_next", {})
    caplog.set_level(logging.WARNING)

    def lines():
        unsaved._next.clear()
        found = [record.getMessage() for record in caplog.records if record.name == "dbsession.unsaved"]
        caplog.clear()
        return found

    return lines


async def new(session):
    session.add(Item(name="a secret"))


async def dirty(session):
    (await done(session.get(Item, 1))).name = "a secret"


async def deleted(session):
    await done(session.delete(await done(session.get(Item, 1))))


async def flushed(session):
    await new(session)
    await done(session.flush())


async def written(session):
    await done(session.execute(text("UPDATE item SET name = 'a secret' WHERE id = 12345")))


async def nested(session):
    await done(session.execute(text("BEGIN")))  # sqlite3 begins none for a savepoint
    savepoint = await done(session.begin_nested())
    await written(session)
    await done(savepoint.commit())


WORK = {
    new: "1 new object (item)",
    dirty: "1 dirty object (item)",
    deleted: "1 deleted object (item)",
    flushed: "INSERT INTO item (name) VALUES (?)",
    written: "a write sent since the last commit (UPDATE item SET name = ? WHERE id = ?)",
    nested: "UPDATE item",
}


@pytest.mark.parametrize("work", WORK)
@on_both_halves
async def test_f29_work_that_a_block_drops_is_said_with_its_scope_and_place(half, manager, said, work):
    async with entered(manager.scope("nightly import")):
        await work(manager.get())
    (line,) = said()
    assert line.startswith("Database 'default': nightly import ended without an error and dropped ")
    assert WORK[work] in line and "secret" not in line and "12345" not in line and "rollback()" in line
    if half.name == "gevent":
        assert "halves.py:" in line  # whose `with` it is
    elif work is new:  # else its connection is given back in a greenlet of SQLAlchemy's
        assert f", at {__file__}:" in line


async def committed(session, manager):
    await new(session)
    await done(session.commit())


async def rolled_back(session, manager):
    await flushed(session)
    await done(session.rollback())


async def only_read(session, manager):
    await done(session.get(Item, 1))
    await done(session.execute(text("SELECT 1")))


async def released(session, manager):
    await only_read(session, manager)
    await done(manager.release())


async def unchanged(session, manager):
    item = await done(session.get(Item, 1))
    item.name = item.name


async def expunged(session, manager):
    await new(session)
    session.expunge_all()


async def savepoint_rolled_back(session, manager):
    await only_read(session, manager)
    savepoint = await done(session.begin_nested())
    await written(session)
    await done(savepoint.rollback())


async def schema(session, manager):
    await done(session.execute(text("CREATE TABLE IF NOT EXISTS other (id INTEGER)")))


async def ended_by_text(session, manager):
    await written(session)
    await done(session.execute(text("COMMIT")))


async def autocommit(session, manager):
    await done(session.connection(execution_options={"isolation_level": "AUTOCOMMIT"}))
    await written(session)


async def begun(session, manager):
    async with entered(session.begin()):
        await new(session)


async def nothing(session, manager):
    session()


MEANT = (
    *(committed, rolled_back, only_read, released, unchanged, expunged, savepoint_rolled_back, schema, ended_by_text),
    *(autocommit, begun, nothing),
)


@pytest.mark.parametrize("work", MEANT)
@on_both_halves
async def test_f29_nothing_is_said_where_nothing_is_lost_or_it_is_meant(half, manager, said, work):
    async with entered(manager.scope()):
        await work(manager.get(), manager)
    await work(manager.get(), manager)
    await done(manager.clear())
    assert said() == []


@on_both_halves
async def test_f29_nothing_is_said_of_a_unit_of_work_that_fails(half, manager, said):
    for error in (ZeroDivisionError, GeneratorExit, gevent.GreenletExit):
        with pytest.raises(error):
            async with entered(manager.scope()):
                await flushed(manager.get())
                raise error
    for end in (manager.clear, manager.get().remove, manager.get().close):
        with pytest.raises(ZeroDivisionError):
            try:
                await flushed(manager.get())
                raise ZeroDivisionError
            finally:
                await done(end())
    assert said() == []


@on_both_halves
async def test_f29_work_is_said_however_its_session_is_closed(half, manager, said):
    for end in (manager.clear, manager.get().remove, manager.get().close):
        await flushed(manager.get())
        await done(end())
        (line,) = said()
        assert "closed its session without an error and dropped a write" in line
    if half.name == "gevent":

        @manager.scope
        def job():
            manager.get().add(Item(id=2))
    else:

        @manager.scope
        async def job():
            manager.get().add(Item(id=2))

    await done(job())
    assert "job ended without an error and dropped 1 new object (item), at " in said()[0]


@on_both_halves
async def test_f29_implicit_scope_says_it_at_the_end_of_its_greenlet_or_task_unless_that_fails(half, manager, said):
    async def job():
        await flushed(manager.get())

    async def fails():
        await flushed(manager.get())
        raise LookupError("meant")

    await half.join(half.spawn(job))
    await half.until(lambda: manager.engine().pool.checkedout() == 0)
    (line,) = said()
    assert "the rest of a " in line and "ended and dropped a write" in line
    with pytest.raises(LookupError):
        await half.join(half.spawn(fails))
    await half.until(lambda: manager.engine().pool.checkedout() == 0)
    assert said() == []


def test_f29_thread_and_raw_greenlet_say_it_and_a_killed_greenlet_does_not(tmp_path, said):
    half = HALVES["gevent"]
    manager = make(half, tmp_path)

    def job():
        manager.get().execute(text("DELETE FROM item"))

    def waits():
        job()
        gevent.sleep(60)

    thread = threading.Thread(target=job)
    thread.start()
    thread.join()
    wait_until(lambda: manager.engine().pool.checkedout() == 0, 20)
    assert len(said()) == 1
    raw = greenlet.greenlet(job)
    raw.switch()
    del raw
    wait_until(lambda: manager.engine().pool.checkedout() == 0 or gevent.sleep(0.01), 20)
    assert len(said()) == 1
    killed = gevent.spawn(waits)
    wait_until(lambda: manager.engine().pool.checkedout() == 1 or gevent.sleep(0.01), 20)
    killed.kill()
    wait_until(lambda: manager.engine().pool.checkedout() == 0 or gevent.sleep(0.01), 20)
    assert said() == []
    manager.dispose()


@on_both_halves
async def test_f29_lines_come_once_a_minute_and_database_with_the_number_between(
    half, manager, said, monkeypatch, caplog
):
    now = [1000.0]
    monkeypatch.setattr(unsaved, "monotonic", lambda: now[0])
    for name, times in (("default", 4), ("other", 2)):
        for _ in range(times):
            async with entered(manager.scope()):
                await written(manager.get(name))
    now[0] += 61
    for name in ("default", "other"):
        async with entered(manager.scope()):
            await written(manager.get(name))
    lines = said()
    assert [line.split(":")[0] for line in lines] == ["Database 'default'", "Database 'other'"] * 2
    assert "more" not in lines[0] + lines[1]
    assert lines[2].endswith(" 3 more did so since the last such line.")
    assert lines[3].endswith(" 1 more did so since the last such line.")


@on_both_halves
async def test_f29_run_in_transaction_says_nothing(half, manager, said):
    if half.name == "aio":

        async def work(session):
            await flushed(session)
    else:

        def work(session):
            session.execute(text("UPDATE item SET name = 'x'"))

    await done(manager.run_in_transaction(work))
    assert said() == []


PROGRAM = """
    import logging, os, sys
    import dbsession
    from sqlalchemy import exc, text

    logging.basicConfig(format="%(name)s: %(message)s")
    dbsession.configure({"default": f"sqlite:///{sys.argv[1]}/a.db"})
    session = dbsession.get_dbsession()
    session.execute(text("CREATE TABLE item (id INTEGER)"))
    session.execute(text("INSERT INTO item VALUES (12345)"))
    if sys.argv[2] == "commits":
        session.commit()
    elif sys.argv[2] == "raises":
        raise LookupError
    elif sys.argv[2] == "forks":
        if os.fork() == 0:
            sys.exit()
        os.wait()
        session.rollback()
"""


@pytest.mark.parametrize(
    ("ends", "lines"),
    [("drops", 1), ("raises", 0), *(pytest.param(ends, 0, marks=pytest.mark.slow) for ends in ("commits", "forks"))],
)
def test_f29_program_that_ends_without_a_commit_says_it(tmp_path, ends, lines):
    ended = run_python(PROGRAM, tmp_path, ends, status=ends == "raises")
    assert ended.stderr.count("dbsession.unsaved: Database 'default': ") == lines, ended.stderr
    assert "12345" not in ended.stderr.replace("(12345)", "", ends == "raises")


# --- requests


def wsgi(manager, status, deadline=None, body=None, fails=False):
    """The answer to a request whose application drops an UPDATE."""

    def app(environ, start_response):
        manager.get().execute(text("UPDATE item SET name = 'x'"))
        start_response(status, [])
        if fails:
            raise ZeroDivisionError
        return body or [b"answer"]

    middleware = dbsession.DBSessionMiddleware(app, deadline)
    environ = {"REQUEST_METHOD": "POST", "PATH_INFO": "/orders", "QUERY_STRING": "token=s3cret"}
    return middleware(environ, lambda status, headers, exc_info=None: lambda data: None)


@pytest.mark.parametrize("deadline", [None, 60])
def test_f29_request_says_it_unless_it_fails_or_answers_with_an_error(tmp_path, said, deadline):
    manager = make(HALVES["gevent"], tmp_path)

    def job():
        for status in ("200 OK", "302 Found"):
            wsgi(manager, status, deadline)
            (line,) = said()
            assert line.startswith("Database 'default': POST /orders ended without an error and dropped a write")
            assert "s3cret" not in line and ", at " not in line
        if deadline is not None:  # else the application has the server's own start_response
            for status in ("400 Bad Request", "500 Internal Server Error"):
                wsgi(manager, status, deadline)
        with pytest.raises(ZeroDivisionError):
            wsgi(manager, "200 OK", deadline, fails=True)
        assert said() == []

    gevent.spawn(job).get()
    manager.dispose()


@pytest.mark.parametrize("deadline", [None, 60])
def test_f29_streamed_body_says_it_unless_it_is_cut_off_or_raises(tmp_path, said, deadline):
    manager = make(HALVES["gevent"], tmp_path)

    def parts(fails):
        yield b"one"
        if fails:
            raise ZeroDivisionError
        yield b"two"

    def job():
        for read, fails, lines in ((9, False, 1), (1, False, 0), (9, True, 0)):
            answer = wsgi(manager, "200 OK", deadline, parts(fails))
            try:
                for _, _ in zip(range(read), answer, strict=False):
                    pass
            except ZeroDivisionError:
                assert fails
            answer.close()
            assert len(said()) == lines

    gevent.spawn(job).get()
    manager.dispose()


@pytest.mark.parametrize(("status", "lines"), [(200, 1), (303, 1), (404, 0), (500, 0), (None, 0)])
def test_f29_asgi_request_says_it_unless_it_fails_or_answers_with_an_error(tmp_path, said, status, lines):
    half = HALVES["aio"]
    manager = make(half, tmp_path)

    async def app(scope, receive, send):
        await manager.get().execute(text("UPDATE item SET name = 'x'"))
        if status is None:
            raise LookupError
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b"answer"})

    async def send(message):
        pass

    async def main():
        scope = {"type": "http", "method": "POST", "path": "/orders", "query_string": b"token=s3cret"}
        try:
            await aio.DBSessionMiddleware(app)(scope, None, send)
        except LookupError:
            assert status is None
        await manager.dispose()

    half.run(main)
    found = said()
    assert len(found) == lines and "s3cret" not in "".join(found)
    assert all("POST /orders ended" in line for line in found)


def test_f29_exception_of_a_task_that_nobody_retrieves_is_still_told(tmp_path, caplog):
    half = HALVES["aio"]
    manager = make(half, tmp_path)
    told = []

    async def main():
        async def fails():
            await flushed(manager.get())
            raise LookupError

        asyncio.get_running_loop().set_exception_handler(lambda loop, context: told.append(context["message"]))
        task = asyncio.create_task(fails())
        await asyncio.wait([task])
        del task
        await half.until(lambda: told)
        await manager.dispose()

    half.run(main)
    assert told == ["Task exception was never retrieved"]


@pytest.mark.parametrize(("status", "lines"), [(200, 1), (302, 1), (404, 0), (500, 0), (None, 0)])
def test_f29_flask_view_says_it_unless_it_fails_or_answers_with_an_error(tmp_path, said, status, lines):
    manager = make(HALVES["gevent"], tmp_path)
    app = flask.Flask(__name__)
    dbsession.flask.init_app(app)

    @app.post("/orders")
    def view():
        manager.get().execute(text("UPDATE item SET name = 'x'"))
        if status is None:
            raise LookupError
        return "answer", status

    assert app.test_client().post("/orders?token=s3cret").status_code == (status or 500)
    found = said()
    assert len(found) == lines and all("POST /orders ended" in line for line in found)
    with app.app_context():
        manager.get().execute(text("UPDATE item SET name = 'x'"))
    assert len(said()) == 1
    with pytest.raises(LookupError), app.app_context():
        manager.get().execute(text("UPDATE item SET name = 'x'"))
        raise LookupError
    assert said() == []
    manager.dispose()


# --- what is taken for a session


@on_both_halves
async def test_f29_scope_that_is_taken_for_a_session_says_what_to_write(half, manager):
    async with entered(manager.scope()) as scope:
        for name in ("execute", "add", "commit", "scalars", "get"):
            with pytest.raises(
                AttributeError, match=rf"and no session.*session\.{name}`.*session\.commit\(\)`"
            ) as caught:
                getattr(scope, name)
            assert ("`await session." in str(caught.value)) is (half.name == "aio")
        with pytest.raises(AttributeError, match="'Scope' object has no attribute 'lable'"):
            _ = scope.lable
        assert not hasattr(scope, "__fspath__")


@on_both_halves
async def test_f29_proxy_in_a_with_block_says_what_to_write(half, manager):
    with pytest.raises(TypeError, match=r"session_scope\(\):`.*commit\(\); or `(async )?with get_dbsession\(\)\.begin"):
        async with entered(manager.get()):
            raise AssertionError("entered")
    async with entered(manager.get().begin()):
        await new(manager.get())
    assert (await done(manager.get().get(Item, 2))).id == 2
    await done(manager.clear())


@on_both_halves
async def test_f29_flush_that_failed_and_was_caught_drops_nothing_that_was_not_said(half, mariadb_url, said):
    url = mariadb_url if half.name == "gevent" else mariadb_url.replace("pymysql", "asyncmy")
    manager = half.verbs.SessionManager({"default": url})  # whose word on transactions is not taken
    async with entered(manager.scope()):
        session = manager.get()
        await done(session.execute(text("CREATE TABLE item (id INT PRIMARY KEY, name TEXT)")))
        session.add(Item(id=1, name="one"))
        await done(session.commit())
    async with entered(manager.scope()):
        session = manager.get()
        session.add(Item(id=1, name="one"))
        with pytest.raises(exc.IntegrityError):
            await done(session.flush())
    assert not said()
    async with entered(manager.scope()):
        session = manager.get()
        session.add(Item(id=2, name="two"))
        await done(session.flush())
        savepoint = await done(session.begin_nested())
        session.add(Item(id=1, name="one"))
        with pytest.raises(exc.IntegrityError):
            await done(session.flush())
        with pytest.raises(dbsession.UnsavedWork):
            await done(manager.release())
        await done(savepoint.rollback())
    assert len(said()) == 1
    await done(manager.dispose())


def test_f29_session_on_a_connection_of_the_programs_own_says_nothing_of_its_writes(tmp_path, said):
    manager = make(HALVES["gevent"], tmp_path)
    with manager.engine().connect() as connection, connection.begin():
        with manager.scope():
            session = manager.get()(bind=connection, join_transaction_mode="rollback_only")
            session.add(Item(name="two"))
            session.flush()
        assert not said()
        with manager.scope():
            manager.get()(bind=connection, join_transaction_mode="rollback_only").add(Item(name="three"))
        assert len(said()) == 1
    with manager.scope():
        assert manager.get().scalar(text("SELECT count(*) FROM item WHERE name = 'two'")) == 1
    manager.dispose()
