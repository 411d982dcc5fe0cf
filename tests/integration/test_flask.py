"""dbsession.flask: init_app with an application factory, contexts, streams, and slow readers under a real gunicorn."""

from __future__ import annotations

import http.client
import importlib.util
import json
import logging
import os
import socket
from pathlib import Path

import gevent
import pytest
from flask import (
    Flask,
    Response,
    abort,
    after_this_request,
    has_app_context,
    has_request_context,
    make_response,
    redirect,
)
from sqlalchemy import text
from werkzeug.exceptions import BadRequest, HTTPException, NotFound
from werkzeug.test import Client

import dbsession
import dbsession.flask
from dbsession.green import scope as scopes
from support.gunicorn import Gunicorn
from support.waiting import wait_until

HERE = Path(__file__).parent
spec = importlib.util.spec_from_file_location("flask_app", HERE / "flask_app.py")
flask_app = importlib.util.module_from_spec(spec)
spec.loader.exec_module(flask_app)


@pytest.fixture
def app(tmp_path):
    yield flask_app.create_app(f"sqlite:///{tmp_path}/a.db")
    dbsession.clear_dbsession()
    dbsession.configure()


def in_use():
    return dbsession.get_engine().pool.checkedout()


def test_requests_give_everything_back(app):
    client = app.test_client()
    assert client.get("/one").text == "1" and in_use() == 0
    assert client.get("/error", buffered=True).status_code == 500 and in_use() == 0
    with pytest.raises(flask_app.Killed):  # after_request would not run
        client.get("/killed")
    assert in_use() == 0


def test_deadline_of_the_configuration_answers_503():
    gevent.get_hub()  # as in a gevent worker
    app = Flask(__name__)
    app.config["DBSESSION_DEADLINE_S"] = 0.05
    dbsession.flask.init_app(app)
    app.add_url_rule("/slow", "slow", lambda: str(gevent.sleep(30)))
    app.add_url_rule("/fast", "fast", lambda: "fast")
    client = app.test_client()
    assert client.get("/slow").status == "503 Service Unavailable"
    assert client.get("/fast").text == "fast"
    wrong = Flask(__name__)
    wrong.config["DBSESSION_DEADLINE_S"] = "30"
    with pytest.raises(dbsession.ConfigError, match="deadline"):
        dbsession.flask.init_app(wrong)


def test_streamed_response_keeps_its_scope_until_it_is_closed(app):
    answer = app.test_client().get("/stream", buffered=False)
    lines = answer.iter_encoded()
    assert next(lines) == b"0\n" and in_use() == 1
    assert list(lines) == [b"1\n", b"2\n"]
    answer.close()
    assert in_use() == 0


def test_complete_response_gives_its_connection_back_before_it_is_read(app):
    answer = app.test_client().get("/one", buffered=False)
    assert in_use() == 0
    assert answer.text == "1"


class Teapot(HTTPException):
    code = 418

    def get_response(self, environ=None, scope=None):
        response = super().get_response(environ, scope)
        response.data = str(flask_app.session.scalar(text("SELECT 418")))
        return response


SHARED = HTTPException(response=Response("shared", 409))


def write_and(then):
    """A view that leaves a transaction open, and then does that."""

    def view():
        flask_app.session.execute(text("SELECT 1"))
        return then()

    return view


def fail():
    raise ValueError


ENDS = {
    "abort": (lambda: abort(404), 404),
    "abort_response": (lambda: abort(Response("no", 403)), 403),
    "shared_exception": (lambda: (_ for _ in ()).throw(SHARED), 409),
    "own_exception": (lambda: (_ for _ in ()).throw(Teapot()), 418),
    "unhandled": (fail, 500),
    "returned": (lambda: NotFound(), 404),
    "returned_tuple": (lambda: (NotFound(), 410, {"X-Own": "1"}), 410),
    "made": (lambda: make_response(NotFound(), 404), 404),
    "redirect": (lambda: redirect("/elsewhere"), 302),
    "handled": (lambda: (_ for _ in ()).throw(KeyError()), 400),
    "stream_unchanged": (lambda: Response((b"x" for _ in range(2)), 304), 304),
}


@pytest.fixture
def ends(app):
    app.register_error_handler(KeyError, lambda error: BadRequest())
    for name, (then, _) in ENDS.items():
        app.add_url_rule(f"/{name}", name, write_and(then))
    app.add_url_rule("/folder/", "folder", write_and(lambda: "folder"))
    return app


