"""`dbsession check` on the command line: which databases, and how the report is written."""

from __future__ import annotations

import argparse
import importlib
import json
import operator
import os
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from gevent import monkey
from sqlalchemy.engine import Engine

from dbsession.core import sources
from dbsession.errors import DBSessionError, UnknownDatabase, describe, masked, plain, raised_at
from dbsession.green import api
from dbsession.green.manager import SessionManager
from dbsession.watch.check import report as check
from dbsession.watch.check.budget import Workers
from dbsession.watch.check.report import Report
from dbsession.watch.usage_errors import WrongUsage

_WIDTH = 120

EngineOf = Callable[[str], Engine]


def add_check(commands: Any) -> None:
    """Add `check` to argparse's sub-commands."""
    parser = commands.add_parser(
        "check",
        help="look at each database before a deploy: reachable, its settings, driver and pool, the connection budget",
        description="Exit status: 0 without errors (there may be warnings), 1 with errors, 2 for wrong usage.",
    )
    parser.add_argument("names", nargs="*", metavar="name", help="only these databases (default: all that are known)")
    parser.add_argument(
        "--config",
        metavar="MODULE[:ATTRIBUTE]",
        help="a module that calls dbsession.configure(), or its attribute with what configure() takes (default: "
        "DBSESSION_URL and DBSESSION_<NAME>_URL)",
    )
    parser.add_argument(
        "--workers",
        type=_positive,
        metavar="N",
        help="gunicorn's workers (default: those of GUNICORN_CMD_ARGS, else WEB_CONCURRENCY, else 1)",
    )
    parser.add_argument(
        "--worker-connections",
        type=_positive,
        metavar="N",
        help="of each worker (default: those of GUNICORN_CMD_ARGS, else not looked at)",
    )
    parser.add_argument("--json", action="store_true", help="the report as JSON")
    parser.examples = (
        "DBSESSION_URL=sqlite:///shop.db dbsession check",
        "dbsession check --config shop:DATABASES --workers 8 --worker-connections 100",
        "dbsession check --config shop:DATABASES --json default",
    )
    parser.set_defaults(run=_run)


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of them: give a whole one from 1 on")
    return int(text)


def _run(options: argparse.Namespace) -> int:
    with warnings.catch_warnings():
        # As in a gevent worker, so that the drivers can be judged. That ssl was imported before is its warning.
        warnings.simplefilter("ignore", monkey.MonkeyPatchWarning)
        monkey.patch_all()
    known, engine_of = _databases(options.config)
    names = options.names or known
    if not names:
        raise WrongUsage(
            "No database is known: set DBSESSION_URL or DBSESSION_<NAME>_URL, or give --config (and, where that is a "
            f"callable, the names).{sources.unread()}"
        )
    workers = Workers.of_environment(options.workers, options.worker_connections)
    report = check.examine(names, engine_of, workers)
    print(json.dumps(report.as_json(), indent=2) if options.json else "\n".join(_lines(report)), flush=True)
    return 1 if report.status == "error" else 0


def _databases(target: str | None) -> tuple[list[str], EngineOf]:
    """The names that are known, and what gives the engine of one. Raises WrongUsage, ConfigError."""
    if target is None:
        return api.manager.known(), api.get_engine
    module_name, _, attribute = target.partition(":")
    shown, shown_attribute = masked(module_name), masked(target).partition(":")[2]
    sys.path.insert(0, os.getcwd())  # as gunicorn and flask do
    try:
        module = importlib.import_module(module_name)
    except DBSessionError as error:
        raise WrongUsage(f"--config: importing {shown!r} failed: {error}") from None
    except Exception as error:  # its text may hold anything, a URL with its password too
        missing = f" of {masked(error.name)!r}" if isinstance(error, ImportError) and error.name else ""
        raise WrongUsage(
            f"--config: importing {shown!r} failed with {describe(error)}{missing} at "
            f"{raised_at(error)}. Correct the module, or its name; it is looked for in the current folder, too."
        ) from None
    if not attribute:
        return api.manager.known(), api.get_engine
    try:
        value = operator.attrgetter(attribute)(module)
    except AttributeError:
        raise WrongUsage(f"--config: the module {shown!r} has no {shown_attribute!r}.") from None
    except Exception as error:
        what = f"{shown_attribute!r} of {shown!r} failed with {describe(error)} at {raised_at(error)}"
        raise WrongUsage(f"--config: reading {what}. Correct it.") from None
    if isinstance(value, Mapping):
        sources.refuse_one_entry(value)
        return list(value), lambda name: _engine_of_mapping(value, name)
    return [], SessionManager(value).engine


def _engine_of_mapping(databases: Mapping[str, Any], name: str) -> Engine:
    # Each by itself, so that what is wrong with one does not hide the others.
    if name not in databases:
        raise UnknownDatabase.named(name, databases, "Configured are")
    return SessionManager({name: databases[name]}).engine(name)


def _lines(report: Report) -> Iterator[str]:
    """The report for people: one table; what to change is below its line."""
    rows = [
        (each.level, ", ".join(map(plain, each.databases)), each.check, each.found, each.change)
        for each in report.findings
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    margin = " " * (sum(widths) + 6)
    for *cells, found, change in rows:
        start = "".join(f"{cell:{width}}  " for cell, width in zip(cells, widths, strict=True))
        yield from _wrapped(found, start, margin)
        if change:
            yield from _wrapped(change, f"{margin}-> ", f"{margin}   ")
    levels = [each.level for each in report.findings]
    yield ", ".join(
        f"{levels.count(level)} {level}{'s' * (levels.count(level) != 1)}" for level in ("error", "warning")
    )


def _wrapped(text: str, first: str, others: str) -> list[str]:
    return textwrap.wrap(
        plain(" ".join(text.split())),  # a server may have written anything into it
        _WIDTH,
        initial_indent=first,
        subsequent_indent=others,
        break_long_words=False,
        break_on_hyphens=False,
    )
