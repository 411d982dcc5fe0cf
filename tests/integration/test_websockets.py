"""WebSockets in the gevent half: real Flask-SocketIO and flask-sock under a real gunicorn, with real clients."""

from __future__ import annotations

import json
import sqlite3
from contextlib import ExitStack, closing

import flask_socketio
import pytest
import socketio
import websocket
from flask import Flask
from sqlalchemy import text

import dbsession
import dbsession.flask
from support.gunicorn import Gunicorn
from support.waiting import wait_until

CLIENTS = 5  # more than there are connections


def serve(tmp_path, sockets, order="dbsession first"):
    path = tmp_path / "a.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE t (n INTEGER)")
    return Gunicorn(
        "support.socket_app:app",
        "--worker-class=gevent",
        "--worker-connections=100",
        "--graceful-timeout=1",
        env={"APP_URL": f"sqlite:///{path}", "SOCKETS": sockets, "ORDER": order},
        ready="/state",
    )


def held(server):
    return json.loads(server.get("/state").body)["checked_out"]


@pytest.mark.slow
@pytest.mark.parametrize("order", ["socketio first", "dbsession first"])
def test_f37_socketio_event_is_a_unit_of_work_and_open_sockets_hold_nothing(tmp_path, order):
    with serve(tmp_path, "socketio", order) as server, ExitStack() as stack:
        clients = []
        for _ in range(CLIENTS):
            clients.append(stack.enter_context(socketio.SimpleClient()))
            clients[-1].connect(server.url, transports=["websocket"])
        assert [client.call("count", timeout=20) for client in clients] == [0] * CLIENTS
        assert clients[0].call("write", "and leave it", timeout=20) == 1
        clients[1].emit("write", "fail")
        assert clients[1].call("count", timeout=20) == 0
        assert clients[0].call("write", "commit", timeout=20) == 1
        assert [client.call("count", timeout=20) for client in clients] == [1] * CLIENTS
        # An event's end may come after its answer.
        wait_until(lambda: held(server) == 0, 30)
        assert server.get("/one").text == "1 GET /one"


@pytest.mark.slow
def test_f37_message_of_flask_sock_in_an_app_context_is_a_unit_of_work(tmp_path):
    with serve(tmp_path, "sock") as server, ExitStack() as stack:
        url = server.url.replace("http", "ws")
        sockets = [
            stack.enter_context(closing(websocket.create_connection(f"{url}/sock", timeout=20))) for _ in range(CLIENTS)
        ]

        def ask(socket, message):
            socket.send(message)
            return socket.recv()

        assert [ask(socket, "count") for socket in sockets] == ["0"] * CLIENTS
        assert ask(sockets[0], "and leave it") == "1" and ask(sockets[1], "fail") == "failed"
        assert ask(sockets[2], "commit") == "1"
        assert [ask(socket, "count") for socket in sockets] == ["1"] * CLIENTS
        wait_until(lambda: held(server) == 0, 30)  # a message's end may come after its answer


@pytest.mark.slow
def test_f37_deadline_cuts_an_upgraded_connection_and_writes_no_http_into_it(tmp_path):
    """The other route is exempted, and goes on after that."""
    with serve(tmp_path, "sock") as server, ExitStack() as stack:
        url = server.url.replace("http", "ws")
        exempted, bounded = (
            stack.enter_context(closing(websocket.create_connection(f"{url}/{path}", timeout=20)))
            for path in ("sock", "bounded")
        )
        bounded.send("count")
        assert bounded.recv() == "0"
        received = b""
        try:
            while piece := bounded.sock.recv(4096):
                received += piece
        except ConnectionResetError:
            pass
        assert b"HTTP" not in received
        wait_until(lambda: "deadline" in server.logs(), 30)
        exempted.send("count")
        assert exempted.recv() == "0"
        wait_until(lambda: held(server) == 0, 30)


def test_f37_app_context_in_a_request_is_its_own_scope_only_where_that_serves_a_socket(tmp_path):
    app = Flask(__name__)
    app.config["DBSESSION_DATABASES"] = {"default": f"sqlite:///{tmp_path}/a.db"}
    dbsession.flask.init_app(app)
    session = dbsession.get_dbsession()

    @app.get("/")
    def nested():
        session.execute(text("SELECT 1"))
        mine = session()
        with app.app_context():
            return str(session() is mine)

    client = app.test_client()
    assert client.get("/").text == "True"
    assert client.get("/?EIO=5").text == "True" and client.get("/", headers={"Upgrade": "h2c"}).text == "True"
    for options in ({"headers": {"Upgrade": "WebSocket"}}, {"query_string": "EIO=4&transport=polling&sid=x"}):
        assert client.get("/", buffered=False, **options).text == "False"
        assert dbsession.get_engine().pool.checkedout() == 0
    dbsession.configure()


def test_f37_flask_page_is_complete_behind_flask_socketio(tmp_path):
    """Which gives Flask a copy of the environ."""
    app = Flask(__name__)
    app.config["DBSESSION_DATABASES"] = {"default": f"sqlite:///{tmp_path}/a.db"}
    flask_socketio.SocketIO(app, async_mode="threading")
    dbsession.flask.init_app(app)
    app.add_url_rule("/", "one", lambda: str(dbsession.get_dbsession().scalar(text("SELECT 1"))))
    answer = app.test_client().get("/", buffered=False)
    assert dbsession.get_engine().pool.checkedout() == 0 and answer.text == "1"
    answer.close()
    dbsession.configure()