@pytest.mark.parametrize("method", ["GET", pytest.param("HEAD", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ENDS)
def test_f36_error_page_gives_its_connection_back_before_it_is_read(ends, name, method):
    """Nobody closes the answers, and each request finds the one place of the pool free."""
    answers = [ends.test_client().open(f"/{name}", method=method, buffered=False) for _ in range(3)]
    assert in_use() == 0
    assert {answer.status_code for answer in answers} == {ENDS[name][1]}
    texts = {answer.text for answer in answers}
    assert len(texts) == 1 and bool(texts.pop()) == (method == "GET" and name != "stream_unchanged")
    if method == "HEAD" and name == "abort":
        assert answers[0].content_length == ends.test_client().get("/abort").content_length


def test_f36_error_page_gives_its_connection_back_when_no_view_has_run_or_a_hook_fails(ends):
    failing = []
    ends.before_request(lambda: flask_app.session.execute(text("SELECT 1")) and None)
    ends.before_request(lambda: abort(401) if "before" in failing else None)

    @ends.after_request
    def after(response):
        if "after" in failing:
            raise ValueError
        return response

    client = ends.test_client()
    answers = [client.get("/folder"), client.post("/one"), client.get("/nowhere"), client.head("/stream")]
    failing.append("before")
    answers.append(client.get("/one"))
    failing[:] = ["after"]
    answers.append(client.get("/one"))
    assert [answer.status_code for answer in answers] == [308, 405, 404, 200, 401, 500] and in_use() == 0


def test_f36_aborted_stream_keeps_its_scope_until_it_is_closed(app):
    @app.get("/half")
    def half():
        abort(Response((str(flask_app.session.scalar(text(f"SELECT {n}"))) for n in range(3)), 404))

    answer = app.test_client().get("/half", buffered=False)
    assert in_use() == 1 and answer.text == "012"
    answer.close()
    assert in_use() == 0


def test_f36_exception_that_requests_share_carries_nothing_from_one_to_the_next(ends):
    seen = iter("ab")
    ends.after_request(lambda response: response.headers.add("X-Seen", next(seen)) or response)
    client = ends.test_client()
    assert [client.get("/shared_exception").headers.getlist("X-Seen") for _ in range(2)] == [["a"], ["b"]]


def test_response_that_another_after_request_replaces_by_a_stream_is_not_complete(app):
    @app.get("/replaced")
    def replaced():
        @after_this_request
        def replace(response):
            return Response(str(flask_app.session.scalar(text(f"SELECT {n}"))) for n in range(2))

        return "never seen"

    answer = app.test_client().get("/replaced", buffered=False)
    assert answer.text == "01"
    answer.close()
    assert in_use() == 0


def test_test_client_whose_answers_nobody_closes_logs_nothing(app, caplog):
    client = app.test_client()
    for _ in range(3):
        assert client.get("/one").text == "1"
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_app_context_outside_a_request_is_a_scope(app):
    outside = flask_app.session()
    with app.app_context():
        inside = flask_app.session()
        flask_app.session.execute(text("SELECT 1"))
        assert inside is not outside and in_use() == 1
        assert app.test_client().get("/one").text == "1"
        assert flask_app.session() is inside
        with app.app_context():
            assert flask_app.session() is not inside
        assert flask_app.session() is inside
    assert flask_app.session() is outside and in_use() == 0


def test_app_context_pushed_again_keeps_its_scope(app):
    with app.app_context() as context:
        mine = flask_app.session()
        with context:
            assert flask_app.session() is mine
        assert flask_app.session() is mine


def test_test_request_context_is_a_scope(app):
    with app.test_request_context("/one"):
        assert app.dispatch_request() == "1" and in_use() == 1
    assert in_use() == 0


def test_app_context_inside_a_request_shares_its_scope(app):
    @app.get("/nested")
    def nested():
        mine = flask_app.session()
        with app.app_context():
            return str(flask_app.session() is mine)

    assert app.test_client().get("/nested").text == "True"


def test_teardown_of_an_app_context_never_raises(app, caplog):
    dialect = dbsession.get_engine().dialect

    def do_rollback(connection):
        del dialect.do_rollback
        raise RuntimeError

    with app.app_context():
        flask_app.session.execute(text("SELECT 1"))
        dialect.do_rollback = do_rollback
    assert in_use() == 0 and [r for r in caplog.records if "a Flask app context" in r.getMessage()]


def test_cli_command_has_a_scope(app):
    result = app.test_cli_runner().invoke(args=["work"])
    assert result.exit_code == 0 and result.output == "worked 1 True\n" and in_use() == 0


def test_init_app_twice_wraps_once(app):
    wrapped = app.wsgi_app
    dbsession.flask.init_app(app)
    assert app.wsgi_app is wrapped


WAYS_IN = {
    "request": lambda app: app.test_client().get("/one").text,
    "request_with_a_deadline": lambda app: app.test_client().get("/one").text,
    "app_context": lambda app: app.app_context().__enter__(),
    "request_context": lambda app: app.test_request_context("/one").__enter__(),
    "command": lambda app: app.test_cli_runner().invoke(args=["work"], catch_exceptions=False),
}


@pytest.mark.parametrize("way", WAYS_IN)
def test_app_is_refused_once_another_apps_databases_have_replaced_its_own(tmp_path, way):
    settings = {"DBSESSION_DEADLINE_S": 30} if way == "request_with_a_deadline" else {}
    gevent.get_hub()  # as in a gevent worker
    app = flask_app.create_app(f"sqlite:///{tmp_path}/a.db", settings)
    second = flask_app.create_app(f"sqlite:///{tmp_path}/b.db", settings)
    depth = len(scopes.stack_here())
    with pytest.raises(dbsession.ConfigError, match=r"'flask_app' \('default'\) were replaced .*configure\(\)"):
        WAYS_IN[way](app)
    assert not has_app_context() and not has_request_context() and len(scopes.stack_here()) == depth
    assert second.test_client().get("/one").text == "1"  # the configuration is the process's: the last one's
    assert dbsession.get_engine().url.database == f"{tmp_path}/b.db"
    dbsession.configure(app.config["DBSESSION_DATABASES"])  # as the text says
    assert app.test_client().get("/one").text == "1"
    assert dbsession.get_engine().url.database == f"{tmp_path}/a.db"
    dbsession.clear_dbsession()
    dbsession.configure()


@pytest.mark.parametrize("given", ["mapping", "callable"])
def test_apps_that_lead_to_the_same_databases_are_all_served(app, given):
    databases = app.config["DBSESSION_DATABASES"]
    if given == "callable":
        databases = databases.get
    apps = [Flask(f"app{n}") for n in range(2)]
    for each in apps:
        each.config["DBSESSION_DATABASES"] = databases
        dbsession.flask.init_app(each)
        each.add_url_rule("/one", "one", lambda: str(flask_app.session.scalar(text("SELECT 1"))))
    assert [each.test_client().get("/one").text for each in apps] == ["1", "1"]


@pytest.mark.parametrize("configured", [False, True], ids=["app_only", "configure_in_each_test"])
def test_app_for_each_test_is_no_problem(tmp_path, caplog, configured):
    """The usual fixtures: a factory in each test, with a file of its own, or one that configure() replaces."""
    clients = []
    for n in range(3):
        app = flask_app.create_app(f"sqlite:///{tmp_path}/{'app' if configured else n}.db")
        if configured:
            dbsession.configure({"default": f"sqlite:///{tmp_path}/{n}.db"})
        clients.append(app.test_client())
        assert clients[n].get("/one").text == "1"
        assert dbsession.get_engine().url.database == f"{tmp_path}/{n}.db"
    dbsession.configure()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_databases_that_configure_was_given_before_are_named_when_init_app_replaces_them(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(dbsession.flask._Given, "last", None)  # as in a new process
    url = f"sqlite:///{tmp_path}/a.db"
    dbsession.configure({"default": url, "audit": f"sqlite:///{tmp_path}/s3cret.db"})
    flask_app.create_app(url)
    [warning] = [record for record in caplog.records if record.levelno >= logging.WARNING]
    said = warning.getMessage()
    assert warning.name == "dbsession.manager" and "'flask_app'" in said and "'audit'. Give" in said
    assert "s3cret" not in said
    caplog.clear()
    dbsession.configure({"default": url})
    flask_app.create_app(url)
    dbsession.configure()  # the environment, whatever it has, is what an app's own databases are for
    flask_app.create_app(f"sqlite:///{tmp_path}/b.db")
    dbsession.configure()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("DBSESSION_DATABASES", {"default": "sqlite:///other.db"}),
        ("DBSESSION_DATABASES", lambda name: None),
        ("DBSESSION_DATABASES", None),
        ("DBSESSION_DEADLINE_S", 5),
    ],
)
def test_init_app_again_with_others_is_refused(app, key, value):
    wrapped, source = app.wsgi_app, dbsession.get_engine()
    app.config[key] = value
    with pytest.raises(dbsession.ConfigError, match=f"called again for the app 'flask_app', .* another {key} now"):
        dbsession.flask.init_app(app)
    assert app.wsgi_app is wrapped and dbsession.get_engine() is source
    assert app.test_client().get("/one").text == "1"


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("DBSESSION_DATABASE", "Did you mean 'DBSESSION_DATABASES'?"),
        ("DB_SESSION_DATABASES", "Did you mean 'DBSESSION_DATABASES'?"),
        ("DBSESSION_DEADLINE", "Did you mean 'DBSESSION_DEADLINE_S'?"),
        ("DBSESSION_DEADLINE_MS", "Did you mean 'DBSESSION_DEADLINE_S'?"),
        ("DBSESSION_REPORTS_URL", "A URL belongs into DBSESSION_DATABASES"),
        ("DBSESSION_POOL_SIZE", "DBSESSION_DATABASES and DBSESSION_DEADLINE_S"),
    ],
)
def test_key_that_looks_like_ours_is_refused_with_what_was_meant(key, said):
    app = Flask("shop")
    app.config[key] = "s3cret"
    with pytest.raises(dbsession.ConfigError) as caught:
        dbsession.flask.init_app(app)
    assert f"'shop' has the unknown key '{key}'." in str(caught.value) and said in str(caught.value)
    assert "s3cret" not in str(caught.value) and app.extensions == {}


