"""The command line: `dbsession check`, `dbsession top`, `dbsession dashboard`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from dbsession.errors import DBSessionError, masked
from dbsession.watch.check import command
from dbsession.watch.dashboard import command as dashboard
from dbsession.watch.top import command as top
from dbsession.watch.usage_errors import WrongUsage
from dbsession.watch.versions import Version


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors show no password. Without state of its own."""

    def error(self, message: str) -> NoReturn:
        super().error(masked(message))  # a URL, say, where a command or a name belongs


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status: 0 all well, 1 it found an error, 2 wrong usage."""
    parser = _Parser(prog="dbsession", description="Looks after the databases of an application.")
    parser.add_argument("--version", action=Version, help="print the versions that a bug report should name")
    commands = parser.add_subparsers(dest="command", required=True)
    command.add_check(commands)
    top.add_top(commands)
    dashboard.add_dashboard(commands)
    options = parser.parse_args(arguments)
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
