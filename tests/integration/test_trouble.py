"""The panel of deploy/demo's page, deploy/trouble.py: each button on a real gunicorn with two workers, and in a real
browser."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from support.dashboard import chromium
from support.desks import environment, flask_desk, server_urls, sqlite_urls
from support.gunicorn import DEMO_CONFIG, Gunicorn
from support.mariadb import MariaDBServer
from support.postgresql import PostgreSQLServer
from support.waiting import wait_until

expect.set_options(timeout=30_000)

BUTTONS = {
    "hold": "Hold a connection in a slow request",
    "release": "Release it first",
    "abandon": "Abandon a stream",
    "burst": "Send 200 requests at once",
    "deadlock": "Run into a deadlock",
}
ANSWERS = {
    "hold": r"Answered 200\. It kept its connection for [4-9]\.\d s",
    "release": r"Answered 200 after [4-9]\.\d s\. It had a connection for \d+ ms of that\.",
    "abandon": r"The client went away after 2 s, .* its connection was back in the pool\.",
    "burst": r"200 of 200 answered 200; longest wait for a connection \d+\.\d s, median .* requests\.",
    "deadlock": r"attempt 1 was ended with {}, attempt 2 committed.*dbsession counted [12] retr(y|ies)\.",
}
ENDED_WITH = {
    "sqlite": "SQLITE_BUSY_SNAPSHOT",
    "mariadb": r"OperationalError \(1213\)",
    "postgresql": r"OperationalError \(40P01\)",
}

# The words that are shown in two pieces: a line ends inside them.
BROKEN_WORDS = """() => {
  const broken = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    if (walker.currentNode.parentElement.closest("script, style, noscript")) continue;
    for (const word of walker.currentNode.data.matchAll(/[\\p{L}\\p{N}]+/gu)) {
      const range = document.createRange();
      range.setStart(walker.currentNode, word.index);
      range.setEnd(walker.currentNode, word.index + word[0].length);
      if (new Set([...range.getClientRects()].map((each) => Math.round(each.top))).size > 1) broken.push(word[0]);
    }
  }
  return broken;
}"""


@contextmanager
def served(folder: Path, urls: dict[str, str], app: str = "app:app", **env: str) -> Iterator[Gunicorn]:
    folder = folder / "served"
    folder.mkdir()
    more = {"ORDER_DESK_TROUBLE": "1", "DBSESSION_INSPECT": str(folder / "sockets"), "WEB_CONCURRENCY": "2"}
    with Gunicorn(
        app,
        "--graceful-timeout=1",
        config=DEMO_CONFIG,
        workers=2,
        env={**environment(urls), **more, **env},
        ready="/healthz",
    ) as server:
        wait_until(lambda: len(live(server)["workers"]) == 2, 30, "both workers are seen")
        yield server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gunicorn]:
    folder = tmp_path_factory.mktemp("t")
    with served(folder, sqlite_urls(folder)) as server:
        yield server


def live(server: Gunicorn) -> Any:
    return json.loads(server.get("/trouble/live").body)


def press(server: Gunicorn, kind: str, **headers: str) -> tuple[int, str]:
    answer = server.get(f"/trouble/{kind}", method="POST", headers=headers, timeout_s=60)
    return answer.status, json.loads(answer.body)["answer"]


@contextmanager
def pressed(server: Gunicorn, *kinds: str) -> Iterator[dict[str, tuple[int, str]]]:
    """Each at once; at the end their answers."""
    found: dict[str, tuple[int, str]] = {}

    def one(kind: str) -> None:
        found[kind] = press(server, kind)

    threads = [threading.Thread(target=one, args=[kind]) for kind in kinds]
    for thread in threads:
        thread.start()
    try:
        yield found
    finally:
        for thread in threads:
            thread.join(90)


def test_order_desk_has_no_panel_unless_the_environment_says_so(tmp_path: Path) -> None:
    """Whoever copies it gets neither the panel nor its scripts."""
    with flask_desk(sqlite_urls(tmp_path)) as desk:
        page = desk.app.test_client().get("/")
        assert "dbsession gives each request its own SQLAlchemy session" in page.text
        assert "trouble" not in page.text and "script" not in page.headers["Content-Security-Policy"]
        assert desk.app.test_client().post("/trouble/hold").status_code == 404


def test_each_trouble_is_real_and_said_while_all_of_them_run_at_once(server: Gunicorn) -> None:
    """They are seen in both workers while they run. What is running is refused a second time."""

    def scopes() -> set[str]:
        now = live(server)
        seen.update(each["scope"] for each in now["holders"])
        waiting.append(sum(each["waiting"] for each in now["databases"]))
        return seen

    seen: set[str] = set()
    waiting: list[int] = []
    expected = {"POST /trouble/hold", "POST /trouble/stream", "transfer 1 to 2", "transfer 2 to 1"}
    with pressed(server, *BUTTONS) as found:
        wait_until(lambda: scopes() >= expected and max(waiting) > 0, 30, "who holds a connection, and who waits")
        status, refusal = press(server, "hold")
        assert status == 409 and "runs already" in refusal
        assert all(each["limit"] == 40 for each in live(server)["databases"])  # both workers' pools
    assert "POST /trouble/release" not in seen
    for kind, expected_answer in ANSWERS.items():
        status, answer = found[kind]
        assert status == 200 and re.search(expected_answer.format(ENDED_WITH["sqlite"]), answer), answer
    assert "came to 2 workers" in found["burst"][1]
    wait_until(lambda: not live(server)["holders"], 30, "nobody holds a connection")


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Host": "evil.example", "Origin": "http://evil.example"},  # DNS rebinding
    ],
)
def test_button_is_refused_when_a_page_of_somebody_else_presses_it(server: Gunicorn, headers: dict[str, str]) -> None:
    status, answer = press(server, "release", **headers)
    assert status == 403 and "another page" in answer
    assert server.get("/trouble/release").status == 405  # no link or picture presses it either


# -- in a browser ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens pages, in which nothing fails and the policy stops nothing."""
    errors: list[str] = []
    with ExitStack() as stack:

        def open_page(url: str, width: int, **options: Any) -> Page:
            context = browser.new_context(viewport={"width": width, "height": 900}, **options)
            stack.callback(context.close)
            context.set_default_timeout(30_000)
            page = context.new_page()
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.on("console", lambda said: "Content Security" in said.text and errors.append(said.text))
            page.goto(url)
            return page

        yield open_page
    assert errors == []