def test_keys_of_others_and_a_copy_of_the_environment_are_let_be(monkeypatch):
    monkeypatch.setenv("DBSESSION_INSPECT", "/run/shop")
    app = Flask("shop")
    app.config.update(os.environ, MONGODB_DATABASES=1, SESSION_TYPE="redis", SQLALCHEMY_DATABASE_URI="sqlite://")
    dbsession.flask.init_app(app)


def test_init_app_with_a_bad_configuration_says_so(app):
    from flask import Flask

    bad = Flask("bad")
    bad.config["DBSESSION_DATABASES"] = {"default": {"urll": "sqlite:///a.db"}}
    with pytest.raises(dbsession.ConfigError, match="urll"):
        dbsession.flask.init_app(bad)
    assert "dbsession" not in bad.extensions


def test_nothing_is_left_on_the_ident(app):
    depth = len(scopes.stack_here())
    for _ in range(3):
        app.test_client().get("/one")
        with app.app_context():
            pass
    assert len(scopes.stack_here()) == depth


def test_thirty_slow_readers_over_a_pool_of_two_stop_nobody(tmp_path):
    """Real gunicorn, real sockets: thirty clients ask for three megabytes and do not read them."""
    with Gunicorn(
        "flask_app:small()",
        "--worker-class=gevent",
        config=HERE.parents[1] / "deploy" / "gunicorn.conf.py",
        env={"APP_URL": f"sqlite:///{tmp_path}/a.db", "PYTHONPATH": str(HERE), "GRACEFUL_TIMEOUT": "2"},
        ready="/state",
    ) as server:
        slow = []
        for _ in range(30):
            client = socket.create_connection(("127.0.0.1", server.port), 30)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.sendall(b"GET /big HTTP/1.1\r\nHost: x\r\n\r\n")
            assert client.recv(20).startswith(b"HTTP/1.1 200")
            slow.append(client)
        for _ in range(10):
            assert server.get("/one").text == "1"
        wait_until(lambda: json.loads(server.get("/state").body)["checked_out"] == 0, 30)
        for client in slow:
            client.close()


