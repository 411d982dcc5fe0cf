"""The screen of `dbsession top`, driven by its keys over sockets that serve what the test says."""

from __future__ import annotations

import asyncio
import re
import time
from contextlib import ExitStack
from functools import partialmethod
from unittest.mock import patch

import pytest
from textual.widgets import DataTable, Input, Static

from dbsession.watch.inspection.client import Workers
from dbsession.watch.top.screen import Top
from support.snapshots import HARMLESS, HOSTILE, Served, database, holder, worker

BAR_OF_ONE = "█" + "░" * 19


def snapshot(pid, *holders):
    return worker(pid, database(in_use=len(holders), idle=1, checkouts=5), holders=[*holders])


@pytest.fixture
def workers(tmp_path):
    with ExitStack() as stack:
        yield lambda *snapshots: stack.enter_context(Served(tmp_path / "sockets", *snapshots))


def drive(folder, *steps, size=(160, 40), timeout_s=20):
    """Run the screen: it looks once; then each step is a key to press, or a function of the screen to call, and to
    await if it says so."""

    async def run():
        screen = Top(str(folder), 3600.0)  # looks when it is told to
        async with screen.run_test(size=size) as pilot:
            await screen.look()
            await pilot.pause()
            for step in steps:
                if isinstance(step, str):
                    await pilot.press(step)
                elif (waited := step(screen)) is not None:
                    await waited
                await pilot.pause()
            await pilot.press("q")

    # In a second all workers answer, but on a busy machine.
    with patch.object(Workers, "look", partialmethod(Workers.look, timeout_s)):
        asyncio.run(asyncio.wait_for(run(), 200))


def look(screen):
    return screen.look()


def cells(screen, table="holders"):
    found = screen.query_one(f"#{table}", DataTable)
    return [[str(cell) for cell in found.get_row_at(row)] for row in range(found.row_count)]


def scopes(screen):
    return [row[3] for row in cells(screen)]


def said(screen, which):
    return str(screen.query_one(f"#{which}", Static).content)


def shown(check):
    """Waits until it is drawn as `check(screen)` asserts: the pilot takes a screen that gets no processor for an idle
    one."""

    async def waits(screen):
        end = time.monotonic() + 20
        while True:
            late = time.monotonic() >= end
            try:
                return check(screen)
            except AssertionError:
                if late:
                    raise
            await asyncio.sleep(0.02)

    return waits


def expect(read, value):
    def check(screen):
        assert read(screen) == value

    return shown(check)


