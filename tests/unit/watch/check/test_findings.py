"""What `dbsession check` makes of what it has seen: the budget, and the findings on one database."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
from sqlalchemy import create_engine
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import NullPool, StaticPool

from dbsession import SessionManager
from dbsession.watch.check import budget, findings, probe
from dbsession.watch.check.budget import Workers
from dbsession.watch.check.facts import Facts, PoolFacts
from dbsession.watch.check.finding import worst
from dbsession.watch.check.kinds import kind_of
from dbsession.watch.check.mysql import MySQLFacts
from dbsession.watch.check.postgresql import PostgreSQLFacts

SERVER = MySQLFacts(
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


POSTGRESQL = PostgreSQLFacts(
    host="10.0.0.7",
    port=5432,
    account="app",
    tls="TLSv1.3, TLS_AES_256_GCM_SHA384",
    time_zone="Etc/UTC",
    utc_offset_s=0,
    isolation="READ COMMITTED",
    max_connections=100,
    database="shop",
    started_at="2026-11-29T11:36:32.167488Z",
    superuser_reserved_connections=3,
    reserved_connections=2,
    role_limit=None,
    database_limit=None,
    client_backends=1,
    statement_timeout_s=90.0,
    idle_in_transaction_session_timeout_s=600.0,
    idle_session_timeout_s=0.0,
    client_connection_check_interval_s=0.0,
    standby=False,
    read_only=None,
    sslmode="verify-full",
    pooler=False,
)


def postgresql(name="default", **server):
    return replace(database(name), driver="postgresql+psycopg", server=replace(POSTGRESQL, **server))


def database(name="default", pool=None, **server):
    return Facts(
        name,
        "mysql+pymysql",
        PoolFacts(**{**vars(POOL), **(pool or {})}),
        version="MariaDB 11",
        latency_ms=0.5,
        cooperative=True,
        server=MySQLFacts(**{**vars(SERVER), **server}),
    )


def levels(found):
    return {finding.check: finding.level for finding in found}


def budget_of(workers, *databases):
    return [finding for finding in budget.of(workers, databases) if finding.check == "budget"]


def test_all_is_ok_when_nothing_is_wrong():
    found = list(findings.of(database())) + list(budget.of(Workers(2, 20), [database()]))
    assert {each.level for each in found} == {"ok"}
    assert worst(found) == "ok"


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


def test_all_is_ok_when_nothing_is_wrong_with_postgresql():
    found = list(findings.of(postgresql())) + list(budget.of(Workers(2, 20), [postgresql()]))
    assert {each.level for each in found} == {"ok"}
    assert {"pooler", "pool_recycle"}.isdisjoint(levels(found))


@pytest.mark.parametrize(
    ("server", "check", "level"),
    [
        ({"tls": None}, "tls", "info"),
        ({"tls": None, "host": "[local]"}, "tls", "ok"),
        ({"tls": None, "host": "[local]", "pooler": True}, "tls", "info"),  # the pooler's way to the server
        ({"sslmode": "prefer"}, "tls", "info"),
        ({"sslmode": "require"}, "tls", "ok"),
        ({"sslmode": None}, "tls", "ok"),  # a driver that does not tell
        ({"standby": True}, "writable", "warning"),
        ({"standby": True, "read_only": "client"}, "writable", "ok"),
        ({"read_only": "session"}, "writable", "ok"),
        ({"read_only": "database user"}, "writable", "warning"),
        ({"statement_timeout_s": 0.0}, "statement_timeout", "info"),
        ({"statement_timeout_s": 0.0, "client_connection_check_interval_s": 10.0}, "statement_timeout", "ok"),
        ({"idle_in_transaction_session_timeout_s": 0.0}, "idle_in_transaction", "info"),
        ({"idle_session_timeout_s": 3600.0}, "pool_recycle", "warning"),
        ({"idle_session_timeout_s": 3600.5}, "pool_recycle", "ok"),
        ({"pooler": True}, "pooler", "info"),
        ({"utc_offset_s": 19800}, "time_zone", "info"),
    ],
    ids=str,
)
def test_finding_on_postgresql_has_its_level_and_says_what_to_change(server, check, level):
    (found,) = [each for each in findings.of(postgresql(**server)) if each.check == check]
    assert found.level == level
    assert found.change.endswith(".") if level != "ok" else not found.change


@pytest.mark.parametrize(
    ("max_connections", "level"), [(167, "ok"), (166, "info"), (87, "info"), (86, "error")], ids=str
)
def test_budget_leaves_the_reserved_connections_out_when_the_server_has_some(max_connections, level):
    # 2 workers x 2 engines x 20; 5 are reserved, and 4 in use, 2 of which are the check's. Two ways, one server.
    server = {"max_connections": max_connections, "client_backends": 4}
    both = [postgresql("a", **server), postgresql("b", **server, host="127.0.0.1")]
    (found,) = budget_of(Workers(2, 20), *both)
    assert (found.level, found.databases) == (level, ("a", "b"))
    assert f"of max_connections {max_connections} less 5 reserved ones and 2 that others use now" in found.found
    if level == "error":
        assert "1 too many" in found.found and "to 87 at least" in found.change
    started_again = postgresql("b", **server, started_at="2026-11-29T12:00:00.000000Z")
    assert len(budget_of(Workers(2, 20), both[0], started_again)) == 2


def test_budget_behind_a_pooler_is_the_poolers_and_the_direct_one_the_servers():
    pooled, direct = postgresql("a", pooler=True, max_connections=30, role_limit=1), postgresql("b")
    found = list(budget.of(Workers(2, 20), [pooled, direct]))
    assert levels(found) == {"pool": "ok", "budget": "ok"}  # no limit of the role's: the pooler keeps it
    of_pooler, of_server = [each for each in found if each.check == "budget"]
    assert (of_pooler.databases, of_pooler.level) == (("a",), "info")
    assert "takes 80 clients" in of_pooler.change and "below 25" in of_pooler.change
    assert of_server.databases == ("b",) and "40 connections (2 workers x 20) at most" in of_server.found


def test_budget_of_a_role_and_of_a_database_is_its_own_when_they_have_a_limit():
    limits = {"role_limit": 79, "database_limit": 79}
    databases = [postgresql("a", **limits), postgresql("b", **limits, database="audit")]
    found = {(each.databases, each.check): each for each in budget.of(Workers(2, 20), databases)}
    of_role = found[("a", "b"), "account_budget"]
    assert of_role.level == "error" and "of the CONNECTION LIMIT 79 of the role app" in of_role.found
    assert "Raise it to 80 at least" in of_role.change
    assert found[("a",), "database_budget"].level == found[("b",), "database_budget"].level == "ok"


@pytest.mark.parametrize(
    ("said", "state"),
    [
        ('FATAL:  password authentication failed for user "app"', "28P01"),
        ("FATAL:  SASL authentication failed", "28P01"),
        ("FATAL:  unsupported startup parameter: options", "08P01"),
        ('FATAL:  no pg_hba.conf entry for host "10.0.0.7", user "app", database "shop", no encryption', "28000"),
        ('FATAL:  role "app" is not permitted to log in', "28000"),
        ('FATAL:  database "shop" does not exist', "3D000"),
        ('FATAL:  permission denied for database "shop"', "42501"),
        ("FATAL:  sorry, too many clients already", "53300"),
        ("FATAL:  remaining connection slots are reserved for non-replication superuser connections", "53300"),
        ('FATAL:  too many connections for role "app"', "53300"),
        ("FATAL:  no more connections allowed (max_client_conn)", "53300"),
        ("FATAL:  the database system is starting up", "57P03"),
        ("Connection refused", None),
    ],
)
def test_error_at_connecting_to_postgresql_is_known_by_what_libpq_says(said, state):
    kind = kind_of(postgresql())
    error = OperationalError("SELECT 1", {}, RuntimeError(f"connection failed: {said}"))
    assert kind.number(error) == state
    advice = kind.how_to_connect(state)
    assert advice.endswith(".") and ("TLS arguments" in advice) is (state is None)
    told = OperationalError("SELECT 1", {}, SimpleNamespace(args=("password authentication failed",), sqlstate="57P01"))
    assert kind.number(told) == "57P01"


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
