"""`dbsession top`: who uses the connections of all workers of a folder, in a terminal, as text, or as JSON."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from typing import Any

from dbsession.errors import plain, to_install
from dbsession.watch.inspection import sockets as folders
from dbsession.watch.inspection.client import Collected, collect, none_answers, summary
from dbsession.watch.inspection.usage import Usage, holders, usage
from dbsession.watch.top.text import duration, table
from dbsession.watch.usage_errors import WrongUsage


def add_top(commands: Any) -> None:
    """Add `top` to argparse's sub-commands."""
    parser = commands.add_parser(
        "top",
        help="who uses the databases' connections, in all workers that serve their snapshots",
        description="Exit status: 0; with --once or --json 1 when no worker answers; 2 for wrong usage.",
    )
    folders.add_option(parser)
    parser.add_argument("--once", action="store_true", help="print it once, as text")
    parser.add_argument("--json", action="store_true", help="print the workers' snapshots once, as JSON")
    parser.add_argument(
        "--interval", type=_interval, default=1.0, metavar="S", help="seconds between looks (default: 1)"
    )
    parser.examples = (
        "dbsession top --folder /run/shop",
        "DBSESSION_INSPECT=/run/shop dbsession top --once",
        "dbsession top --folder /run/shop --json",
    )
    parser.set_defaults(run=_run)


def _interval(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 60:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds from 0.1 to 60")
    return seconds


def _run(options: argparse.Namespace) -> int:
    """The exit status: 0, 1 when no worker answers (not on the screen, which waits for one), 2 wrong usage."""
    if not options.folder:
        raise WrongUsage(folders.UNNAMED)
    if not (options.once or options.json):
        return _live(options)
    now = collect(options.folder, text=str if options.json else plain)  # JSON has escapes of its own
    if options.json:
        print(json.dumps({"workers": now.workers, "silent": now.silent, "unreadable": now.unreadable}))
    elif now.workers:
        print("\n".join(lines(now)))
    if not now.workers:
        print(f"dbsession top: {none_answers(options.folder, now)}", file=sys.stderr)
        return 1
    return 0


def _live(options: argparse.Namespace) -> int:
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise WrongUsage("This is no terminal: use --once or --json.")
    if importlib.util.find_spec("textual") is None:
        raise WrongUsage(f"The screen needs textual: {to_install('top')}. (--once and --json do not.)")
    from dbsession.watch.top.screen import Top

    Top(options.folder, options.interval).run()
    return 0


def lines(now: Collected) -> list[str]:
    """Write what the screen shows, as text."""
    titles = "database", "in use", "limit", "idle", "waiting", "checkouts", "timeouts", "wait p50", "wait p99"
    databases = [titles, *map(_database, usage(now))]
    text = [summary(now, pids=True), "", *table(databases, "lrrrrrrrr"), ""]
    held = [("held", "state", "for", "scope", "database", "pid", "now at", "last statement")]
    held += [
        (
            duration(each["held_s"]),
            each["state"],
            duration(each["state_s"]),
            each["scope"],
            each["database"],
            str(each["pid"]),
            ", checked out at ".join([each["place"], *each["taken_at"][:1]]),
            each["statement"] or "-",
        )
        for each in holders(now)
    ]
    return text + (table(held, "rlrllrll") if len(held) > 1 else ["No connection is in use."])


def _database(each: Usage) -> tuple[str, ...]:
    limit = "-" if each.limit is None else str(each.limit)
    counts = each.idle, each.waiting, each.counts["checkouts"], each.counts["timeouts"]
    waits = duration(each.wait_p50_s), duration(each.wait_p99_s)
    return each.database, str(each.in_use), limit, *map(str, counts), *waits
