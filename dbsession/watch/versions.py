"""What `dbsession --version` prints: the versions that a bug report should name."""

from __future__ import annotations

import argparse
import platform
from importlib import metadata
from typing import Any

import dbsession
from dbsession.errors import DISTRIBUTION

_SHOWN = (
    *("SQLAlchemy", "gevent", "greenlet", "PyMySQL", "asyncmy", "aiomysql", "aiosqlite"),
    *("psycopg", "psycopg2", "psycopg2-binary", "asyncpg", "gunicorn", "Flask"),
)


class Version(argparse.Action):
    """The option --version. Prints the versions and ends the program; asks for them only then."""

    def __init__(self, option_strings: list[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print("\n".join(lines()))
        parser.exit()


def lines() -> list[str]:
    """Write our version, and those of Python and of the libraries that are installed.

    Ours is that of the code that runs, so a checkout that is not installed has one, too.
    """
    others = [f"{name} {version}" for name in _SHOWN if (version := _installed(name))]
    text = [f"{DISTRIBUTION} {dbsession.__version__}", ", ".join([f"Python {platform.python_version()}", *others])]
    foreign = _installed("dbsession")
    if foreign is not None:
        text.append(
            f"The distribution `dbsession` {foreign} is installed as well. It is another project's, and the two share "
            f"a folder: uninstall both, then install {DISTRIBUTION} again."
        )
    return text


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
