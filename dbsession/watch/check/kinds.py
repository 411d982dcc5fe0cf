"""The kinds of database of which the check asks more than their name and their latency."""

from __future__ import annotations

from dbsession.watch.check import mysql, postgresql, sqlite
from dbsession.watch.check.facts import Facts
from dbsession.watch.check.kind import Kind

_KINDS = {"mysql": mysql.KIND, "mariadb": mysql.KIND, "sqlite": sqlite.KIND, "postgresql": postgresql.KIND}
_ANY = Kind()


def kind_of(facts: Facts) -> Kind:
    """Return the kind of a database, by SQLAlchemy's name of its dialect."""
    return _KINDS.get(facts.backend_name, _ANY)