def answer_of(page: Page, kind: str) -> Any:
    return page.locator(f'form[action="/trouble/{kind}"] output')


def press_all(page: Page, backend: str) -> None:
    for name in BUTTONS.values():
        page.get_by_role("button", name=name).focus()
        page.keyboard.press("Enter")
    expect(page.locator("#holders")).to_contain_text("POST /trouble/hold")
    expect(page.locator("#holders")).to_contain_text("trouble.py:")
    expect(page.locator("#databases [data-kind=waiting]")).to_contain_text(re.compile("default: .*[1-9]\\d* waits?;"))
    fits(page)
    for kind, expected in ANSWERS.items():
        expect(answer_of(page, kind)).to_have_text(re.compile(expected.format(ENDED_WITH[backend])))
    expect(page.locator("#held")).to_have_text("Nobody holds a connection.")
    fits(page)


def fits(page: Page) -> None:
    """Nothing scrolls sideways, nothing is cut off, no word is broken."""
    width = page.viewport_size["width"] if page.viewport_size else 0
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert (
        page.evaluate(
            "[...document.querySelectorAll('main *')].filter((e) => e.getBoundingClientRect().right > innerWidth + 0.5)"
            ".map((e) => e.outerHTML)"
        )
        == []
    )
    assert page.evaluate(BROKEN_WORDS) == []


@pytest.mark.slow
@pytest.mark.parametrize("width", [320, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_shows_each_trouble_live_and_fits_when_it_is_narrow(
    server: Gunicorn, open_page: Callable[..., Page], width: int, scheme: str
) -> None:
    order = {"customer": "Ada Lovelace", "item": "pencil, very hard", "quantity": "12", "price_cents": "95"}
    page = open_page(server.url, width, color_scheme=scheme)
    for field, value in order.items():
        page.locator(f"#{field}").fill(value)
    page.get_by_role("button", name="Store order").click()
    expect(page.get_by_text("Ada Lovelace").first).to_be_visible()
    expect(page.locator("#seen")).to_have_text("2 workers answer.")
    press_all(page, "sqlite")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "number", "width"),
    [
        pytest.param("mariadb", "1213", 1280, marks=pytest.mark.mariadb),
        pytest.param("postgresql", "40P01", 320, marks=pytest.mark.postgresql),
        pytest.param("postgresql", "40P01", 1280, marks=pytest.mark.postgresql),
    ],
)
def test_page_shows_a_true_deadlock_when_the_database_is_a_server(
    request: pytest.FixtureRequest, tmp_path: Path, open_page: Callable[..., Page], name: str, number: str, width: int
) -> None:
    with server_urls(request.getfixturevalue(name)) as urls, served(tmp_path, urls) as server:
        page = open_page(server.url, width)
        expect(page.get_by_text(f"a deadlock, error {number}")).to_be_visible()
        press_all(page, name)


