"""`dbsession check`, as a user runs it."""

from __future__ import annotations

import subprocess
import sys

from support.processes import script_env

SECRET = "s3cret"


def run(*arguments, **env):
    command = [sys.executable, "-m", "dbsession", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=script_env(env))


def test_check_says_how_long_each_database_took(tmp_path):
    done = run("check", DBSESSION_URL=f"sqlite:///{tmp_path}/a.db", DBSESSION_AUDIT_URL=f"sqlite:///{tmp_path}/b.db")
    assert done.returncode == 0, done.stderr
    assert [line.split(" ok, ")[0] for line in done.stdout.splitlines()] == ["audit:", "default:"]


def test_check_fails_when_one_database_does_and_shows_no_secret(tmp_path):
    down = f"mysql+pymysql://u:{SECRET}@127.0.0.1:1/db"
    done = run("check", DBSESSION_URL=f"sqlite:///{tmp_path}/a.db", DBSESSION_DOWN_URL=down, DBSESSION_BAD_URL="x")
    assert done.returncode == 1
    assert "default: ok" in done.stdout and "down: no connection, OperationalError (2003)" in done.stderr
    assert "'bad'" in done.stderr and "[DBS-CONFIG]" in done.stderr and SECRET not in done.stdout + done.stderr


def test_check_of_an_unknown_name_and_of_nothing():
    done = run("check", "orders")
    assert done.returncode == 1 and "DBSESSION_ORDERS_URL is not set" in done.stderr
    done = run("check")
    assert done.returncode == 2 and "DBSESSION_URL" in done.stderr


def test_wrong_usage_ends_with_2():
    assert run().returncode == 2
    assert run("chekc").returncode == 2
    assert run("--help").returncode == 0
