"""The server of one benchmark: MariaDB, or PostgreSQL."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from support.mariadb import MariaDBServer

from .work import POSTGRESQL_SCHEMA, SCHEMA


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


@contextlib.contextmanager
def postgresql(*options: str) -> Iterator[tuple[str, int]]:
    """A PostgreSQL of its own with the tables of `apps`: its URL by psycopg, and its port."""
    from support.postgresql import PostgreSQLServer  # with psycopg, for the one benchmark of it

    server = PostgreSQLServer(*options)
    try:
        url = server.create_database("bench")
        with server.root("bench") as cursor:
            cursor.execute("SET ROLE app")  # whose they are, with their sequences
            for statement in POSTGRESQL_SCHEMA:
                cursor.execute(statement)
            yield url, server.port
    finally:
        server.close()