@pytest.mark.slow
def test_button_works_and_the_page_says_what_is_missing_when_there_is_no_javascript(
    server: Gunicorn, open_page: Callable[..., Page]
) -> None:
    page = open_page(server.url, 320, java_script_enabled=False)
    expect(page.get_by_text("Without it, a button shows its answer on a page of its own.")).to_be_visible()
    page.get_by_role("button", name=BUTTONS["deadlock"]).click()
    expect(page.locator("body")).to_contain_text("attempt 2 committed")


@pytest.mark.slow
def test_page_says_that_the_server_has_gone_and_goes_on_when_it_is_back(
    tmp_path: Path, open_page: Callable[..., Page]
) -> None:
    with served(tmp_path, sqlite_urls(tmp_path)) as server:
        page = open_page(server.url, 1280)
        page.get_by_role("button", name=BUTTONS["hold"]).click()
        expect(page.locator("#holders")).to_contain_text("POST /trouble/hold")
        before = server.worker_pids()
        kill(before)
        wait_until(lambda: len(set(server.worker_pids()) - set(before)) == 2, 30, "gunicorn has started two others")
        expect(answer_of(page, "hold")).not_to_have_text("Running …")  # Chromium may have sent it to them again
        expect(page.locator("#seen")).to_have_text("2 workers answer.")
        page.get_by_role("button", name=BUTTONS["hold"]).click()
        expect(page.locator("#holders")).to_contain_text("POST /trouble/hold")
        workers = server.worker_pids()
        server.kill()
        kill(workers)
        expect(answer_of(page, "hold")).to_contain_text("No answer: the server has ended the connection.")
        expect(page.locator("#seen")).to_contain_text("The server does not answer")
        expect(page.locator("#holders")).to_be_empty()


def kill(pids: list[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


# What libpq says of a server that does not answer has no SQLSTATE.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "number"),
    [
        pytest.param(MariaDBServer, r" \(2\d+\)", marks=pytest.mark.mariadb, id="mariadb"),
        pytest.param(PostgreSQLServer, "", marks=pytest.mark.postgresql, id="postgresql"),
    ],
)
def test_page_says_that_the_database_does_not_answer(
    tmp_path: Path, open_page: Callable[..., Page], make: Callable[[], Any], number: str
) -> None:
    database = make()
    try:
        with server_urls(database) as urls, served(tmp_path, urls) as server:
            page = open_page(server.url, 1280)
            database.kill()
            for kind in ("hold", "deadlock"):
                page.get_by_role("button", name=BUTTONS[kind]).click()
                expect(answer_of(page, kind)).to_have_text(
                    re.compile(rf"Answered 503, OperationalError{number}: the database is not available, try again\.")
                )
            page.get_by_role("button", name=BUTTONS["burst"]).click()
            expect(answer_of(page, "burst")).to_have_text(
                re.compile(rf"0 of 200 answered 200, .*answered 503 \(OperationalError{number}\)")
            )
            page.get_by_role("button", name=BUTTONS["abandon"]).click()
            expect(answer_of(page, "abandon")).to_contain_text("could not begin: it was answered HTTP/1.1 503")
            expect(page.locator("#seen")).to_have_text("2 workers answer.")
            database.start()
    finally:
        database.close()


@pytest.mark.slow
def test_burst_says_who_was_refused_when_the_wait_for_a_connection_is_too_long(tmp_path: Path) -> None:
    """On pools of two, whose callers wait a second."""
    (tmp_path / "small.py").write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(DEMO_CONFIG.parent)!r})\n"
        "import orders\n"
        "entries = orders.databases\n"
        "options = {'pool_size': 2, 'pool_timeout': 1}\n"
        "orders.databases = lambda: {name: {**each, 'options': options} for name, each in entries().items()}\n"
        "from app import app\n"
    )
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).resolve().parents[1])])
    with served(tmp_path, sqlite_urls(tmp_path), "small:app", PYTHONPATH=path) as server:
        status, answer = press(server, "burst")
        assert status == 200 and re.match(r"\d+ of 200 answered 200, \d+ answered 503 \(PoolTimeout\); longest", answer)
        assert not live(server)["holders"]
        assert sum(each["timeouts"] for each in live(server)["databases"]) > 0
