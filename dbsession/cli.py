"""The command line: `dbsession check`, `dbsession top`, `dbsession dashboard`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from dbsession.watch import command, dashboard, top


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
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough; what is still buffered goes nowhere, without a second complaint
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status
