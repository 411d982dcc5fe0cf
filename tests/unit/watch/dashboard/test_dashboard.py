"""Who gets to see the dashboard, what every answer's headers say, and what it refuses to start with."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Any

import pytest

from dbsession.watch import cli
from dbsession.watch.dashboard import access, command
from dbsession.watch.dashboard.access import (
    FAILURES,
    FAILURES_S,
    LEAST_TOKEN,
    FailedLogins,
    Token,
    is_local_name,
    is_loopback,
)
from dbsession.watch.dashboard.app import ASSETS, HEADERS, create_app
from dbsession.watch.dashboard.history import History
from dbsession.watch.inspection.client import Collected
from support.processes import run_python

SECRET = "correct horse battery"
WRONG = "wrong horse battery.."
# {"in": true}, with a time, signed by somebody else's key
FORGED = "dbsession_dashboard=eyJpbiI6dHJ1ZX0.aSCAAA.xxxxxxxxxxxxxxxxxxxxxxxxxxx"
STATIC = Path(access.__file__).with_name("static")
PAGES = ["/", "/state", "/style.css", *(f"/{name}" for name in ASSETS)]


@pytest.fixture
def client() -> Any:
    return create_app(History(), "the/folder").test_client()


@pytest.fixture
def locked() -> Any:
    """A client of a dashboard with a token."""
    return create_app(History(), "the/folder", Token(SECRET)).test_client()


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


# -- names and addresses -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("localhost", True),
        ("LocalHost:8765", True),
        ("127.0.0.1", True),
        ("127.0.0.1:8765", True),
        ("[::1]", True),
        ("[::1]:8765", True),
        ("", False),
        ("evil.example", False),
        ("evil.example:8765", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example:8765", False),
        ("evil.example:127.0.0.1", False),
        ("localhost:evil", False),
        ("localhost:80:80", False),
        ("user@localhost", False),
        ("::1", False),
        ("0.0.0.0", False),
    ],
)
def test_host_header_is_local_only_with_a_name_of_this_machine(host: str, local: bool) -> None:
    """A page whose name was made to point here (DNS rebinding) sends its own."""
    assert is_local_name(host) is local


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.0.2.1", False),
        ("db.example", False),
        ("", False),
    ],
)
def test_address_is_loopback_when_no_other_machine_reaches_it(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


# -- without a token ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*PAGES, "/login", "/nothing"])
def test_page_is_refused_when_the_host_is_somebody_elses(client: Any, path: str) -> None:
    answer = client.get(path, headers={"Host": "evil.example"})
    assert answer.status_code == 403
    assert "the/folder" not in answer.text


@pytest.mark.parametrize("path", PAGES)
def test_page_is_shown_when_the_host_is_this_machine(client: Any, path: str) -> None:
    answer = client.get(path, headers={"Host": "127.0.0.1:8765"})
    assert answer.status_code == 200
    assert "Set-Cookie" not in answer.headers


def test_login_leads_to_the_page_when_there_is_no_token(client: Any) -> None:
    for answer in (client.get("/login"), client.post("/login", data={"token": ""})):
        assert (answer.status_code, answer.headers["Location"]) == (303, "./")


def test_folder_is_shown_as_text() -> None:
    client = create_app(History(), '<b>"&').test_client()
    assert 'data-folder="&lt;b&gt;&#34;&amp;"' in client.get("/").text


# -- with a token ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/state", "/state?since=x", *(f"/{name}" for name in ASSETS), "/nothing"])
@pytest.mark.parametrize(
    "headers",
    [{}, bearer(WRONG), bearer(""), bearer(SECRET[:-1]), {"Authorization": f"Token {SECRET}"}, {"Cookie": FORGED}],
)
def test_request_is_refused_without_the_token(locked: Any, path: str, headers: dict[str, str]) -> None:
    answer = locked.application.test_client(use_cookies=False).get(path, headers=headers)
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"].startswith("Bearer")
    assert SECRET not in answer.text


def test_page_is_refused_with_the_login_in_its_place_without_the_token(locked: Any) -> None:
    """Not by a redirect: a script that follows it would take the login, a 200, for the page."""
    answer = locked.get("/")
    assert answer.status_code == 401 and 'action="login"' in answer.text
    assert answer.headers["WWW-Authenticate"].startswith("Bearer")  # for which no browser asks by itself
    assert locked.get("/login").status_code == locked.get("/style.css").status_code == 200


@pytest.mark.parametrize("path", PAGES)
def test_request_is_answered_with_the_token_whatever_the_host(locked: Any, path: str) -> None:
    answer = locked.get(path, headers={**bearer(SECRET), "Host": "db.example"})
    assert answer.status_code == 200
    assert "Set-Cookie" not in answer.headers


def test_login_sets_a_cookie_that_is_not_the_token_and_opens_the_page(locked: Any) -> None:
    answer = locked.post("/login", data={"token": SECRET})
    assert (answer.status_code, answer.headers["Location"]) == (303, "./")
    cookie = answer.headers["Set-Cookie"]
    assert re.search(r"; HttpOnly(;|$)", cookie) and re.search(r"; SameSite=Strict(;|$)", cookie)
    assert SECRET not in cookie
    assert locked.get("/").status_code == locked.get("/state").status_code == 200
    assert "Log out" in locked.get("/").text


def test_login_lasts_behind_a_proxy_that_asks_for_a_password_of_its_own(locked: Any) -> None:
    """A browser then sends that with every request; taken for a token it made page and login lead to each other."""
    locked.post("/login", data={"token": SECRET})
    proxys = {"Authorization": "Basic YTpi"}
    assert [locked.get(path, headers=proxys).status_code for path in ("/", "/state")] == [200, 200]


def test_login_lasts_over_a_restart_and_not_over_another_token(locked: Any) -> None:
    cookie = locked.post("/login", data={"token": SECRET}).headers["Set-Cookie"].partition(";")[0]
    for token, status in ((SECRET, 200), (SECRET + "!", 401)):
        restarted = create_app(History(), "the/folder", Token(token)).test_client(use_cookies=False)
        assert restarted.get("/state", headers={"Cookie": cookie}).status_code == status


def test_login_ends_after_its_time(locked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    locked.post("/login", data={"token": SECRET})
    assert locked.get("/state").status_code == 200
    locked.application.permanent_session_lifetime = -1
    assert locked.get("/state").status_code == 401


def test_logout_closes_the_page(locked: Any) -> None:
    locked.post("/login", data={"token": SECRET})
    assert locked.post("/logout").headers["Location"] == "login"
    assert locked.get("/state").status_code == 401


@pytest.mark.parametrize("given", [WRONG, "", SECRET + "\0", "ü" * 30, "x" * 3000])
def test_login_says_so_when_the_token_is_wrong(locked: Any, given: str) -> None:
    answer = locked.post("/login", data={"token": given})
    assert answer.status_code == 401
    assert "That is not the token." in answer.text
    assert "Set-Cookie" not in answer.headers and (not given or given not in answer.text)


def test_login_refuses_a_body_that_no_token_needs(locked: Any) -> None:
    assert locked.post("/login", data={"token": "x" * 100_000}).status_code == 413


@pytest.mark.parametrize("way", ["form", "header"])
def test_token_is_not_even_looked_at_when_an_address_has_failed_too_often(locked: Any, way: str) -> None:
    """Whichever way it came; others are not locked out, nor those who are in."""

    def attempt(token: str, address: str = "192.0.2.1") -> Any:
        base = {"REMOTE_ADDR": address}
        if way == "form":
            return locked.post("/login", data={"token": token}, environ_base=base)
        return locked.get("/state", headers=bearer(token), environ_base=base)

    for _ in range(FAILURES):
        assert attempt(WRONG).status_code == 401
    answer = attempt(SECRET)
    assert answer.status_code == 429
    assert 0 < int(answer.headers["Retry-After"]) <= FAILURES_S
    assert answer.headers["Content-Security-Policy"]
    assert attempt(SECRET, "192.0.2.2").status_code in (200, 303)


def test_failed_logins_are_forgotten_with_time_and_bounded_in_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "_ADDRESSES", 2)
    now = [0.0]
    failed = FailedLogins(lambda: now[0])
    for _ in range(FAILURES):
        failed.add("a")
        now[0] += 1
    assert failed.wait_s("a") == FAILURES_S - FAILURES and failed.wait_s("b") == 0
    now[0] += FAILURES_S - FAILURES
    assert failed.wait_s("a") == 0
    for address in "abc":
        failed.add(address)
    assert len(failed._times) == 2


def test_token_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the function that is made for it; and it does not show."""
    compared: list[Any] = []
    monkeypatch.setattr(access.hmac, "compare_digest", lambda *both: compared.append(both) or False)
    assert Token(SECRET).matches(SECRET) is False
    assert compared == [(SECRET.encode(), SECRET.encode())]
    assert SECRET not in repr(Token(SECRET))


