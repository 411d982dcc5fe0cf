"""The dashboard in a real browser, before a real gunicorn."""

from __future__ import annotations

import http.client
import json
import os
import re
import select
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from playwright.sync_api import Browser, Page, Route, expect

from support.dashboard import Dashboard, chromium
from support.galera import fixed_ports
from support.gunicorn import Gunicorn
from support.processes import pause_process
from support.snapshots import HARMLESS, HOSTILE, Served, database, scope, worker
from support.snapshots import holder as holder_of
from support.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
SHOWN_S = 2  # within which the page shows what happens, on a machine that has nothing else to do
STATE = "#state"
PAUSED = re.compile(r"paused, as of (\d\d|[2-9]|\d+ min)")  # for two seconds or more

expect.set_options(timeout=30_000)

# Runs in the page before its own script, and keeps what the policy stopped.
WATCH = "addEventListener('securitypolicyviolation', (e) => (window.stopped ??= []).push(e.blockedURI))"


@contextmanager
def serve(folder: Path) -> Iterator[Gunicorn]:
    """An application with one worker and a pool of two, whose snapshot is served in `folder`/sockets."""
    with Gunicorn(
        "support.holding_app:application",
        "--worker-class=gevent",
        "--graceful-timeout=1",
        config=ROOT / "deploy" / "gunicorn.conf.py",
        env={"HOLDING_URL": f"sqlite:///{folder}/a.db", "DBSESSION_INSPECT": str(folder / "sockets")},
        ready="/",
    ) as server:
        try:
            yield server
        finally:
            with suppress(OSError, http.client.HTTPException):
                server.get("/release")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def module_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("d")


@pytest.fixture(scope="module")
def server(module_folder: Path) -> Iterator[Gunicorn]:
    with serve(module_folder) as server:
        yield server


