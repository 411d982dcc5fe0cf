"""The command line: `dbsession check`, `dbsession top`, `dbsession dashboard`."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from dbsession.errors import DBSessionError, did_you_mean, masked
from dbsession.watch.check import command
from dbsession.watch.dashboard import command as dashboard
from dbsession.watch.top import command as top
from dbsession.watch.usage_errors import WrongUsage
from dbsession.watch.versions import Version

COMMANDS = ("check", "top", "dashboard")


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose help ends in examples, and whose errors show no password."""

    examples: tuple[str, ...] = ()

    def format_help(self) -> str:
        # Not its `epilog`, whose lines argparse would fill.
        return "\n  ".join([f"{super().format_help()}\nexamples:", *self.examples]) + "\n"

    def error(self, message: str) -> NoReturn:
        wrong = re.search(r"^argument command: invalid choice: '(.*?)'", message)
        meant = did_you_mean(wrong[1], COMMANDS) if wrong else ""
        super().error(masked(message) + meant)  # a URL, say, where a command or a name belongs

    def refuse(self, unknown: Sequence[str]) -> NoReturn:
        """Say which arguments this parser does not know, and what they may be misspellings of."""
        known = re.findall(r"--[\w-]+", self.format_usage())
        meant = "".join(did_you_mean(each.partition("=")[0], known) for each in unknown if each.startswith("-"))
        self.error(f"unrecognized arguments: {' '.join(unknown)}.{meant}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status: 0 all well, 1 it found an error, 2 wrong usage."""
    parser = _Parser(prog="dbsession", description="Looks after the databases of an application.")
    parser.examples = (
        "DBSESSION_URL=sqlite:///shop.db dbsession check",
        "dbsession top --folder /run/shop",
        "dbsession dashboard --folder /run/shop",
    )
    parser.add_argument("--version", action=Version, help="print the versions that a bug report should name")
    commands = parser.add_subparsers(dest="command")
    command.add_check(commands)
    top.add_top(commands)
    dashboard.add_dashboard(commands)
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        commands.choices.get(options.command, parser).refuse(unknown)
    if options.command is None:
        parser.error(f"no command is given: choose from {', '.join(COMMANDS)}")
    try:
        status: int = options.run(options)
    except (WrongUsage, DBSessionError) as error:
        print(f"dbsession {options.command}: {error}", file=sys.stderr)
        status = 2
    except BrokenPipeError:  # `| head` has seen enough
        status = 1
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:  # so has it, or the terminal has gone: the rest goes nowhere, with no word at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            if isinstance(error, BrokenPipeError):
                status = 1
    return status