# -- headers and what is inside the pages ------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*PAGES, "/login", "/nothing", "/static/index.html", "/../app.py"])
def test_every_answer_has_the_strict_headers(client: Any, locked: Any, path: str) -> None:
    for each in (client, locked):
        answer = each.get(path)
        assert {name: answer.headers.get(name) for name in HEADERS} == HEADERS
        assert "unsafe" not in answer.headers["Content-Security-Policy"]


def test_state_is_read_only(client: Any) -> None:
    for method in ("post", "put", "patch", "delete"):
        assert getattr(client, method)("/state").status_code == 405


def test_pages_bring_nothing_from_elsewhere_and_nothing_inline() -> None:
    """What the policy would stop is not there to begin with, and what goes round escaping is not, either."""
    for file in STATIC.iterdir():
        text = file.read_text()
        addresses = set(re.findall(r"\bhttps?://[^\s'\"]+", text))
        assert addresses <= {"http://www.w3.org/2000/svg"}, file.name
        assert not re.search(r"\bon\w+=|<style|style=|javascript:|@import", text), file.name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text), file.name
        assert re.findall(r"<script[^>]*>", text) in ([], ['<script type="module" src="app.js">'])
        assert len(text.splitlines()) <= 300, file.name


def luminance(colour: str) -> float:
    """WCAG's relative luminance of #rrggbb."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_have_the_contrast_that_people_need(scheme: str) -> None:
    """WCAG AA: 4.5 for text, 3 for lines, bars and edges that say something."""
    style = (STATIC / "style.css").read_text()
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#\w{6});", block)) for block in re.findall(r":root \{(.*?)\}", style, re.S)
    )
    colours = light | dark if scheme == "dark" else light
    assert set(light) - set(dark) == set()
    needed = {name: 4.5 for name in ("text", "quiet", "blue", "amber", "red", "violet")}
    needed |= {"green": 3.0, "amber-fill": 3.0}
    for name, least in needed.items():
        for behind in ("card", "page"):
            lights = sorted((luminance(colours[name]), luminance(colours[behind])))
            assert (lights[1] + 0.05) / (lights[0] + 0.05) >= least, (scheme, name, behind)


# -- how it is started -------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> str:
    tmp_path.chmod(0o700)
    return str(tmp_path)


@pytest.fixture(autouse=True)
def nothing_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """What should be refused, and is not, fails instead of serving for ever."""

    def serve(*_: object) -> None:
        raise AssertionError("it was not refused")

    monkeypatch.setattr(command, "_serve", serve)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What it says when it does not start."""
    assert cli.main(["dashboard", *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("dbsession dashboard: ") and shown.err.count("\n") == 1
    return shown.err


def test_dashboard_is_refused_without_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert "DBSESSION_INSPECT" in refusal(capsys)


def test_dashboard_is_refused_when_the_folder_does_not_exist(capsys: pytest.CaptureFixture[str], folder: str) -> None:
    assert f"'{folder}/none' does not exist" in refusal(capsys, "--folder", f"{folder}/none")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "db.example"])
