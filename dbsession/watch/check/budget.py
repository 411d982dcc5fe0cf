"""Whether the connections of all workers fit into what the servers allow, and the requests into the pools."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from dbsession.watch.check.findings import Finding
from dbsession.watch.check.probe import Facts, ServerFacts

_ONE_AT_A_TIME = ("sync", "gunicorn.workers.sync.SyncWorker", "SyncWorker")
_THREADED = ("gthread", "gunicorn.workers.gthread.ThreadWorker", "ThreadWorker")


@dataclass(frozen=True)
class Workers:
    """The processes that will use the databases.

    Attributes:
        workers: how many.
        at_once: requests that one of them serves at once; None: not known.
        setting: gunicorn's setting that says so.
    """

    workers: int = 1
    at_once: int | None = None
    setting: str = "worker_connections"

    @classmethod
    def of_gunicorn(cls, cfg: Any) -> Workers:
        """Return the workers that gunicorn's configuration asks for, that of `server.cfg` and `worker.cfg`."""
        kind = cfg.worker_class_str
        if kind in _ONE_AT_A_TIME:
            return cls(cfg.workers, 1, "the sync worker")
        if kind in _THREADED:
            return cls(cfg.workers, cfg.threads, "threads")
        return cls(cfg.workers, cfg.worker_connections)

    @classmethod
    def of_environment(cls, workers: int | None = None, worker_connections: int | None = None) -> Workers:
        """Return the workers that are asked for by the command line, else GUNICORN_CMD_ARGS, else (as gunicorn does)
        WEB_CONCURRENCY, else one worker."""
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        parser.add_argument("-w", "--workers", type=int)
        parser.add_argument("--worker-connections", type=int)
        try:
            told, _ = parser.parse_known_args(shlex.split(os.environ.get("GUNICORN_CMD_ARGS", "")))
        except (ValueError, argparse.ArgumentError):  # gunicorn will say so
            told = argparse.Namespace(workers=None, worker_connections=None)
        try:
            concurrency = int(os.environ.get("WEB_CONCURRENCY") or 1)
        except ValueError:
            concurrency = 1
        return cls(
            workers or told.workers or concurrency,
            worker_connections or told.worker_connections,
        )


def of(workers: Workers, all_facts: Sequence[Facts]) -> Iterator[Finding]:
    """The findings on how the pools of all databases fit together."""
    for facts in all_facts:
        if facts.version is not None:
            yield from _of_pool(workers, facts)
    for databases in _grouped(all_facts, attrgetter("host", "port")):
        yield from _of_server(workers, databases)
    for databases in _grouped(all_facts, attrgetter("host", "port", "account")):
        yield from _of_account(workers, databases)


def _grouped(all_facts: Sequence[Facts], key: Callable[[ServerFacts], object]) -> Iterable[dict[Facts, ServerFacts]]:
    groups: dict[object, dict[Facts, ServerFacts]] = {}
    for facts in all_facts:
        if facts.server is not None:
            groups.setdefault(key(facts.server), {})[facts] = facts.server
    return groups.values()


def _of_pool(workers: Workers, facts: Facts) -> Iterator[Finding]:
    limit, at_once = facts.pool.limit, workers.at_once
    if facts.is_file:
        return  # its connections cost no server anything, and its writers wait for each other anyway
    if limit is None:
        advice = "Set pool_size and max_overflow, so that a rush of requests waits here and not at the server."
        yield Finding("warning", "pool", (facts.name,), "the pool has no limit", advice)
    elif at_once is None:
        found = f"{limit} connections in a worker's pool; worker_connections is not known"
        yield Finding("info", "pool", (facts.name,), found, "Give --worker-connections to compare the two.")
    elif at_once > limit:
        advice = (
            f"Bring pool_size nearer to the requests that use it at once, or {workers.setting} nearer to pool_size."
        )
        found = f"{workers.setting} {at_once}, but {limit} connections in a worker's pool: the other requests wait"
        # worker_connections is a number of clients, idle ones included: more of them than pool_size is as it should be.
        level = "info" if workers.setting == "worker_connections" else "warning"
        yield Finding(level, "pool", (facts.name,), found, advice)
    else:
        found = f"{limit} connections in a worker's pool, for {at_once} requests at once ({workers.setting})"
        yield Finding("ok", "pool", (facts.name,), found)


def _needed(workers: Workers, databases: Collection[Facts]) -> tuple[int, str]:
    """How many connections the workers open at most, and how that is reckoned. Pools without a limit are left out."""
    limits = [facts.pool.limit for facts in databases if facts.pool.limit is not None]
    needed = workers.workers * sum(limits)
    plural = "worker" if workers.workers == 1 else "workers"
    least = "" if len(limits) == len(databases) else "at least "
    each = " + ".join(map(str, limits)) or "0"
    return needed, f"{least}{needed} connections ({workers.workers} {plural} x {f'({each})' if ' ' in each else each})"


def _of_server(workers: Workers, databases: Mapping[Facts, ServerFacts]) -> Iterator[Finding]:
    names = tuple(facts.name for facts in databases)
    servers = list(databases.values())
    # One of those in use is ours for each database: they are asked at the same time.
    others = max(max(server.threads_connected for server in servers) - len(servers), 0)
    most = servers[0].max_connections
    needed, reckoned = _needed(workers, databases.keys())
    found = f"{reckoned} at most, of max_connections {most} less {others} that others use now"
    advice = f"Raise max_connections to {needed + others} at least, or lower workers, pool_size or max_overflow."
    if needed > most - others:
        yield Finding("error", "budget", names, f"{found}: {needed - (most - others)} too many", advice)
    elif 2 * needed > most - others:
        advice = f"A reload runs old and new workers side by side; {2 * needed + others} would be enough for that, too."
        yield Finding("info", "budget", names, found, advice)
    else:
        yield Finding("ok", "budget", names, found)


def _of_account(workers: Workers, databases: Mapping[Facts, ServerFacts]) -> Iterator[Finding]:
    most = min(server.max_user_connections for server in databases.values())
    if not most:
        return
    names = tuple(facts.name for facts in databases)
    needed, reckoned = _needed(workers, databases.keys())
    found = f"{reckoned} at most, of max_user_connections {most}"
    if needed > most:
        advice = f"Raise it to {needed} at least, or lower workers, pool_size or max_overflow."
        yield Finding("error", "account_budget", names, found, advice)
    else:
        yield Finding("ok", "account_budget", names, found)
