"""The MariaDB server of one benchmark."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from support.mariadb import MariaDBServer

from .work import SCHEMA


@contextlib.contextmanager
def database(*options: str) -> Iterator[tuple[str, Any]]:
    """A server of its own with the tables of `apps`: its URL, and a cursor of root's in that database."""
    server = MariaDBServer(*options)
    try:
        url = server.create_database("bench")
        with server.root() as cursor:
            cursor.execute("USE bench")
            for statement in SCHEMA:
                cursor.execute(statement)
            yield url, cursor
    finally:
        server.close()
