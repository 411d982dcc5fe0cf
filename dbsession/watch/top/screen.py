"""The screen of `dbsession top`. What comes from a snapshot has no control characters any more, and is put into
rich.Text: data, never markup."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections import deque
from typing import Any, ClassVar

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.events import Resize
from textual.widgets import DataTable, Input, Static

from dbsession.errors import ConfigError, plain
from dbsession.watch.inspection.client import Collected, Workers, none_answers, summary
from dbsession.watch.inspection.usage import Usage, holders, usage
from dbsession.watch.top.text import duration, key_lines, short_call_site

WINDOW_S = 5.0  # that rates and waits are of
BAR = 20
SHOWN_FRAMES = 4

# Column: what it is sorted by, and whether the largest comes first.
SORTED_BY: dict[str, tuple[Any, bool]] = {
    "held": (lambda holder: holder["held_s"], True),
    "state": (lambda holder: (holder["state"], -holder["state_s"]), False),
    "scope": (lambda holder: (holder["scope"], -holder["held_s"]), False),
    "database": (lambda holder: (holder["database"], -holder["held_s"]), False),
}


# Key, what it does, its action. In one line of 80 columns; textual's Footer would cut off what does not fit.
KEYS = (
    ("h", "by held", "sort('held')"),
    ("t", "state", "sort('state')"),
    ("s", "scope", "sort('scope')"),
    ("d", "database", "sort('database')"),
    ("/", "filter", "filter"),
    ("w", "per worker", "per_worker"),
    ("p", "pause", "pause"),
    ("q", "quit", "quit"),
)


class Top(App[None]):
    """The screen; lives until `q`. Asks the folder in a thread, so that a silent worker does not stop the keys."""

    TITLE = "dbsession top"
    ENABLE_COMMAND_PALETTE = False
    CSS = """
    Static { text-wrap: nowrap; text-overflow: ellipsis; }
    #state { height: 1; background: $panel; padding: 0 1; }
    #databases { height: auto; max-height: 40%; margin-bottom: 1; }
    #holders { height: 1fr; min-height: 3; }
    #details { height: auto; max-height: 12; padding: 0 1; border-top: solid $panel; }
    #filter { display: none; height: 3; }
    #keys { height: auto; dock: bottom; background: $footer-background; }
    #keys { link-style: none; link-color: $footer-foreground; link-background: $footer-background; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        *(Binding("slash" if key == "/" else key, action) for key, _, action in KEYS),
        Binding("escape", "no_filter"),
    ]

    def __init__(self, folder: str, interval_s: float = 1.0) -> None:
        super().__init__()
        self._folder = folder
        self._processes = Workers(folder)
        self._interval_s = interval_s
        self._looks: deque[Collected] = deque()  # those of the window, newest last
        self._failure = ""
        self._paused = False
        self._by_process = False
        self._sort = "held"
        self._reversed = False
        self._filter = ""
        self._shown: list[dict[str, Any]] = []  # the holders in the table, in its order

    def compose(self) -> ComposeResult:
        yield Static(id="state")
        yield DataTable(id="databases", cursor_type="none", show_cursor=False)
        yield DataTable(id="holders", cursor_type="row")
        yield Static(id="details")
        yield Input(id="filter", placeholder="a part of any column; Enter keeps it, Escape drops it")
        yield Static(id="keys")

    def on_resize(self, event: Resize) -> None:
        self.query_one("#keys", Static).update(key_lines(KEYS, event.size.width))

    def on_mount(self) -> None:
        self.query_one("#databases").can_focus = False
        self.query_one("#holders").focus()
        self.run_worker(self._look_for_ever())
        self.set_interval(0.5, self._show_state)
        if not self.is_headless:
            self.set_interval(0.5, self._leave_if_alone)

    def _leave_if_alone(self) -> None:
        """End the screen when its terminal has gone. Not everybody whose terminal goes is sent a SIGHUP, and its end is
        no input."""
        if not os.isatty(sys.__stdin__.fileno() if sys.__stdin__ is not None else -1):
            self.exit()

    async def _look_for_ever(self) -> None:
        while True:
            if not self._paused:
                await self.look()
            await asyncio.sleep(self._interval_s)

    async def look(self) -> None:
        """Ask the workers, and show what they say."""
        try:
            now = await asyncio.to_thread(self._processes.look)
            self._failure = ""
        except ConfigError as error:
            self._failure = str(error)
            self._show_state()
            return
        if self._paused:
            return  # pressed meanwhile
        self._looks.append(now)
        while len(self._looks) > 2 and now.time_s - self._looks[1].time_s >= WINDOW_S:
            self._looks.popleft()
        self._show()

    # -- what is shown ---------------------------------------------------------------------------------------------

    def _show(self) -> None:
        self._show_state()
        if self._looks:
            self._show_databases()
            self._show_holders()

    def _show_state(self) -> None:
        text = Text("dbsession top  ", style="bold")
        if self._failure:
            text.append(plain(self._failure), "bold red")
        elif not self._looks:
            text.append("asking ...", "not bold")
        else:
            now = self._looks[-1]
            answered = summary(now) if now.workers else none_answers(self._folder, now)
            late = "".join(f", pid {pid} is late: {age_s:.0f} s old" for pid, age_s in now.late.items())
            all_well = now.workers and not (now.silent or now.unreadable or now.late)
            text.append(answered + late, "not bold" if all_well else "bold red")
            text.append(f", {max(0.0, time.time() - now.time_s):.0f} s old", "not bold")
        if self._paused:
            text.append("  PAUSED", "reverse")
        if self._filter:
            text.append(f"  filter: {plain(self._filter)}", "italic not bold")
        self.query_one("#state", Static).update(text)

    def _show_databases(self) -> None:
        now, earlier = self._looks[-1], self._looks[0]
        found = usage(now, earlier if earlier is not now else None, by_process=self._by_process)
        names = ["database", *(["pid"] if self._by_process else []), "in use", "of the limit", "idle", "waiting"]
        rows = []
        for each in found:
            limit = "" if each.limit is None else f"/{each.limit}"
            per_s = "-" if each.checkouts_per_s is None else f"{each.checkouts_per_s:.1f}"
            cells = [Text(each.database), *([_right(each.pid)] if self._by_process else [])]
            cells += [_right(f"{each.in_use}{limit}"), _bar(each)]
            cells += [_right(each.idle), _alarming(each.waiting), _right(per_s)]
            cells += [
                _alarming(each.counts["timeouts"]),
                _right(duration(each.wait_p50_s)),
                _right(duration(each.wait_p99_s)),
            ]
            rows.append(cells)
        names += ["checkouts/s", "timeouts", "wait p50", "wait p99"]
        _fill(self.query_one("#databases", DataTable), names, rows)

    def _show_holders(self) -> None:
        table = self.query_one("#holders", DataTable)
        chosen = self._chosen()
        scrolled = table.scroll_x, table.scroll_y
        key, largest_first = SORTED_BY[self._sort]
        found = [holder for holder in holders(self._looks[-1]) if self._filter.casefold() in _searched(holder)]
        self._shown = sorted(found, key=key, reverse=largest_first is not self._reversed)
        names = ["held", "state", "for", "scope", "database", "pid", "now at", "last statement"]
        names = [f"{name} {'▲' if self._reversed else '▼'}" if name == self._sort else name for name in names]
        _fill(table, names, [_cells(holder) for holder in self._shown])
        if chosen is not None and self._shown:
            same = [index for index, each in enumerate(self._shown) if _identity(each) == _identity(chosen[1])]
            table.move_cursor(row=same[0] if same else min(chosen[0], len(self._shown) - 1), scroll=False)
        table.scroll_to(*scrolled, animate=False, immediate=True)
        self._show_details()

    def _chosen(self) -> tuple[int, dict[str, Any]] | None:
        row = self.query_one("#holders", DataTable).cursor_row
        return (row, self._shown[row]) if 0 <= row < len(self._shown) else None

    def _show_details(self) -> None:
        chosen = self._chosen()
        text = Text()
        if chosen is None:
            text.append("No connection is in use." if not self._filter else "No holder matches the filter.", "dim")
        else:
            holder = chosen[1]
            text.append(holder["scope"], "bold").append(f" in {holder['greenlet']}\n")
            now = ("now at ", holder["stack"]) if holder["stack"] else ("", [holder["place"]])  # it has ended, say
            for title, stack in (now, ("checked out at ", holder["taken_at"])):
                frames = "\n    ".join(short_call_site(each) for each in stack[:SHOWN_FRAMES])
                text.append(f"{title}{frames}\n" if frames else "", "dim")
            text.append(holder["statement"] or "-")
        self.query_one("#details", Static).update(text)

    # -- keys ------------------------------------------------------------------------------------------------------

    def on_data_table_row_highlighted(self) -> None:
        self._show_details()

    def action_sort(self, column: str) -> None:
        self._reversed = column == self._sort and not self._reversed
        self._sort = column
        self._show()

    def action_per_worker(self) -> None:
        self._by_process = not self._by_process
        self._show()

    def action_pause(self) -> None:
        self._paused = not self._paused
        self._show_state()

    def action_filter(self) -> None:
        box = self.query_one("#filter", Input)
        box.display = True
        box.focus()

    def action_no_filter(self) -> None:
        self.query_one("#filter", Input).clear()
        self._leave_filter()

    def on_input_changed(self, event: Input.Changed) -> None:
        self._filter = event.value
        self._show()

    def on_input_submitted(self) -> None:
        self._leave_filter()

    def _leave_filter(self) -> None:
        self.query_one("#filter").display = False
        self.query_one("#holders").focus()