def test_f36_werkzeug_response_that_nobody_closes_does_not_hold_up_the_next_request(app):
    """Without Flask: nothing says that it is complete, so the next request on the greenlet ends it."""

    def plain(environ, start_response):
        flask_app.session.execute(text("INSERT INTO visit VALUES (1)"))  # waits for the write lock of the last one
        return NotFound()(environ, start_response)

    with dbsession.session_scope():
        flask_app.session.execute(text("CREATE TABLE visit (n INTEGER)"))
        flask_app.session.commit()
    client = Client(dbsession.DBSessionMiddleware(plain))
    answers = [client.get("/") for _ in range(3)]
    assert in_use() == 1 and {answer.status_code for answer in answers} == {404}
    answers[-1].close()
    assert in_use() == 0


def test_f21_export_whose_stream_is_cut_breaks_off_and_does_not_look_complete(mariadb_url):
    with Gunicorn(
        "flask_app:create_app()", "--worker-class=gevent", cwd=HERE, env={"APP_URL": mariadb_url}, ready="/state"
    ) as server:
        assert len(server.get("/export/nothing").text.splitlines()) == 3000
        for cut in ("commit", "release", "statement"):
            with pytest.raises(http.client.IncompleteRead) as raised:
                server.get(f"/export/{cut}")
            assert 0 < len(raised.value.partial.splitlines()) < 3000
        assert len(server.get("/export/nothing").text.splitlines()) == 3000
        # The body is closed, with a round trip, after its last byte has left.
        wait_until(lambda: json.loads(server.get("/state").text) == {"checked_out": 0}, 30)
        assert server.logs().count("[DBS-RESULT-CUT]") == 3
