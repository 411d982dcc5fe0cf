"""What is right and wrong with one database, and what to change."""

from __future__ import annotations

from collections.abc import Iterator

from dbsession.core.sources import misspelt_variables
from dbsession.watch.check.facts import Facts
from dbsession.watch.check.finding import Finding
from dbsession.watch.check.kinds import kind_of


def of(facts: Facts) -> Iterator[Finding]:
    """The findings on one database. Which are made depends on what it could be asked."""
    name = (facts.name,)
    if facts.version is None:
        yield Finding(
            "error",
            "reachable",
            name,
            f"no connection: {facts.error}",
            kind_of(facts).how_to_connect(facts.error_number),
        )
        return
    what = f"{facts.version} by {facts.driver}, {facts.latency_ms or 0:.1f} ms a round trip"
    yield Finding("ok", "reachable", name, what)
    if facts.error is not None:
        advice = "See what the account may read; the rest was not looked at."
        yield Finding("warning", "facts", name, f"it did not tell everything: {facts.error}", advice)
    yield from kind_of(facts).findings(facts)
    if facts.cooperative is not None:
        yield _of_driver(name, facts)


def of_environment() -> Iterator[Finding]:
    """The findings on the environment: variables that nothing reads, and are like one of ours. No value is shown."""
    for variable, meant in misspelt_variables():
        found = f"the environment has {variable}, which nothing reads"
        yield Finding("warning", "environment", (), found, f"Did you mean {meant}? Rename it, or remove it.")


def _of_driver(name: tuple[str, ...], facts: Facts) -> Finding:
    if facts.cooperative:
        return Finding("ok", "driver", name, f"{facts.driver} lets other greenlets run while it waits")
    advice = "Use mysql+pymysql, postgresql+psycopg or postgresql+psycopg2, whose connections wait in gevent's loop."
    return Finding(
        "error", "driver", name, f"{facts.driver} stops every greenlet of a gevent worker while it waits", advice
    )
