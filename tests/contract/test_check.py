"""`dbsession check` on a real MariaDB and a real PostgreSQL: what the server says is what the report says."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC
from urllib.parse import urlsplit

import pytest

from dbsession.watch.check.probe import BOUND_S
from support.processes import run_script, script_env
from support.proxy import Proxy
from support.waiting import wait_until


def run(*arguments, cwd=None, **env):
    command = [sys.executable, "-W", "error", "-m", "dbsession", "check", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd, env=script_env(env))


def report(*arguments, status=0, cwd=None, **env):
    """The report as JSON, and its findings by (databases, check)."""
    done = run("--json", *arguments, cwd=cwd, **env)
    assert done.returncode == status, done
    found = json.loads(done.stdout)
    return found, {("+".join(each["databases"]), each["check"]): each for each in found["findings"]}


@pytest.fixture
def configured(tmp_path, mariadb_url):
    """Writes the module `conf`, whose `databases` has an entry for `mariadb_url` with these keys."""

    def write(**entry):
        (tmp_path / "conf.py").write_text(f"databases = {{'default': { ({'url': mariadb_url} | entry)!r}}}\n")
        return {"cwd": tmp_path}

    return write


def test_check_tells_what_the_server_says(mariadb, mariadb_url):
    found, findings = report("--workers=2", "--worker-connections=10", DBSESSION_URL=mariadb_url)
    facts = found["databases"]["default"]
    assert facts["version"].startswith("MariaDB ") and 0 < facts["latency_ms"] < 10_000
    assert facts["cooperative"] is True
    server = facts["server"]
    with mariadb.root() as cursor:
        cursor.execute("SELECT @@hostname AS host, @@sql_mode AS sql_mode, @@wait_timeout AS wait_timeout_s")
        row = cursor.fetchone()
    assert {key: server[key] for key in row} == row
    assert (server["port"], server["max_connections"]) == (mariadb.port, 500)
    assert (server["isolation"], server["tls"]) == ("REPEATABLE READ", None)
    assert {each["level"] for each in found["findings"]} <= {"ok", "info"}
    assert findings[("default", "budget")]["level"] == "ok"


def test_check_has_stable_keys_when_json_is_asked_for(mariadb_url):
    """README.md lists them."""
    found, _ = report("--workers=2", DBSESSION_URL=mariadb_url, DBSESSION_NO_URL="x", status=1)
    assert list(found) == ["status", "workers", "requests_at_once", "databases", "findings"]
    assert (found["status"], found["workers"], found["requests_at_once"]) == ("error", 2, None)
    assert list(found["databases"]) == ["default"]
    facts = found["databases"]["default"]
    assert " ".join(facts) == ("name driver pool version latency_ms cooperative server file error error_number")
    assert list(facts["pool"]) == ["limit", "keeps", "recycle_s", "pre_ping"]
    assert " ".join(facts["server"]) == (
        "host port account tls time_zone utc_offset_s isolation max_connections sql_mode max_user_connections "
        "wait_timeout_s threads_connected"
    )
    for finding in found["findings"]:
        assert list(finding) == ["level", "check", "databases", "found", "change"]


def test_check_opens_one_connection_for_a_moment_and_leaves_none(mariadb, mariadb_url):
    before = mariadb.status("Connections")
    report(DBSESSION_URL=mariadb_url)
    assert mariadb.status("Connections") - before - 1 == 1  # the other one is this question's
    wait_until(lambda: not mariadb.processlist(), 30, "the end of its connection at the server")


def test_check_fails_and_shows_no_password_when_the_password_is_wrong(mariadb, mariadb_url):
    wrong = mariadb_url.replace(mariadb.password, "n0tth1s")
    env = {"DBSESSION_URL": mariadb_url, "DBSESSION_WRONG_URL": wrong}
    for done in (run(**env), run("--json", **env)):
        assert done.returncode == 1 and "OperationalError (1045)" in done.stdout
        assert "refuses the account or its password" in " ".join(done.stdout.split())
        for secret in ("n0tth1s", mariadb.password):
            assert secret not in done.stdout + done.stderr
    _, findings = report(status=1, **env)
    assert findings[("wrong", "reachable")]["level"] == "error"
    assert findings[("default", "reachable")]["level"] == "ok"


def test_check_is_bounded_and_sees_the_others_when_one_server_is_silent(mariadb, mariadb_url):
    with Proxy(mariadb.port) as proxy:
        proxy.stall()
        silent = mariadb_url.replace(f":{mariadb.port}/", f":{proxy.port}/")
        silent += "?connect_timeout=2"
        _, findings = report(DBSESSION_URL=mariadb_url, DBSESSION_SILENT_URL=silent, status=1)
    assert findings[("silent", "reachable")]["found"] == "no connection: OperationalError (2013)"
    assert findings[("default", "reachable")]["level"] == "ok"


# A driver that blocks, as mysqlclient does: its socket is the interpreter's own, whatever is patched.
BLOCKING = """
import pymysql
from gevent import monkey