def test_screen_shows_databases_and_holders_of_all_workers_longest_first(workers, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    one = snapshot(1, holder("GET /a", 2.0), holder("GET /c", 0.5))
    folder = workers(one, snapshot(2, holder("GET /b", 700.0))).folder

    def check(screen):
        [database] = cells(screen, "databases")
        assert database[:5] == ["default", "3/40", "██░░░░░░░░░░░░░░░░░░", "2", "0"]
        assert scopes(screen) == ["GET /b", "GET /a", "GET /c"]
        longest = cells(screen)[0]
        assert longest[:3] == ["12 min", "idle in transaction", "12 min"]
        assert longest[4:] == ["default", "2", "shop/orders.py:12 in get_order", "SELECT ?"]
        assert "2 workers, 0 s old" in said(screen, "state")
        assert said(screen, "details").startswith("GET /b in a greenlet\nnow at shop/orders.py:12 in get_order\nSELECT")

    def later(screen):
        now[0] += 3

    drive(folder, shown(check), later, expect(lambda screen: "2 workers, 3 s old" in said(screen, "state"), True))


def test_keys_sort_by_their_column_and_the_other_way_when_pressed_again(workers):
    first = holder("GET /b", 3.0, database="audit", state="executing")
    folder = workers(snapshot(1, first, holder("GET /c", 2.0), holder("GET /a", 1.0, state="idle"))).folder
    drive(
        folder,
        expect(scopes, ["GET /b", "GET /c", "GET /a"]),
        "h",
        expect(scopes, ["GET /a", "GET /c", "GET /b"]),
        "s",
        expect(scopes, ["GET /a", "GET /b", "GET /c"]),
        "s",
        expect(scopes, ["GET /c", "GET /b", "GET /a"]),
        "t",
        expect(scopes, ["GET /b", "GET /a", "GET /c"]),
        "d",
        expect(scopes, ["GET /b", "GET /c", "GET /a"]),
        "h",
        expect(scopes, ["GET /b", "GET /c", "GET /a"]),
    )


def test_key_shows_each_worker_by_itself_and_all_together_again(workers):
    folder = workers(snapshot(1, holder("GET /a")), snapshot(2)).folder

    def first_columns(screen):
        return [row[:3] for row in cells(screen, "databases")]

    by_worker = [["default", "1", "1/20"], ["default", "2", "0/20"]]
    together = [["default", "1/40", BAR_OF_ONE]]
    drive(folder, "w", expect(first_columns, by_worker), "w", expect(first_columns, together))


def test_pause_keeps_what_is_shown_until_it_is_pressed_again(workers):
    running = workers(snapshot(1, holder("GET /a")))

    def change(screen):
        running.said[1] = snapshot(1, holder("GET /b"))

    drive(
        running.folder,
        "p",
        change,
        look,
        expect(scopes, ["GET /a"]),
        expect(lambda screen: "PAUSED" in said(screen, "state"), True),
        "p",
        look,
        expect(scopes, ["GET /b"]),
    )


@pytest.mark.slow
def test_filter_takes_a_part_of_any_column_and_is_dropped_by_escape(workers):
    folder = workers(snapshot(1, holder("GET /a", statement="INSERT INTO orders"), holder("POST /b"))).folder
    drive(
        folder,
        "slash",
        *"insert",
        expect(scopes, ["GET /a"]),
        "enter",
        "s",  # a key again, and no letter
        expect(scopes, ["GET /a"]),
        expect(lambda screen: screen.query_one("#filter", Input).value, "insert"),
        "escape",
        expect(scopes, ["GET /a", "POST /b"]),
        "slash",
        *"nothing",
        expect(scopes, []),
        expect(lambda screen: said(screen, "details"), "No holder matches the filter."),
    )


def test_cursor_stays_with_its_holder_when_others_come_and_go(workers):
    chosen = holder("GET /b", 2.0, place="/srv/b.py:1 in b")
    running = workers(snapshot(1, holder("GET /a", 3.0), chosen))

    def change(screen):
        running.said[1] = snapshot(1, holder("GET /c", 9.0), holder("GET /a", 4.0), chosen | {"held_s": 3.0})

    def of_b(screen):
        return said(screen, "details").startswith("GET /b")

    drive(running.folder, expect(of_b, False), "down", expect(of_b, True), change, look, expect(of_b, True))


def test_markup_and_control_characters_of_a_snapshot_are_shown_as_they_are(workers):
    texts = ("scope", "greenlet", "database", "state", "place", "statement")
    bad = holder(taken_at=(HOSTILE,), **dict.fromkeys(texts, HOSTILE))
    folder = workers(worker(1, database(HOSTILE), holders=[bad])).folder

    def check(screen):
        [row] = cells(screen)
        assert [row[1], *row[3:5], *row[6:]] == [HARMLESS] * 5
        details = f"{HARMLESS} in {HARMLESS}\nnow at {HARMLESS}\nchecked out at {HARMLESS}\n{HARMLESS}"
        assert said(screen, "details") == details
        assert cells(screen, "databases")[0][0] == HARMLESS
        drawn = "\n".join(strip.text for strip in screen.screen._compositor.render_strips())
        assert HARMLESS in drawn and all(each.isprintable() for each in drawn.splitlines())

    drive(folder, shown(check))


def test_late_worker_is_shown_with_its_age_and_an_unreadable_one_is_named(workers):
    running = workers(snapshot(1, holder("GET /a")), snapshot(2))

    def change(screen):
        running.said[1] = None
        running.said[2] = b"{}"

    def check(screen):
        assert scopes(screen) == ["GET /a"] and re.fullmatch(r"1, \d+ s old", cells(screen)[0][5])
        state = said(screen, "state")
        assert "1 worker, pid 2 gave an answer that cannot be read (" in state
        assert re.search(r", pid 1 is late: \d+ s old, \d+ s old", state)

    drive(running.folder, expect(scopes, ["GET /a"]), change, look, shown(check), size=(300, 40), timeout_s=0.5)


def test_columns_have_room_for_their_cells_when_they_are_drawn_at_once(workers):
    """Widths that a table finds out when it is idle come too late on a busy machine, and what was drawn stays."""
    folder = workers(snapshot(1, holder("GET /a/long/path", statement="SELECT a, long, list"))).folder

    def check(screen):
        screen._show()
        drawn = {name: screen.query_one(f"#{name}", DataTable).render_line(1).text for name in ("holders", "databases")}
        assert "GET /a/long/path" in drawn["holders"] and "SELECT a, long, list" in drawn["holders"]
        assert BAR_OF_ONE in drawn["databases"]

    drive(folder, expect(scopes, ["GET /a/long/path"]), check)


def test_screen_says_when_nobody_answers_and_who_is_silent(workers, tmp_path):
    drive(tmp_path / "none", expect(lambda s: "No worker serves its snapshot in" in said(s, "state"), True))
    running = workers(snapshot(1, holder("GET /a")))
    running.said[1] = b""
    drive(running.folder, expect(lambda s: "No worker answers, silent: 1." in said(s, "state"), True))
    (tmp_path / "file").write_text("")
    drive(tmp_path / "file", expect(lambda s: "[DBS-CONFIG]" in said(s, "state"), True))


def test_screen_fits_a_small_terminal(workers):
    folder = workers(snapshot(1, *[holder(f"GET /{n}") for n in range(60)])).folder
    drive(folder, *["down"] * 3, "w", "end", size=(40, 12))


KEY_LINE = ["h by held", "t state", "s scope", "d database", "/ filter", "w per worker", "p pause", "q quit"]


@pytest.mark.parametrize(("width", "height"), [(30, 3), (60, 2), (79, 2), (80, 1), (120, 1)])
def test_every_key_is_shown_whole_in_a_terminal_of_any_width(workers, width, height):
    def whole(screen):
        line = screen.query_one("#keys")
        region = line.region
        assert (region.height, region.bottom, region.width) == (height, 24, width)
        found = [re.split(" {2,}", line.render_line(y).text.rstrip()) for y in range(height)]
        assert [key for keys in found for key in keys] == KEY_LINE

    drive(workers(snapshot(1)).folder, shown(whole), size=(width, 24))


def test_key_that_is_clicked_acts_as_if_it_were_pressed(workers):
    async def run():
        screen = Top(str(workers(snapshot(1)).folder), 3600.0)
        async with screen.run_test(size=(60, 24)) as pilot:
            await screen.look()
            await pilot.pause()
            await pilot.click("#keys", offset=(14, 1))  # "p pause", in the second line
            await pilot.pause()
            await shown(_assert_paused)(screen)

    def _assert_paused(screen):
        assert said(screen, "state").endswith("PAUSED")

    asyncio.run(asyncio.wait_for(run(), 60))
