"""What `dbsession check` makes of what it has seen: the budget, and the findings on one database."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool, StaticPool

from dbsession import SessionManager
from dbsession.watch.check import budget, findings, probe
from dbsession.watch.check.budget import Workers
from dbsession.watch.check.probe import Facts, PoolFacts, ServerFacts

SERVER = ServerFacts(
    host="db",
    port=3306,
    account="app@%",
    tls="TLSv1.3, TLS_AES_256_GCM_SHA384",
    time_zone="UTC",
    utc_offset_s=0,
    sql_mode="STRICT_TRANS_TABLES",
    isolation="REPEATABLE READ",
    max_connections=100,
    max_user_connections=0,
    wait_timeout_s=28800,
    threads_connected=1,
)
POOL = PoolFacts(limit=20, keeps=True, recycle_s=3600, pre_ping=True)


def database(name="default", pool=None, **server):
    return Facts(
        name,
        "mysql+pymysql",
        PoolFacts(**{**vars(POOL), **(pool or {})}),
        version="MariaDB 11",
        latency_ms=0.5,
        cooperative=True,
        server=ServerFacts(**{**vars(SERVER), **server}),
    )


def levels(found):
    return {finding.check: finding.level for finding in found}


def budget_of(workers, *databases):
    return [finding for finding in budget.of(workers, databases) if finding.check == "budget"]


def test_all_is_ok_when_nothing_is_wrong():
    found = list(findings.of(database())) + list(budget.of(Workers(2, 20), [database()]))
    assert {finding.level for finding in found} == {"ok"}
    assert findings.worst(found) == "ok"


def test_every_finding_says_what_to_change_when_it_is_not_ok():
    bad = database(
        pool={"limit": None, "recycle_s": None, "pre_ping": False},
        **{"sql_mode": "", "tls": None, "utc_offset_s": -3600, "max_connections": 0},
    )
    found = list(findings.of(bad)) + list(budget.of(Workers(2, 800), [bad, database("audit")]))
    wrong = [finding for finding in found if finding.level != "ok"]
    assert len({finding.check for finding in wrong}) == 6
    assert all(finding.change.endswith(".") and not finding.found.endswith(".") for finding in wrong)


@pytest.mark.parametrize(
    ("max_connections", "level"),
    [(162, "ok"), (161, "info"), (82, "info"), (81, "error")],
    ids=["a reload fits", "a reload does not", "just", "one too few"],
)
def test_budget_counts_workers_engines_and_what_others_use_when_they_share_a_server(max_connections, level):
    # 2 workers x 2 engines x 20; 4 connections in use, 2 of which are the check's.
    both = [database(name, max_connections=max_connections, threads_connected=4) for name in ("a", "b")]
    (finding,) = budget_of(Workers(2, 20), *both)
    assert finding.level == level
    assert finding.databases == ("a", "b")
    assert (
        f"80 connections (2 workers x (20 + 20)) at most, of max_connections {max_connections} less 2" in finding.found
    )
    if level == "error":
        assert "1 too many" in finding.found and "to 82 at least" in finding.change


def test_budget_is_reckoned_for_each_server_when_there_are_two():
    found = budget_of(Workers(4, 20), database("a"), database("b", port=3307))
    assert [(finding.databases, finding.level) for finding in found] == [(("a",), "info"), (("b",), "info")]
    assert [finding.level for finding in budget_of(Workers(4, 20), database("a"), database("b"))] == ["error"]


def test_budget_of_an_account_is_its_own_when_it_has_a_limit():
    databases = [database("a", max_user_connections=39), database("b", account="other@%")]
    found = {
        finding.databases: finding for finding in budget.of(Workers(2, 20), databases) if "account" in finding.check
    }
    assert found[("a",)].level == "error" and "Raise it to 40 at least" in found[("a",)].change
    assert ("b",) not in found


def test_budget_says_at_least_when_a_pool_has_no_limit():
    unlimited = database("b", pool={"limit": None})
    (finding,) = budget_of(Workers(2, 20), database("a"), unlimited)
    assert "at least 40 connections" in finding.found
    assert levels(budget.of(Workers(2, 20), [unlimited]))["pool"] == "warning"


@pytest.mark.parametrize(
    ("at_once", "setting", "level"),
    [
        (None, "worker_connections", "info"),
        (20, "worker_connections", "ok"),
        (21, "worker_connections", "info"),  # idle clients are among them
        (21, "threads", "warning"),
    ],
)
def test_pool_is_too_small_when_more_requests_run_at_once(at_once, setting, level):
    assert levels(budget.of(Workers(1, at_once, setting), [database()]))["pool"] == level


@pytest.mark.parametrize(
    ("recycle_s", "pre_ping", "level"),
    [(28799, True, "ok"), (28800, True, "warning"), (28800, False, "error"), (None, True, "warning")],
)
def test_pool_recycle_has_to_be_below_wait_timeout_when_connections_are_kept(recycle_s, pre_ping, level):
    pool = {"recycle_s": recycle_s, "pre_ping": pre_ping}
    assert levels(findings.of(database(pool=pool)))["pool_recycle"] == level
    assert "pool_recycle" not in levels(findings.of(database(pool={**pool, "keeps": False})))


@pytest.mark.parametrize(
    ("pool", "limit"),
    [
        ({}, 20),
        ({"pool_size": 5, "max_overflow": 3}, 8),
        ({"pool_size": 0}, None),
        ({"max_overflow": -1}, None),
        ({"poolclass": NullPool}, None),
        ({"poolclass": StaticPool}, 1),
    ],
    ids=str,
)
def test_limit_of_a_pool_is_what_its_options_say(pool, limit):
    entry = {"url": "mysql+pymysql://u@127.0.0.1:1/db", "options": {"connect_args": {"connect_timeout": 1}, **pool}}
    seen = probe.gather("default", SessionManager({"default": entry}).engine())
    assert seen.pool.limit == limit
    assert (seen.version, seen.error, seen.error_number) == (None, "OperationalError (2003)", 2003)


def test_facts_of_a_plain_engine_can_be_had_as_well(tmp_path):
    engine = create_engine(f"sqlite:///{tmp_path}/a.db")
    seen = probe.gather("default", engine)
    assert levels(findings.of(seen)) == {"reachable": "ok", "journal_mode": "warning", "writable": "ok"}
    engine.dispose()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("gevent", Workers(3, 800, "worker_connections")),
        ("gunicorn.workers.ggevent.GeventWorker", Workers(3, 800, "worker_connections")),
        ("gthread", Workers(3, 8, "threads")),
        ("sync", Workers(3, 1, "the sync worker")),
    ],
)
def test_workers_of_gunicorn_are_reckoned_by_their_class(kind, expected):
    cfg = SimpleNamespace(worker_class_str=kind, workers=3, worker_connections=800, threads=8)
    assert Workers.of_gunicorn(cfg) == expected


@pytest.mark.parametrize(
    ("variables", "told", "expected"),
    [
        ({}, (), (1, None)),
        ({"WEB_CONCURRENCY": "4"}, (), (4, None)),
        ({"WEB_CONCURRENCY": "4", "GUNICORN_CMD_ARGS": "-k gevent -w3 --worker-connections=50"}, (), (3, 50)),
        ({"GUNICORN_CMD_ARGS": "--workers=3 --worker-connections 50"}, (2, 10), (2, 10)),
        ({"WEB_CONCURRENCY": "many", "GUNICORN_CMD_ARGS": "-w many"}, (), (1, None)),
    ],
    ids=str,
)
def test_workers_come_from_the_environment_when_they_are_not_told(monkeypatch, variables, told, expected):
    for name in ("WEB_CONCURRENCY", "GUNICORN_CMD_ARGS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = Workers.of_environment(*told)
    assert (found.workers, found.at_once) == expected
