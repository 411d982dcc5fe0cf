"""The command line: `dbsession check`, `dbsession top`, `dbsession dashboard`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from dbsession.errors import DBSessionError
from dbsession.watch.check import command
from dbsession.watch.dashboard import command as dashboard
from dbsession.watch.top import command as top
from dbsession.watch.usage_errors import WrongUsage


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status: 0 all well, 1 it found an error, 2 wrong usage."""
    parser = argparse.ArgumentParser(prog="dbsession", description="Looks after the databases of an application.")
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