def blocking():
    raw = monkey.get_original("socket", "socket")()
    raw.connect(("127.0.0.1", {port}))
    connection = pymysql.connect(user="app", password={password!r}, database={database!r}, defer_connect=True)
    connection.connect(raw)
    return connection

databases = {{
    "blocks": {{"url": "mysql+pymysql://", "options": {{"creator": blocking}}}},
    "default": {url!r},
}}
"""


def blocking_module(tmp_path, mariadb, mariadb_url, port):
    database = urlsplit(mariadb_url).path[1:]
    values = {"port": port, "password": mariadb.password, "database": database, "url": mariadb_url}
    (tmp_path / "conf.py").write_text(BLOCKING.format(**values))


def test_check_fails_when_a_driver_blocks_the_hub(tmp_path, mariadb, mariadb_url):
    blocking_module(tmp_path, mariadb, mariadb_url, mariadb.port)
    found, findings = report("--config=conf:databases", status=1, cwd=tmp_path)
    assert found["databases"]["blocks"]["cooperative"] is False
    assert findings[("blocks", "driver")]["level"] == "error" and "gevent" in findings[("blocks", "driver")]["change"]
    assert findings[("default", "driver")]["level"] == "ok"


@pytest.mark.slow
def test_check_is_bounded_when_a_driver_blocks_at_a_silent_server(tmp_path, mariadb, mariadb_url):
    """Nothing can interrupt that driver; the report comes all the same, and the process ends."""
    with Proxy(mariadb.port) as proxy:
        proxy.stall()
        blocking_module(tmp_path, mariadb, mariadb_url, proxy.port)
        _, findings = report("--config=conf:databases", status=1, cwd=tmp_path)
    assert findings[("blocks", "reachable")]["found"] == f"no connection: no answer within {BOUND_S:g} s"
    assert findings[("default", "reachable")]["level"] == "ok"


def test_check_warns_when_pool_recycle_is_above_wait_timeout(configured):
    short = {"connect_args": {"init_command": "SET SESSION wait_timeout = 600"}}
    config = configured(options=short)
    found, findings = report("--config=conf:databases", **config)
    assert found["status"] == "warning"
    assert findings[("default", "pool_recycle")]["level"] == "warning"
    assert (
        "pool_recycle 3600 s, not below the server's wait_timeout 600 s"
        in findings[("default", "pool_recycle")]["found"]
    )
    assert "Set pool_recycle below 600" in findings[("default", "pool_recycle")]["change"]
    config = configured(options=short | {"pool_pre_ping": False})
    report("--config=conf:databases", status=1, **config)
    config = configured(options=short | {"pool_recycle": 300})
    assert report("--config=conf:databases", **config)[1][("default", "pool_recycle")]["level"] == "ok"


def test_check_warns_when_sql_mode_is_not_strict_and_tells_a_time_zone(configured):
    command = "SET SESSION sql_mode = '', time_zone = '-03:30', tx_isolation = 'READ-COMMITTED'"
    config = configured(options={"connect_args": {"init_command": command}})
    found, findings = report("--config=conf:databases", **config)
    assert findings[("default", "sql_mode")]["level"] == "warning"
    assert findings[("default", "time_zone")]["level"] == "info"
    assert findings[("default", "time_zone")]["found"] == "time zone -03:30, UTC-03:30"
    assert found["databases"]["default"]["server"]["isolation"] == "READ COMMITTED"


def test_check_fails_when_the_workers_need_more_connections_than_the_server_has(mariadb_url):
    env = {"DBSESSION_URL": mariadb_url, "DBSESSION_AUDIT_URL": mariadb_url}
    _, findings = report("--workers=12", **env)
    assert findings[("audit+default", "budget")]["level"] == "info"
    _, findings = report("--workers=13", status=1, **env)
    budget = findings[("audit+default", "budget")]
    assert budget["level"] == "error"
    assert budget["found"].startswith("520 connections (13 workers x (20 + 20)) at most, of max_connections 500 less ")
    assert budget["change"].startswith("Raise max_connections to 52")


def test_check_counts_what_others_use(mariadb, mariadb_url):
    def others():
        _, findings = report(DBSESSION_URL=mariadb_url)
        return int(findings[("default", "budget")]["found"].partition(" less ")[2].split()[0])

    def the_others_are_gone():  # as the server sees it, who ends a connection later than it is closed
        return mariadb.status("Threads_connected") == 1  # this question's

    wait_until(the_others_are_gone, 30)
    before = others()
    wait_until(the_others_are_gone, 30)
    with mariadb.root(), mariadb.root(), mariadb.root():
        assert others() == before + 3


def test_check_fails_when_the_account_may_open_fewer(mariadb, mariadb_url):
    with mariadb.root() as cursor:
        cursor.execute("CREATE USER few@'127.0.0.1' IDENTIFIED BY 'pw' WITH MAX_USER_CONNECTIONS 30")
    try:
        url = mariadb_url.replace(f"app:{mariadb.password}", "few:pw").rpartition("/")[0] + "/"
        found, findings = report("--workers=2", DBSESSION_URL=url, status=1)
    finally:
        with mariadb.root() as cursor:
            cursor.execute("DROP USER few@'127.0.0.1'")
    assert found["databases"]["default"]["server"]["max_user_connections"] == 30
    assert findings[("default", "account_budget")]["level"] == "error"
    assert findings[("default", "budget")]["level"] == "ok"


def test_examine_takes_nothing_of_the_pool_and_leaves_the_engine_usable(mode, mariadb_url):
    run_script(
        mode,
        """
        import sys
        from sqlalchemy import text
        from dbsession.watch.check import report as check
        from dbsession.watch.check.budget import Workers

        dbsession.configure({"default": {"url": sys.argv[1], "options": {"pool_size": 1, "pool_timeout": 5}}})
        session = dbsession.get_dbsession()
        report = check.examine(["default", "other"], dbsession.get_engine, Workers(1, 1))
        levels = {(each.databases, each.check): each.level for each in report.findings}
        assert levels[("other",), "configuration"] == "error"
        assert levels[("default",), "budget"] == "ok"
        # Without a patched socket there is nothing to measure.
        assert (("default",), "driver") in levels or MODE == "threads"
        pool = dbsession.get_engine().pool
        assert (pool.checkedout(), pool.checkedin()) == (0, 0)
        for _ in range(3):
            with dbsession.session_scope():
                assert session.scalar(text("SELECT 1")) == 1
            assert check.examine(["default"], dbsession.get_engine, Workers(1, 1)).status == "ok"
        """,
        mariadb_url,
    )


def test_check_shows_no_secret_and_sees_the_others_when_the_configuration_raises(tmp_path):
    """What a callable or an attribute raises may have a URL in its text."""
    (tmp_path / "conf.py").write_text(
        "def find(name):\n"
        "    if name == 'bad':\n"
        "        raise ValueError('mysql://app:tell-nobody@db/shop')\n"
        f"    return 'sqlite:///{tmp_path}/a.db'\n"
        "class Settings:\n"
        "    @property\n"
        "    def databases(self):\n"
        "        raise RuntimeError('tell-nobody')\n"
        "settings = Settings()\n"
    )
    done = run("--json", "--config=conf:find", "bad", "good", cwd=tmp_path)
    first, second, *_ = json.loads(done.stdout)["findings"]
    assert (done.returncode, first["databases"], first["check"]) == (1, ["bad"], "configuration")
    assert first["found"].startswith("asking for its configuration failed with ValueError at ")
    assert first["found"].endswith("conf.py:3") and (second["databases"], second["level"]) == (["good"], "ok")
    refused = run("--config=conf:settings.databases", cwd=tmp_path)
    assert refused.returncode == 2 and "RuntimeError at " in refused.stderr
    for each in (done, refused):
        assert "tell-nobody" not in each.stdout + each.stderr and "Traceback" not in each.stderr


# -- PostgreSQL ------------------------------------------------------------------------------------------------


def test_check_tells_what_postgresql_says_and_that_a_pooler_stands_between(postgresql, postgresql_url, pgbouncer_url):
    """Through PgBouncer it is another account of the same server, and its connections are the pooler's."""
    env = {"DBSESSION_URL": postgresql_url, "DBSESSION_POOLED_URL": pgbouncer_url}
    found, findings = report("--workers=2", "--worker-connections=10", **env)
    assert {each["level"] for each in found["findings"]} <= {"ok", "info"}
    facts = found["databases"]["default"]
    assert facts["version"].startswith("PostgreSQL ") and facts["cooperative"] is True
    direct, pooled = facts["server"], found["databases"]["pooled"]["server"]
    assert " ".join(direct) == (
        "host port account tls time_zone utc_offset_s isolation max_connections database started_at "
        "superuser_reserved_connections reserved_connections role_limit database_limit client_backends "
        "statement_timeout_s idle_in_transaction_session_timeout_s idle_session_timeout_s "
        "client_connection_check_interval_s standby read_only sslmode "
        "pooler"
    )
    with postgresql.root() as cursor:
        cursor.execute("SELECT version(), pg_postmaster_start_time() AS started")
        row = cursor.fetchone()
    assert facts["version"].split()[1] in row["version"]
    assert direct["started_at"] == pooled["started_at"] == f"{row['started'].astimezone(UTC):%Y-%m-%dT%H:%M:%S.%fZ}"
    assert (direct["host"], direct["port"], direct["account"]) == ("127.0.0.1", postgresql.port, "app")
    assert (direct["max_connections"], direct["superuser_reserved_connections"]) == (300, 3)
    assert (direct["isolation"], direct["tls"], direct["sslmode"]) == ("READ COMMITTED", None, "prefer")
    assert (direct["pooler"], pooled["pooler"]) == (False, True)
    assert findings[("default", "budget")]["level"] == "ok" and ("default", "pooler") not in findings
    assert findings[("default", "writable")]["found"] == "it takes writes"
    assert "less 3 reserved ones and " in findings[("default", "budget")]["found"]
    assert "SET LOCAL" in findings[("pooled", "pooler")]["change"]
    assert "max_client_conn" in findings[("pooled", "budget")]["change"]


