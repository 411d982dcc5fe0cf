"""Who gets to see the dashboard, what every answer's headers say, and what it refuses to start with."""

from __future__ import annotations

import os
import re
import socket
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dbsession.watch import cli
from dbsession.watch.dashboard import command
from dbsession.watch.dashboard.app import HEADERS, create_app, is_local_name
from dbsession.watch.dashboard.history import History
from dbsession.watch.inspection import sockets as folders
from support.processes import run_python

TUNNEL = "ssh -L 1:[::1]:1 HOST", "http://127.0.0.1:1/"
STATIC = Path(command.__file__).with_name("static")
TEMPLATE = Path(command.__file__).parent / "templates" / "index.html"
PAGES = ["/", "/state", *(f"/{file.name}" for file in STATIC.iterdir())]


@pytest.fixture
def client() -> Any:
    made: Any = create_app(History(), "the/folder", TUNNEL).test_client()
    made.open = partial(made.open, buffered=True)  # read and closed, as by a server
    return made


# -- who gets to see it ------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("path", [*PAGES, "/nothing"])
def test_page_is_refused_when_the_host_is_somebody_elses(client: Any, path: str) -> None:
    answer = client.get(path, headers={"Host": "evil.example"})
    assert answer.status_code == 403
    assert TUNNEL[0] in answer.text and "the/folder" not in answer.text


@pytest.mark.parametrize("path", PAGES)
def test_page_is_shown_when_the_host_is_this_machine(client: Any, path: str) -> None:
    answer = client.get(path, headers={"Host": "127.0.0.1:8765"})
    assert answer.status_code == 200
    assert "Set-Cookie" not in answer.headers


def test_page_says_how_to_reach_it_and_shows_its_folder_as_text() -> None:
    client = create_app(History(), '<b>"&', TUNNEL).test_client()
    text = client.get("/").text
    assert 'data-folder="&lt;b&gt;&#34;&amp;"' in text
    assert f"<code>{TUNNEL[0]}</code>" in text and TUNNEL[1] in text


# -- headers and what is inside the pages ------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*PAGES, "/nothing", "/index.html", "/../app.py"])
def test_every_answer_has_the_strict_headers(client: Any, path: str) -> None:
    answer = client.get(path)
    assert {name: answer.headers.get(name) for name in HEADERS} == HEADERS
    assert "unsafe" not in answer.headers["Content-Security-Policy"]


def test_nothing_but_the_pages_is_served(client: Any) -> None:
    for path in ("/index.html", "/templates/index.html", "/../app.py", "/..%2fapp.py", "/static/app.js"):
        assert client.get(path).status_code == 404, path
    assert client.get("/app.js").mimetype.endswith("/javascript") and client.get("/style.css").mimetype == "text/css"


def test_state_is_read_only(client: Any) -> None:
    for method in ("post", "put", "patch", "delete"):
        assert getattr(client, method)("/state").status_code == 405


def test_pages_bring_nothing_from_elsewhere_and_nothing_inline() -> None:
    """What the policy would stop is not there to begin with, and what goes round escaping is not, either."""
    for file in (TEMPLATE, *STATIC.iterdir()):
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


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "db.example", "localhost", "127.0.0.2", "", "\x1b[2J"])
def test_dashboard_is_refused_on_any_address_but_loopback(
    capsys: pytest.CaptureFixture[str], folder: str, host: str
) -> None:
    said = refusal(capsys, "--folder", folder, "--host", host)
    assert "`ssh -L 8765:127.0.0.1:8765 HOST`" in said and "\x1b" not in said


@pytest.mark.parametrize("option", ["--host=::1", "--port=0"])
def test_dashboard_is_refused_on_a_socket_and_a_port(
    capsys: pytest.CaptureFixture[str], folder: str, option: str
) -> None:
    assert "leave them out" in refusal(capsys, "--folder", folder, "--socket", option)


def test_dashboard_is_refused_on_a_socket_that_others_could_reach(
    capsys: pytest.CaptureFixture[str], folder: str
) -> None:
    Path(folder).chmod(0o710)
    assert "has mode 0710" in refusal(capsys, "--folder", folder, "--socket")


def test_dashboard_is_refused_on_a_socket_of_too_long_a_name(capsys: pytest.CaptureFixture[str], folder: str) -> None:
    deep = Path(folder, "x" * 80)
    deep.mkdir(0o700)
    assert "a Unix socket's leaves it 88" in refusal(capsys, "--folder", str(deep), "--socket")


def test_dashboard_is_refused_on_a_socket_where_one_listens_or_something_else_stands(
    capsys: pytest.CaptureFixture[str], folder: str
) -> None:
    path = Path(folder, folders.DASHBOARD)
    with folders.listen(path, socket.socket):
        assert "listens on" in refusal(capsys, "--folder", folder, "--socket") and path.is_socket()
    path.unlink()
    path.write_text("a file")
    assert "cannot be listened on" in refusal(capsys, "--folder", folder, "--socket")
    assert path.read_text() == "a file"


def test_dashboard_takes_the_place_of_one_that_was_killed_and_removes_its_socket(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(folder, folders.DASHBOARD)
    folders.listen(path, socket.socket).close()
    if os.geteuid() == 0:  # who may look at another user's service, too
        os.chown(folder, 4321, -1)
    served: list[Any] = []

    def serve(listener: Any, where: Path, *_: object) -> None:
        served.append((where, path.stat().st_mode & 0o777))
        listener.close()

    monkeypatch.setattr(command, "_serve", serve)
    assert cli.main(["dashboard", "--folder", folder, "--socket"]) == 0
    assert served == [(path, 0o600)] and list(Path(folder).iterdir()) == []


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

    monkeypatch.setattr(command.Workers, "look", refuse)
    assert "The folder cannot be used. [DBS-CONFIG]" in refusal(capsys, "--folder", folder, "--port", "0")


def test_dashboard_says_how_to_install_flask_when_it_is_missing(
    capsys: pytest.CaptureFixture[str], folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'gevent-dbsession[dashboard]'" in refusal(capsys, "--folder", folder)


def test_command_line_brings_in_no_flask() -> None:
    run_python("import sys, dbsession.watch.cli; assert 'flask' not in sys.modules")