def _identity(holder: dict[str, Any]) -> tuple[Any, ...]:
    return holder["pid"], holder["database"], holder["scope"], holder["greenlet"]


def _searched(holder: dict[str, Any]) -> str:
    columns = ("state", "scope", "greenlet", "place", "taken_at", "statement", "database", "pid")
    return "\n".join(str(holder[column]) for column in columns).casefold()


def _cells(holder: dict[str, Any]) -> list[Text]:
    state = holder["state"]
    return [
        _right(duration(holder["held_s"])),
        Text(state, style="yellow" if state == "idle in transaction" else ""),
        _right(duration(holder["state_s"])),
        Text(holder["scope"], no_wrap=True),
        Text(holder["database"]),
        _right(f"{holder['pid']}, {holder['late_s']:.0f} s old" if holder["late_s"] else holder["pid"]),
        Text(short_call_site(holder["place"]), no_wrap=True),
        Text(holder["statement"] or "-", no_wrap=True),
    ]


def _fill(table: DataTable[Text], names: list[str], rows: list[list[Text]]) -> None:
    """Show these rows in place of what the table has shown."""
    table.clear(columns=True)
    for index, name in enumerate(names):
        # Left to itself the table finds its widths out when it is idle; what it has drawn before stays cut off.
        table.add_column(name, width=max([Text(name).cell_len, *(row[index].cell_len for row in rows)]))
    for row in rows:
        table.add_row(*row)


def _right(value: object) -> Text:
    return Text(str(value), justify="right")


def _alarming(count: int) -> Text:
    return Text(str(count), style="bold red" if count else "", justify="right")


def _bar(each: Usage) -> Text:
    if not each.limit:
        return Text("")
    part = min(1.0, each.in_use / each.limit)
    full = max(round(part * BAR), 1 if each.in_use else 0)
    colour = "green" if part < 0.7 else "yellow" if part < 0.9 else "red"
    return Text("█" * full, style=colour).append("░" * (BAR - full), "dim")