def test_check_says_why_postgresql_lets_nobody_in_and_shows_no_password(postgresql, postgresql_url, pgbouncer_url):
    """And what is hidden from the account, it leaves out."""
    with postgresql.root(urlsplit(postgresql_url).path[1:]) as cursor:
        cursor.execute("CREATE ROLE few LOGIN PASSWORD 'tell-nobody' CONNECTION LIMIT 0")
        cursor.execute("REVOKE SELECT ON pg_stat_activity FROM PUBLIC")
    env = {
        "DBSESSION_URL": postgresql_url,
        "DBSESSION_WRONG_URL": postgresql_url.replace(postgresql.password, "n0tth1s"),
        "DBSESSION_BEHIND_URL": pgbouncer_url.replace(postgresql.password, "n0tth1s"),
        "DBSESSION_FULL_URL": postgresql_url.replace(f"app:{postgresql.password}", "few:tell-nobody"),
        "DBSESSION_NONE_URL": f"{postgresql_url}_none",
        "DBSESSION_DOWN_URL": postgresql_url.replace(f":{postgresql.port}/", ":1/"),
    }
    try:
        found, findings = report(status=1, **env)
    finally:
        with postgresql.root() as cursor:
            cursor.execute("DROP ROLE few")
    numbers = {name: each["error_number"] for name, each in found["databases"].items()}
    assert numbers == {
        **{"default": "42501", "wrong": "28P01", "behind": "28P01", "full": "53300", "none": "3D000", "down": None}
    }
    assert findings[("wrong", "reachable")]["found"] == "no connection: OperationalError (28P01)"
    assert "CONNECTION LIMIT" in findings[("full", "reachable")]["change"]
    assert findings[("default", "reachable")]["level"] == "ok"
    assert findings[("default", "facts")]["found"] == "it did not tell everything: ProgrammingError (42501)"
    assert not any(secret in json.dumps(found) for secret in ("n0tth1s", "tell-nobody", postgresql.password))