@pytest.fixture(scope="module")
def dashboard(server: Gunicorn, module_folder: Path) -> Iterator[Dashboard]:
    with Dashboard(module_folder / "sockets") as dashboard:
        yield dashboard


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens pages; at the end none has met an error, and the policy has stopped nothing."""
    pages: list[Page] = []
    errors: list[str] = []
    with ExitStack() as stack:

        def open_page(url: str, **options: Any) -> Page:
            context = browser.new_context(**options)
            stack.callback(context.close)
            context.set_default_timeout(30_000)
            context.add_init_script(WATCH)
            page = context.new_page()
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.goto(url)
            pages.append(page)
            return page

        yield open_page
        assert [page.evaluate("window.stopped ?? []") for page in pages] == [[]] * len(pages)
        assert errors == []


@pytest.fixture
def page(open_page: Callable[..., Page], dashboard: Dashboard) -> Page:
    """The page, which has had its first answer, and shows nobody of the test before any more."""
    page = open_page(dashboard.url)
    expect(page.locator(STATE)).to_have_text("1 worker")
    expect(rows(page)).to_have_count(0)
    return page


@contextmanager
def holding(server: Gunicorn, *paths: str) -> Iterator[None]:
    """A request to each path under /hold/, which holds a connection inside the block."""
    requests = [holder(server, path) for path in paths]
    try:
        yield
    finally:
        server.get("/release")
        for request in requests:
            request.join(30)


def holder(server: Gunicorn, path: str) -> threading.Thread:
    """A request that holds a connection until it is released."""
    request = threading.Thread(target=server.get, args=(f"/hold/{quote(path)}",), kwargs={"timeout_s": 240})
    request.start()
    return request


def state(page: Page) -> Any:
    """What the dashboard tells who asks now."""
    return page.request.get(f"{page.url}state").json()


def wait_for_holder(page: Page) -> None:
    """Until the dashboard has seen it, whatever its page shows."""
    wait_until(lambda: "/hold/" in json.dumps(state(page)["holders"]), 30, "the dashboard has seen the request")


def rows(page: Page, table: str = "holders") -> Any:
    # The first worker's own `dbsession check`, a thread, may hold a connection for a moment, too.
    found = page.locator(f"#{table} tbody tr")
    return found.filter(has_text="/hold/") if table == "holders" else found


def test_dashboard_shows_who_holds_a_connection_as_long_as_it_does(server: Gunicorn, page: Page) -> None:
    """With its route, where it was taken, and the last statement without its values."""
    expect(page.get_by_text("Nobody holds a connection.")).to_be_visible()
    assert 2 * state(page)["interval_s"] <= SHOWN_S  # the dashboard looks so often, and the page asks it so often
    with holding(server, "orders/7"):
        row = rows(page)
        expect(row).to_have_count(1)
        expect(row).to_contain_text("GET /hold/orders/7")
        expect(row).to_contain_text("support/holding_app.py")
        expect(row).to_contain_text("SELECT ? AS held")
        expect(row).not_to_contain_text("a literal")
        expect(page.locator(".card .use")).to_have_text("1 of 2 in use")
        expect(page.get_by_role("meter", name="default: in use")).to_have_attribute("aria-valuenow", "1")
        expect(rows(page, "scopes").filter(has_text="GET /hold/orders/7")).to_have_count(1)
    expect(rows(page)).to_have_count(0)
    expect(page.locator(".card .use")).to_have_text("0 of 2 in use")


def test_dashboard_shows_markup_and_control_characters_as_text(tmp_path: Path, open_page: Callable[..., Page]) -> None:
    """Of a route, which anybody on the network may choose, and of all else that a worker says."""
    texts = dict.fromkeys(("scope", "greenlet", "database", "state", "place", "statement"), HOSTILE)
    odd = holder_of(**texts, taken_at=(HOSTILE,))
    said = worker(7, database(HOSTILE, backend=HOSTILE), holders=[odd], scopes=[scope(HOSTILE)])
    with Served(tmp_path / "<b>\x1b", said) as served, Dashboard(served.folder) as own:
        page = open_page(own.url)
        for place, count in ((".card .bar", 2), ("#holders td", 6), ("#scopes td", 1)):
            expect(page.locator(place).filter(has_text=HARMLESS).first).to_be_visible()
            text = "".join(page.locator(place).all_text_contents())
            assert text.count(HARMLESS) >= count and text.isprintable()
        assert page.locator("main img, main script").count() == 0
        assert page.evaluate("window.hit") is None


@pytest.mark.slow
def test_dashboard_draws_charts_that_have_words_for_who_does_not_see_them(server: Gunicorn, page: Page) -> None:
    with holding(server, "a"):
        chart = page.get_by_role("img", name="In use: now 1 of 2; at most")
        expect(chart).to_be_visible()
        line = chart.locator("path.line")
        before = line.get_attribute("d")
        assert before
        wait_until(lambda: len(line.get_attribute("d") or "") > len(before), 30, "the line goes on")
    for name in ("Waiting: now 0", "Wait: now p50"):
        expect(page.get_by_role("img", name=name)).to_be_visible()


@pytest.mark.slow
def test_dashboard_shows_who_waits_and_who_waited_in_vain(server: Gunicorn, page: Page) -> None:
    facts = page.locator(".card > .facts")
    with holding(server, "a", "b", "c"):
        expect(rows(page)).to_have_count(2)
        expect(facts).to_contain_text("waiting1")
        expect(page.locator(".card")).to_have_attribute("data-level", "waiting")
        expect(facts).to_contain_text("timeouts1")
        expect(facts).to_contain_text("waiting0")
        expect(facts.locator(".bad")).to_have_text("1")


@pytest.mark.slow
def test_holders_are_sorted_by_the_column_that_was_chosen(server: Gunicorn, page: Page) -> None:
    """By keyboard, the other way at the second time; the longest first to begin with."""
    with holding(server, "b"):
        expect(rows(page)).to_have_count(1)
        with holding_more(server, page, "a"):
            headers = page.locator("#holders th")
            expect(rows(page).first).to_contain_text("/hold/b")
            expect(headers.filter(has_text="held")).to_have_attribute("aria-sort", "descending")
            button = page.locator("#holders").get_by_role("button", name="scope")
            button.focus()
            page.keyboard.press("Enter")
            expect(headers.filter(has_text="scope")).to_have_attribute("aria-sort", "ascending")
            expect(page.locator("#holders th[aria-sort]")).to_have_count(1)
            expect(rows(page).first).to_contain_text("/hold/a")
            page.keyboard.press("Enter")
            expect(headers.filter(has_text="scope")).to_have_attribute("aria-sort", "descending")
            expect(rows(page).first).to_contain_text("/hold/b")


@contextmanager
def holding_more(server: Gunicorn, page: Page, path: str) -> Iterator[None]:
    """One more request that holds a connection, later than those that do."""
    request = holder(server, path)
    try:
        expect(rows(page)).to_have_count(2)
        yield
    finally:
        server.get("/release")
        request.join(30)


@pytest.mark.slow
def test_holders_are_filtered_by_what_is_typed(server: Gunicorn, page: Page) -> None:
    """Any column, in any case."""
    with holding(server, "orders", "reports"):
        expect(rows(page)).to_have_count(2)
        field = page.get_by_label("Filter").first
        field.fill("HOLD/REP")
        expect(rows(page)).to_have_count(1)
        expect(rows(page)).to_contain_text("reports")
        expect(page.locator("#holders")).to_contain_text("1 of 2 match the filter.")
        field.fill("[")
        expect(rows(page)).to_have_count(0)
        field.fill("")
        expect(rows(page)).to_have_count(2)


@pytest.mark.slow
def test_holder_that_was_opened_stays_open_while_the_page_goes_on(server: Gunicorn, page: Page) -> None:
    """And keeps the focus; inside is the stack."""
    with holding(server, "a"):
        expect(rows(page)).to_have_count(1)  # those of the test before have gone
        summary = rows(page).locator("summary")
        summary.focus()
        page.keyboard.press("Enter")
        expect(rows(page).locator("li").first).to_contain_text("support/holding_app.py")
        assert rows(page).locator("li").count() > 1
        held = rows(page).locator("td").first
        before = held.text_content()
        expect(held).not_to_have_text(before or "")
        expect(rows(page).locator("details")).to_have_attribute("open", "")
        expect(summary).to_be_focused()


@pytest.mark.slow
def test_page_stands_still_while_it_is_paused(server: Gunicorn, page: Page) -> None:
    pause = page.get_by_role("button", name="Pause")
    pause.click()
    expect(pause).to_have_attribute("aria-pressed", "true")
    expect(page.locator("#age")).to_contain_text("paused")
    with holding(server, "a"):
        wait_for_holder(page)
        # The age goes on, so the page is alive; its data does not.
        expect(page.locator("#age")).to_contain_text(PAUSED)
        expect(rows(page)).to_have_count(0)
        pause.click()
        expect(rows(page)).to_have_count(1)


@pytest.mark.slow
def test_answer_that_comes_after_the_pause_is_not_shown(server: Gunicorn, page: Page) -> None:
    answers: list[Route] = []
    page.evaluate("AbortSignal.timeout = () => new AbortController().signal")  # it waits for as long as this test does
    page.route("**/state?*", lambda route: answers.append(route))
    wait_until(lambda: page.evaluate("true") and answers, 30, "the page asks")
    page.get_by_role("button", name="Pause").click()
    with holding(server, "a"), page.expect_response("**/state?*") as held:
        wait_for_holder(page)
        answers[0].continue_()
    held.value.finished()
    age = page.locator("#age")
    expect(age).to_contain_text(PAUSED)
    expect(age).not_to_have_text(age.text_content() or "")  # the page has had its turn since
    expect(rows(page)).to_have_count(0)


def test_page_is_usable_by_keyboard_alone(server: Gunicorn, page: Page) -> None:
    """The first stop leads past the head; the focus shows; all that follow are left again by the same key."""
    page.keyboard.press("Tab")
    skip = page.get_by_role("link", name="Skip to the content")
    expect(skip).to_be_focused()
    expect(skip).to_be_in_viewport()
    expect(skip).not_to_have_css("outline-style", "none")
    page.keyboard.press("Enter")
    expect(page.locator("#main")).to_be_focused()
    with holding(server, "a"):
        expect(rows(page)).to_have_count(1)
        stops: list[str] = []
        while len(stops) < 50:
            page.keyboard.press("Tab")
            stop = page.evaluate("document.activeElement === document.body ? '' : document.activeElement.outerHTML")
            if not stop:
                break
            stops.append(stop)
        shown = page.locator("#main :is(button, input, summary):visible").count()
    assert len(stops) == shown > 15, stops


@pytest.mark.slow
@pytest.mark.parametrize("width", [320, 360, 768])
def test_page_fits_when_it_is_narrow(
    server: Gunicorn, dashboard: Dashboard, open_page: Callable[..., Page], width: int
) -> None:
    """However long a route is: no scrolling sideways, and nothing is cut off."""
    page = open_page(dashboard.url, viewport={"width": width, "height": 740})
    with holding(server, "x" * 300):
        expect(rows(page)).to_contain_text("x" * 300)
        assert page.evaluate("document.documentElement.scrollWidth") == width
        outside = page.evaluate(
            "(width) => [...document.querySelectorAll('main *')].filter((e) =>"
            " e.getBoundingClientRect().right > width + 0.5).map((e) => e.outerHTML)",
            width,
        )
        assert outside == []


def luminance(colour: str) -> float:
    """Of `rgb(r, g, b)`, roughly: 0 black, 1 white."""
    return sum(int(part) for part in colour[4:-1].split(",")) / 765


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "dark"), [("light", False), ("dark", True)])
def test_page_is_dark_when_the_browser_is(
    dashboard: Dashboard, open_page: Callable[..., Page], scheme: str, dark: bool
) -> None:
    page = open_page(dashboard.url, color_scheme=scheme)
    style = "getComputedStyle(document.body)"
    background = luminance(page.evaluate(f"{style}.backgroundColor"))
    text = luminance(page.evaluate(f"{style}.color"))
    assert (background < 0.2 and text > 0.8) if dark else (background > 0.8 and text < 0.2)


@pytest.mark.slow
def test_nothing_moves_by_itself_when_the_browser_says_so(dashboard: Dashboard, open_page: Callable[..., Page]) -> None:
    page = open_page(dashboard.url, reduced_motion="reduce")
    expect(page.locator(".fill")).to_have_css("transition-property", "none")


def points_drawn(page: Page) -> int:
    """Of what is in use."""
    path = page.locator(".card path.line").first.get_attribute("d") or ""  # waits for a card
    return path.count("M") + path.count("L")


@pytest.mark.slow
def test_page_goes_on_when_the_dashboard_was_started_anew(
    server: Gunicorn, module_folder: Path, open_page: Callable[..., Page]
) -> None:
    """It says that it is away, and then needs nobody to reload it."""
    (port,) = fixed_ports(1)  # nobody else's meanwhile
    with Dashboard(module_folder / "sockets", f"--port={port}") as first:
        page = open_page(first.url)
        expect(page.locator(STATE)).to_have_text("1 worker")
        wait_until(lambda: points_drawn(page) > 0, 30, "the worker's own check has made its engine")
        assert first.end() == 0
        expect(page.locator(STATE)).to_have_text("The dashboard does not answer")
        expect(page.locator("#notice")).to_be_visible()
        told = points_drawn(page)
    with Dashboard(module_folder / "sockets", f"--port={port}"):
        expect(page.locator(STATE)).to_have_text("1 worker")
        expect(page.locator("#notice")).to_be_hidden()
        expect(page.locator(".card")).to_have_count(1)
        assert points_drawn(page) > told  # it still has what the first one told


@pytest.mark.slow
def test_page_goes_on_when_gunicorn_was_started_anew(tmp_path: Path, open_page: Callable[..., Page]) -> None:
    folder = tmp_path / "sockets"
    folder.mkdir(0o700)
    with Dashboard(folder) as own:
        page = open_page(own.url)
        for _ in range(2):
            expect(page.locator(STATE)).to_have_text("No worker answers")
            expect(page.locator("#notice")).to_contain_text(f"No worker answers in {folder}.")
            with serve(tmp_path):
                expect(page.locator(STATE)).to_have_text("1 worker")
                expect(page.locator("#notice")).to_be_hidden()
                expect(page.locator(".card .use")).to_have_text("0 of 2 in use")
        expect(page.locator(".card .use")).to_have_text("no worker has it")


def test_dashboard_on_its_socket_is_reached_by_a_tunnel_and_leaves_nothing(
    server: Gunicorn, module_folder: Path, open_page: Callable[..., Page]
) -> None:
    """As by `ssh -L 8765:<socket>`. The log has no word of who asked."""
    folder = module_folder / "sockets"
    with Dashboard(folder, "--socket") as own, tunnel(own.url) as port:
        assert own.url == str(folder / "dashboard.sock") and Path(own.url).stat().st_mode & 0o777 == 0o600
        page = open_page(f"http://127.0.0.1:{port}/")
        expect(page.locator(STATE)).to_have_text("1 worker")
        expect(page.locator("footer")).to_contain_text(f"ssh -L 8765:{own.url} HOST")
        assert page.request.get(page.url, headers={"Host": "evil.example"}).status == 403
        assert own.end() == 0
        assert "GET" not in own.logs() and not Path(own.url).exists()


@contextmanager
def tunnel(path: str) -> Iterator[int]:
    """A port of loopback from which each connection goes on to the socket."""

    def carry(client: socket.socket) -> None:
        with suppress(OSError), client, socket.socket(socket.AF_UNIX) as server:
            server.connect(path)
            other = {client: server, server: client}
            while True:
                for end in select.select([client, server], [], [])[0]:
                    piece = end.recv(65536)
                    if not piece:
                        return
                    other[end].sendall(piece)

    def accept() -> None:
        carrying = []
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                carrying.append(threading.Thread(target=carry, args=[client]))
                carrying[-1].start()
        for each in carrying:
            each.join(30)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=accept)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(60)


def test_paused_worker_is_shown_with_the_age_of_its_snapshot(
    server: Gunicorn, dashboard: Dashboard, page: Page
) -> None:
    with holding(server, "late"):
        expect(rows(page)).to_have_count(1)
        (pid,) = server.worker_pids()
        pause_process(pid)
        try:
            expect(page.locator("#age")).to_contain_text(re.compile(f"live, pid {pid} is late: [2-9] s old"))
            expect(rows(page)).to_contain_text(re.compile(f"{pid}, [2-9] s old"))
            expect(page.locator(STATE)).to_have_text("1 worker")
        finally:
            os.kill(pid, signal.SIGCONT)
        expect(page.locator("#age")).to_have_text("live")
