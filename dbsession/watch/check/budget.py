"""Whether the connections of all workers fit into what the servers allow, and the requests into the pools."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, TypeVar

from dbsession.watch.check.facts import Facts, Limit, ServerFacts
from dbsession.watch.check.finding import Finding

T = TypeVar("T")

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
    servers = [(facts, facts.server) for facts in all_facts if facts.server is not None]
    for group in _grouped(((server.identity, server.pooled), (facts, server)) for facts, server in servers):
        yield (_of_pooler if group[0][1].pooled else _of_server)(workers, dict(group))
    limited = (
        ((server.identity, limit.check, limit.owner), (facts, limit))
        for facts, server in servers
        if not server.pooled
        for limit in server.limits
    )
    for group_of_limit in _grouped(limited):
        yield _of_limit(workers, dict(group_of_limit))


def _grouped(keyed: Iterable[tuple[object, T]]) -> Iterable[list[T]]:
    groups: dict[object, list[T]] = {}
    for key, each in keyed:
        groups.setdefault(key, []).append(each)
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


def _of_server(workers: Workers, databases: Mapping[Facts, ServerFacts]) -> Finding:
    names = tuple(facts.name for facts in databases)
    servers = list(databases.values())
    # One of those in use is ours for each database: they are asked at the same time.
    others = max(max(server.in_use for server in servers) - len(servers), 0)
    reserved = servers[0].reserved
    free = servers[0].max_connections - reserved - others
    needed, reckoned = _needed(workers, databases.keys())
    less = f"{reserved} reserved ones and {others}" if reserved else f"{others}"
    found = f"{reckoned} at most, of max_connections {servers[0].max_connections} less {less} that others use now"
    if needed > free:
        least = needed + reserved + others
        advice = f"Raise max_connections to {least} at least, or lower workers, pool_size or max_overflow."
        return Finding("error", "budget", names, f"{found}: {needed - free} too many", advice)
    if 2 * needed > free:
        enough = 2 * needed + reserved + others
        advice = f"A reload runs old and new workers side by side; {enough} would be enough for that, too."
        return Finding("info", "budget", names, found, advice)
    return Finding("ok", "budget", names, found)


def _of_pooler(workers: Workers, databases: Mapping[Facts, ServerFacts]) -> Finding:
    needed, reckoned = _needed(workers, databases.keys())
    server = next(iter(databases.values()))
    found = f"{reckoned} at most, to the pooler; the server behind it has max_connections {server.max_connections}"
    advice = (
        f"See that the pooler takes {2 * needed} clients (PgBouncer: max_client_conn), for a reload, too; and that its "
        f"own connections (default_pool_size for each database and user) stay below "
        f"{server.max_connections - server.reserved}."
    )
    return Finding("info", "budget", tuple(facts.name for facts in databases), found, advice)


def _of_limit(workers: Workers, databases: Mapping[Facts, Limit]) -> Finding:
    limit = min(databases.values(), key=attrgetter("most"))
    names = tuple(facts.name for facts in databases)
    needed, reckoned = _needed(workers, databases.keys())
    found = f"{reckoned} at most, of {limit.setting}"
    if needed > limit.most:
        advice = f"Raise it to {needed} at least, or lower workers, pool_size or max_overflow."
        return Finding("error", limit.check, names, found, advice)
    return Finding("ok", limit.check, names, found)