@pytest.mark.slow
def test_check_sees_what_is_set_for_the_database_of_postgresql(postgresql, postgresql_url, tmp_path):
    """A database that begins read-only is warned of, unless it is configured so."""
    name = urlsplit(postgresql_url).path[1:]
    with postgresql.root(name) as cursor:
        for setting in (
            "statement_timeout = '90s'",
            "default_transaction_read_only = on",
            "idle_session_timeout = '9min'",
        ):
            cursor.execute(f"ALTER DATABASE {name} SET {setting}")
        cursor.execute(f"ALTER DATABASE {name} CONNECTION LIMIT 39")
    databases = {"default": postgresql_url, "reader": {"url": postgresql_url, "readonly": True}}
    (tmp_path / "conf.py").write_text(f"databases = {databases!r}")
    found, findings = report("--config=conf:databases", status=1, cwd=tmp_path)
    assert found["databases"]["default"]["server"]["read_only"] == "database"
    assert findings[("default", "writable")]["level"] == "warning"
    assert findings[("reader", "writable")]["found"] == "read-only by this configuration"
    assert findings[("default", "statement_timeout")]["found"].startswith("statement_timeout 90 s, ")
    assert findings[("default", "pool_recycle")]["change"].startswith("Set pool_recycle below 540")
    assert "of the CONNECTION LIMIT 39 of the database" in findings[("default+reader", "database_budget")]["found"]
