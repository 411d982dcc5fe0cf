"""Kind: what is asked of one kind of database, and how its answers are judged; and what servers have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy.engine import Connection

from dbsession.errors import driver_number
from dbsession.watch.check.facts import Facts, PoolFacts, ServerFacts
from dbsession.watch.check.finding import Finding


def _nothing(_: Any) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Kind:
    """One kind of database. Lives as long as the process.

    Attributes:
        ask: asks a connection for more than its name and its latency; as attributes of Facts.
        findings: what is right and wrong with that.
        advice: what to do about an error at connecting, by the driver's number or SQLSTATE.
        otherwise: what to do about any other.
        number: the driver's number or SQLSTATE of an error.
    """

    ask: Callable[[Connection], dict[str, Any]] = _nothing
    findings: Callable[[Facts], Iterator[Finding]] = lambda _: iter(())
    advice: Mapping[int | str, str] = field(default_factory=dict)
    otherwise: str = "Look at the URL's host and port, at the server's log, and at what is in between."
    number: Callable[[BaseException], int | str | None] = driver_number

    def how_to_connect(self, number: int | str | None) -> str:
        """What to do about a connection that failed with an error of this number."""
        return self.advice.get(number, self.otherwise) if number is not None else self.otherwise


def of_tls(name: tuple[str, ...], server: ServerFacts, argument: str) -> Finding:
    """Say whether the connection is encrypted; `argument` is the URL's with which it is."""
    if server.tls:
        return Finding("ok", "tls", name, f"TLS: {server.tls}")
    advice = f"Unless only this machine can listen in, give the server a certificate, and the URL {argument}."
    return Finding("info", "tls", name, "no TLS", advice)


def of_time_zone(name: tuple[str, ...], server: ServerFacts, setting: str) -> Finding:
    """Say how the server's NOW() differs from UTC, by its `setting`."""
    hours, minutes = divmod(abs(server.utc_offset_s) // 60, 60)
    zone = f"time zone {server.time_zone}, UTC{'-' if server.utc_offset_s < 0 else '+'}{hours:02d}:{minutes:02d}"
    if server.utc_offset_s:
        advice = f"NOW() is not UTC there: let the application write the times, or set {setting} at the server."
        return Finding("info", "time_zone", name, zone, advice)
    return Finding("ok", "time_zone", name, zone)


def of_recycling(name: tuple[str, ...], setting: str, closed_after_s: float, pool: PoolFacts) -> Iterator[Finding]:
    """Compare `pool_recycle` with the server's `setting`, after which it closes an idle connection."""
    if not pool.keeps:
        return
    age = "never" if pool.recycle_s is None else f"{pool.recycle_s} s"
    if pool.recycle_s is not None and pool.recycle_s < closed_after_s:
        found = f"pool_recycle {age}, below the server's {setting} {closed_after_s:g} s"
        yield Finding("ok", "pool_recycle", name, found)
        return
    found = (
        f"pool_recycle {age}, not below the server's {setting} {closed_after_s:g} s, which closes idle connections: "
    )
    advice = f"Set pool_recycle below {closed_after_s:g}, or raise {setting} at the server."
    if pool.pre_ping:
        found += "each is found dead at its checkout, and replaced"
        yield Finding("warning", "pool_recycle", name, found, advice)
    else:
        found += "without pool_pre_ping nothing notices before a statement fails"
        yield Finding("error", "pool_recycle", name, found, advice)