def test_dashboard_is_refused_without_a_token_when_others_could_reach_it(
    capsys: pytest.CaptureFixture[str], folder: str, host: str
) -> None:
    assert f"--host {host}" in refusal(capsys, "--folder", folder, "--host", host)


def test_dashboard_is_refused_with_an_empty_host(capsys: pytest.CaptureFixture[str], folder: str) -> None:
    assert "--host is empty" in refusal(capsys, "--folder", folder, "--host", "", "--token", SECRET)


@pytest.mark.parametrize("way", ["option", "environment"])
def test_dashboard_is_refused_with_an_empty_token(
    capsys: pytest.CaptureFixture[str], folder: str, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setenv("DBSESSION_INSPECT", folder)
    if way == "environment":
        monkeypatch.setenv(command.TOKEN_VARIABLE, "")
    assert str(LEAST_TOKEN) in refusal(capsys, *(["--token", ""] if way == "option" else []))


@pytest.mark.parametrize("length", [1, LEAST_TOKEN - 1, LEAST_TOKEN])
def test_dashboard_warns_of_a_token_only_when_it_is_short(
    capsys: pytest.CaptureFixture[str], folder: str, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    served = []
    monkeypatch.setattr(command, "_serve", lambda listener, *given: (listener.close(), served.append(given)))
    token = "§" * length
    assert cli.main(["dashboard", "--folder", folder, "--host", "0.0.0.0", "--port", "0", "--token", token]) == 0
    assert served[0][-1].matches(token)
    shown = capsys.readouterr().err
    assert (f"{LEAST_TOKEN} or more" in shown) is (length < LEAST_TOKEN) and "§" not in shown


@pytest.mark.parametrize("port", ["x", "-1", "65536", "1.5", "", "²"])
def test_dashboard_is_refused_with_a_port_that_is_none(
    capsys: pytest.CaptureFixture[str], folder: str, port: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["dashboard", "--folder", folder, f"--port={port}"])
    assert ended.value.code == 2
    assert "is not a port" in capsys.readouterr().err


def test_dashboard_is_refused_when_its_port_is_in_use(capsys: pytest.CaptureFixture[str], folder: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        shown = refusal(capsys, "--folder", folder, "--port", str(port))
    assert f"127.0.0.1:{port} cannot be listened on (Address already in use" in shown


def test_dashboard_is_refused_when_its_folder_cannot_be_read(
    capsys: pytest.CaptureFixture[str], folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise command.ConfigError("The folder cannot be used.")

    monkeypatch.setattr(command, "collect", refuse)
    assert "The folder cannot be used. [DBS-CONFIG]" in refusal(capsys, "--folder", folder, "--port", "0")


def test_dashboard_says_how_to_install_flask_when_it_is_missing(
    capsys: pytest.CaptureFixture[str], folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'dbsession[dashboard]'" in refusal(capsys, "--folder", folder)


def test_command_line_brings_in_no_flask() -> None:
    run_python("import sys, dbsession.watch.cli; assert 'flask' not in sys.modules")


def test_silent_client_is_dropped_wherever_it_stops() -> None:
    """Before its request, in the middle of it, and between two."""
    run_python(
        """
        import gevent
        from gevent import socket
        from gevent.pywsgi import WSGIServer
        from dbsession.watch.dashboard import command

        def app(environ, start_response):
            start_response("200 OK", [("Content-Length", "0")])
            return []

        command.CLIENT_S = 0.2
        server = WSGIServer(("127.0.0.1", 0), app, handler_class=command._Handler, log=None)
        server.start()
        request = b"GET / HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n"
        for sent in (b"", request[:5], request[:20], request[:-2], request):
            with gevent.Timeout(10), socket.create_connection(server.address) as client:
                client.sendall(sent)
                while client.recv(1000):
                    pass
        server.stop()
        """
    )


@pytest.mark.parametrize(
    "before", ["GET /", "POST /login HTTP/1.1\\r\\nHost: localhost\\r\\nContent-Length: 4000\\r\\n\\r\\n"]
)
def test_client_is_dropped_when_its_request_comes_byte_by_byte(before: str) -> None:
    """Each byte comes in time; the whole does not. A hundred of those would leave nobody else a connection."""
    told = run_python(
        f"""
        import gevent
        from gevent import socket
        from gevent.pywsgi import WSGIServer
        from dbsession.watch.dashboard import command
        from dbsession.watch.dashboard.access import Token
        from dbsession.watch.dashboard.history import History
        from dbsession.watch.dashboard.app import create_app

        command.CLIENT_S = 0.5
        app = create_app(History(), "/", Token("t" * 16))
        server = WSGIServer(("127.0.0.1", 0), app, handler_class=command._Handler, log=None)
        server.start()
        with gevent.Timeout(10), socket.create_connection(server.address) as client:
            client.sendall(b"{before}")
            try:
                while True:
                    client.sendall(b"x")
                    gevent.sleep(0.05)
            except OSError:
                print("dropped")
        server.stop()
        """
    )
    assert told.stdout == "dropped\n" and told.stderr == ""


def test_poller_takes_for_silent_whoever_sends_what_is_no_snapshot() -> None:
    """A process of another version, say. The others, and the looks that follow, are shown."""
    history = History()
    odd = {"version": 1, "pid": 7, "databases": [{"name": "default"}], "holders": [], "scopes": []}
    command._add(history, Collected(1.0, [odd], [3]))
    assert history.answer("", 1.0)["silent"] == [3, 7]
    fine = {**odd, "databases": []}
    command._add(history, Collected(2.0, [fine], []))
    assert history.answer("", 2.0)["workers"] == [7]
