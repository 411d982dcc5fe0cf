"""The command line: `dbsession check`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from dbsession import source
from dbsession.errors import DBSessionError, describe
from dbsession.manager import SessionManager


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status: 0 all well, 1 a database failed, 2 wrong usage."""
    parser = argparse.ArgumentParser(prog="dbsession", description="Looks after the databases of the environment.")
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser(
        "check", help="connect to each database of DBSESSION_URL and DBSESSION_<NAME>_URL, and say how long it took"
    )
    check.add_argument("names", nargs="*", metavar="name", help="only these (default: all that are set)")
    options = parser.parse_args(arguments)
    return _check(options.names or sorted(source.EnvironmentSource().known()))


def _check(names: Sequence[str]) -> int:
    if not names:
        print("No database is configured: set DBSESSION_URL or DBSESSION_<NAME>_URL.", file=sys.stderr)
        return 2
    manager = SessionManager()
    failed = False
    for name in names:
        started = time.monotonic()
        try:
            with manager.scope("dbsession check"):
                manager.get(name).execute(text("SELECT 1"))
            print(f"{name}: ok, {(time.monotonic() - started) * 1000:.1f} ms")
        except DBSessionError as error:
            failed = True
            print(f"{name}: {error}", file=sys.stderr)
        except SQLAlchemyError as error:
            failed = True
            print(f"{name}: no connection, {describe(error)}", file=sys.stderr)
    manager.dispose()
    return 1 if failed else 0
