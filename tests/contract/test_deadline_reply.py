"""DBSessionMiddleware with a deadline: what it takes, what the client gets, and start_response, held back."""

from __future__ import annotations

import errno
import json
import sys
from wsgiref.validate import validator

import gevent
import pytest

from dbsession import ConfigError, DBSessionMiddleware, DeadlineExceeded, ScopeEnded, deadline
from support.deadlines import (
    LONG,
    NO_SECONDS,
    SOON,
    Server,
    environ_of,
    in_use,
    manager_of,
    nothing_else_fires,
    plain,
    query,
    wait,
)
from support.pages import BLOCKS
from support.processes import run_python


@pytest.fixture(autouse=True)
def hub():
    return gevent.get_hub()


@pytest.fixture
def manager(tmp_path):
    manager = manager_of(tmp_path)
    yield manager
    manager.dispose()


@pytest.fixture
def warnings_of(caplog):
    return lambda: [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize("value", NO_SECONDS, ids=repr)
def test_middleware_refuses_a_deadline_that_is_no_number_of_seconds_above_0(value):
    with pytest.raises(ConfigError, match="The middleware's `deadline` is"):
        DBSessionMiddleware(plain(list), deadline=value)


def test_middleware_without_a_deadline_passes_on_the_servers_own_start_response():
    given = []

    def app(environ, start_response):
        given.append(start_response)
        start_response("200 OK", [])
        return iter([b"", b"x"])

    server = Server(app, None)
    assert given == [server.start_response] and server.environ["dbsession.scope"].timer is None
    assert list(server.body) == [b"", b"x"]
    server.body.close()


def test_middleware_off_gevent_wraps_but_refuses_each_request_fast_or_slow():
    """Under --preload the application is wrapped before anything is patched."""
    run_python(
        """
        from types import SimpleNamespace
        import dbsession, dbsession.gunicorn_hooks as hooks

        calls = []
        application = dbsession.DBSessionMiddleware(lambda *_: calls.append(1) or [], deadline=5)
        for attempt in (lambda: application({}, None), lambda: hooks.post_worker_init(None)):
            try:
                attempt()
            except dbsession.ConfigError as error:
                assert "gunicorn's gevent worker" in str(error)
            else:
                raise AssertionError("taken")
        assert not calls
        environ = {}
        try:
            application(environ, None)
        except dbsession.ConfigError:
            assert environ["dbsession.scope"].ended

        from gevent import monkey

        monkey.patch_all()
        hooks.post_worker_init(SimpleNamespace(age=2))
        del application
        """
    )


def test_block_that_readme_shows_runs(tmp_path):
    run_python(
        """
        import sys
        from gevent import monkey

        monkey.patch_all()
        import dbsession
        from sqlalchemy import text

        dbsession.configure({"default": f"sqlite:///{sys.argv[1]}/a.db"})
        session, app = dbsession.get_dbsession(), lambda *_: []
        session.execute(text("CREATE TABLE visit (path VARCHAR(200))"))
        exec(sys.argv[2])
        assert paths == [] and application
        """,
        tmp_path,
        BLOCKS["deadline"],
    )


# What the client gets


@pytest.mark.parametrize("where", ["app", "started app", "first chunk", "empty chunks"])
def test_request_that_is_late_before_anything_has_left_becomes_a_503(manager, warnings_of, where):
    def app(environ, start_response):
        if where != "app":
            start_response("200 OK", [("Content-Type", "text/plain")])
        query(manager)
        if where in ("app", "started app"):
            wait()

        def lines():
            if where == "empty chunks":
                yield b""
            wait()
            yield b"never"

        return lines()

    server = Server(app, around=validator, environ=environ_of(HTTP_ACCEPT="text/html,*/*"))
    answer = server.read()
    assert server.status == "503 Service Unavailable"
    headers = server.starts[0][1]
    assert headers["Content-Type"].startswith("text/plain") and headers["Content-Length"] == str(len(answer))
    assert headers["Retry-After"] == "1" and b"within 0.05 s" in answer
    assert in_use(manager) == 0 and server.environ["dbsession.scope"].ended
    assert warnings_of() == ["GET /orders/7 was not over within its deadline of 0.05 s; it was ended."]


@pytest.mark.parametrize(
    "accept, kind",
    [
        ("", "text/plain"),
        ("*/*", "text/plain"),
        ("application/json", "application/json"),
        ("application/problem+json;q=0.9, */*", "application/json"),
        ("text/html, application/json", "text/plain"),
        ("Application/JSON, text/plain", "application/json"),
    ],
)
def test_503_is_json_where_the_client_names_that_first(accept, kind):
    server = Server(lambda *_: wait(), environ=environ_of(HTTP_ACCEPT=accept))
    answer = server.read()
    assert server.starts[0][1]["Content-Type"].startswith(kind)
    if kind == "application/json":
        assert json.loads(answer)["error"] == "deadline exceeded"


@pytest.mark.parametrize("app", [lambda *_: wait(), plain(lambda: (wait() for _ in "x"))], ids=["app", "chunk"])
def test_503_to_head_has_no_body_but_its_length(app):
    server = Server(app, environ=environ_of("HEAD"), around=validator)
    assert server.read() == b"" and server.status.startswith("503")
    assert int(server.starts[0][1]["Content-Length"]) > 0


def test_deadline_of_a_block_inside_the_application_becomes_a_503(warnings_of):
    def app(environ, start_response):
        with deadline(SOON):
            wait()

    server = Server(app, LONG)
    server.read()
    assert server.status.startswith("503") and "deadline of 0.05 s" in warnings_of()[0]


def test_application_that_handles_it_gives_its_own_answer(warnings_of):
    def app(environ, start_response):
        try:
            wait()
        except DeadlineExceeded:
            start_response("504 Mine", [])
            return iter([b"mine"])

    server = Server(app)
    assert server.read() == b"mine" and server.status == "504 Mine" and not warnings_of()


def test_flask_app_wrapped_once_more_answers_503(tmp_path):
    """In a process of its own: init_app() configures the process's databases."""
    run_python(
        """
        import sys, time
        from gevent import monkey

        monkey.patch_all()
        import dbsession, dbsession.flask
        from flask import Flask
        from sqlalchemy import text

        app = Flask("late")
        app.config["DBSESSION_DATABASES"] = {"default": f"sqlite:///{sys.argv[1]}/a.db"}
        dbsession.flask.init_app(app)
        session = dbsession.get_dbsession()

        @app.get("/late")
        def late():
            session.execute(text("SELECT 1"))
            time.sleep(60)  # the deadline ends it

        @app.get("/")
        def fine():
            return {"answer": session.scalar(text("SELECT 42"))}

        app.wsgi_app = dbsession.DBSessionMiddleware(app.wsgi_app, deadline=1)
        client = app.test_client()
        assert client.get("/").json == {"answer": 42}
        with client.get("/late", headers={"Accept": "application/json"}) as answer:
            assert answer.status_code == 503 and answer.json["error"] == "deadline exceeded"
        assert dbsession.get_engine().pool.checkedout() == 0
        """,
        tmp_path,
    )


def test_stream_that_is_late_in_the_middle_is_cut(manager, warnings_of):
    def lines():
        yield query(manager)
        wait()

    server = Server(plain(lines))
    assert next(server.body) == b"1" and in_use(manager) == 1
    with pytest.raises(ConnectionResetError) as caught:
        next(server.body)
    assert caught.value.errno == errno.ECONNRESET and "0.05 s [DBS-DEADLINE]" in str(caught.value)
    assert in_use(manager) == 0  # before the server closes it
    server.body.close()
    assert server.status == "200 OK"
    assert len(warnings_of()) == 1


def test_request_that_is_late_after_a_write_is_cut(manager, warnings_of):
    def app(environ, start_response):
        start_response("200 OK", [])(query(manager))
        wait()

    with pytest.raises(ConnectionResetError):
        Server(app)
    assert in_use(manager) == 0 and len(warnings_of()) == 1


def test_server_that_sends_too_slowly_is_told_that_the_client_has_gone(manager, warnings_of):
    server = Server(plain(lambda: (query(manager) for _ in range(3))))
    assert next(server.body) == b"1" and in_use(manager) == 1
    with pytest.raises(ConnectionResetError) as caught:
        wait()  # in send()
    assert caught.value.errno == caught.value.args[0] == errno.ECONNRESET
    assert not warnings_of()
    server.body.close()
    assert in_use(manager) == 0 and len(warnings_of()) == 1
    server.body.close()
    assert len(warnings_of()) == 1


def test_server_that_does_not_heed_it_gets_no_further_chunk(manager, warnings_of):
    server = Server(plain(lambda: (query(manager) for _ in range(3))))
    next(server.body)
    with pytest.raises(ConnectionResetError):
        wait()
    with pytest.raises(ConnectionResetError):
        next(server.body)
    assert in_use(manager) == 0
    server.body.close()
    assert len(warnings_of()) == 1


def test_time_that_is_over_before_the_server_reads_hits_nobody_and_becomes_a_503(manager):
    def app(environ, start_response):
        start_response("200 OK", [])
        query(manager)
        return iter([b"x"])

    server = Server(app)
    nothing_else_fires()
    assert b"0.05 s" in server.read() and server.status.startswith("503") and in_use(manager) == 0


def test_own_close_of_the_body_that_is_late_is_ended(manager, warnings_of):
    class Body:
        def __iter__(self):
            return iter([b"x"])

        def close(self):
            query(manager)
            wait()

    server = Server(plain(Body))
    with pytest.raises(ConnectionResetError):
        server.read()
    assert in_use(manager) == 0 and len(warnings_of()) == 1


def test_own_close_of_the_body_finds_its_scope_ended_when_it_was_late():
    class Body:
        closed = 0

        def __iter__(self):
            wait()

        def close(self):
            self.closed += 1

    made = Body()
    server = Server(plain(lambda: made))
    assert b"0.05 s" in server.read() and made.closed == 1


def test_session_of_a_request_that_was_ended_is_refused(manager):
    class Body:
        def __iter__(self):
            wait()

        def close(self):
            query(manager)

    server = Server(plain(Body))
    with pytest.raises(ScopeEnded):
        server.read()
    assert in_use(manager) == 0


# start_response, held back


def streams(manager):
    def streamed(environ, start_response):
        start_response("200 OK", [("Content-Type", "text/plain")])
        return (query(manager) for _ in range(3))

    def started_late(environ, start_response):
        def lines():
            start_response("200 OK", [("Content-Type", "text/plain")])
            yield query(manager)
            yield b"11"

        return lines()

    def written(environ, start_response):
        write = start_response("200 OK", [("Content-Type", "text/plain")])
        write(query(manager))
        return [b"11"]

    def listed(environ, start_response):
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [query(manager), b"11"]

    def failing(environ, start_response):
        start_response("200 OK", [("Content-Type", "text/plain")])
        try:
            raise ValueError
        except ValueError:
            start_response("500 Oops", [("Content-Type", "text/plain")], sys.exc_info())
        return iter([b"111"])

    return [streamed, started_late, written, listed, failing]


@pytest.mark.parametrize("index", range(5))
def test_validators_on_both_sides_have_nothing_to_say(manager, index):
    app = streams(manager)[index]
    server = Server(validator(app), LONG, around=validator)
    assert server.read() in (b"111", b"11") and in_use(manager) == 0
    assert server.status == ("500 Oops" if app.__name__ == "failing" else "200 OK")
    assert server.starts[0][2] is (app.__name__ == "failing")
    assert server.written == ([b"1"] if app.__name__ == "written" else [])


def test_start_response_of_the_server_is_called_with_the_first_chunk_that_is_not_empty():
    started = []

    def lines():
        started.append(list(server.starts))
        yield b""
        started.append(list(server.starts))
        yield b"x"
        started.append(len(server.starts))
        yield b""

    server = Server(plain(lines), LONG)
    assert server.starts == []
    assert list(server.body) == [b"x", b""] and started == [[], [], 1]
    server.body.close()


def test_start_response_of_the_server_is_called_at_the_end_of_an_empty_body():
    server = Server(plain(lambda: iter([b"", b""])), LONG)
    assert server.read() == b"" and server.status == "200 OK"


def test_start_response_a_second_time_is_an_error_without_exc_info():
    def app(environ, start_response):
        start_response("200 OK", [])
        start_response("201 Again", [])

    with pytest.raises(AssertionError, match="second time"):
        Server(app, LONG)


def test_start_response_with_exc_info_raises_once_something_was_sent():
    def app(environ, start_response):
        start_response("200 OK", [])(b"x")
        try:
            raise ValueError("late")
        except ValueError:
            start_response("500 Oops", [], sys.exc_info())

    with pytest.raises(ValueError, match="late"):
        Server(app, LONG)


def test_error_of_the_application_leaves_the_answer_to_the_server():
    def app(environ, start_response):
        start_response("200 OK", [])
        raise KeyError

    server = []
    with pytest.raises(KeyError):
        DBSessionMiddleware(app, deadline=LONG)(environ_of(), lambda *a: server.append(a))
    assert server == []
