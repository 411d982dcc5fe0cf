"""The command line, as a user runs it."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from dbsession.watch import cli
from dbsession.watch.check.findings import LEVELS
from support.processes import script_env

SECRET = "s3cret"


def run(*arguments, cwd=None, **env):
    command = [sys.executable, "-W", "error", "-m", "dbsession", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=cwd, env=script_env(env))


def rows(done):
    """(level, databases, check) of each line of the table that has them."""
    cells = [re.split(" {2,}", line) for line in done.stdout.splitlines()]
    return [tuple(row[:3]) for row in cells if row[0] in LEVELS]


def test_check_shows_each_database_when_all_is_well(tmp_path):
    done = run("check", DBSESSION_URL=f"sqlite:///{tmp_path}/a.db", DBSESSION_AUDIT_URL=f"sqlite:///{tmp_path}/b.db")
    assert (done.returncode, done.stderr) == (0, ""), done
    checks = ("reachable", "journal_mode", "writable")
    assert rows(done) == [("ok", name, check) for name in ("audit", "default") for check in checks]
    assert done.stdout.splitlines()[-1] == "0 errors, 0 warnings"


def test_check_fails_and_shows_no_secret_when_one_database_does(tmp_path):
    down = f"mysql+pymysql://u:{SECRET}@127.0.0.1:1/db"
    odd = f"mysql+pymysql://u:p@{SECRET}@127.0.0.1:1/db"  # the password's @ is not encoded: the host has a part of it
    env = {"DBSESSION_DOWN_URL": down, "DBSESSION_ODD_URL": odd, "DBSESSION_BAD_URL": "x"}
    done = run("check", DBSESSION_URL=f"sqlite:///{tmp_path}/a.db", **env)
    assert done.returncode == 1
    assert ("ok", "default", "reachable") in rows(done) and ("error", "down", "reachable") in rows(done)
    assert "OperationalError (2003)" in done.stdout and "Nothing answers there" in done.stdout
    assert ("error", "bad", "configuration") in rows(done) and "[DBS-CONFIG]" in done.stdout
    assert SECRET not in done.stdout + done.stderr
    assert SECRET not in run("check", "--json", **env).stdout


def test_check_says_what_it_knows_when_the_name_is_unknown_or_there_is_none():
    done = run("check", "orders")
    assert done.returncode == 1 and "DBSESSION_ORDERS_URL is not set" in " ".join(done.stdout.split())
    done = run("check")
    assert done.returncode == 2 and "DBSESSION_URL" in done.stderr and not done.stdout


def test_check_finds_a_sqlite_file_that_may_not_be_written(tmp_path):
    run("check", DBSESSION_URL=f"sqlite:///{tmp_path}/a.db")
    done = run("check", DBSESSION_URL=f"sqlite:///file:{tmp_path}/a.db?mode=ro&uri=true")
    assert done.returncode == 1 and ("error", "default", "writable") in rows(done)


def test_check_takes_a_mapping_when_config_names_an_attribute(tmp_path):
    (tmp_path / "conf.py").write_text(
        f"class Settings:\n    databases = {{'a': 'sqlite:///a.db', 'b': 'mysql+pymysql:{SECRET}'}}\n"
        "def find(name):\n    return {'c': 'sqlite:///c.db'}.get(name)\n"
    )
    done = run("check", "--config", "conf:Settings.databases", cwd=tmp_path)
    assert done.returncode == 1 and ("ok", "a", "reachable") in rows(done)
    assert ("error", "b", "configuration") in rows(done) and SECRET not in done.stdout
    done = run("check", "--config", "conf:Settings.databases", "x", cwd=tmp_path)
    assert done.returncode == 1 and "No database 'x' is configured. Configured are: 'a', 'b'." in done.stdout
    assert run("check", "--config", "conf:find", "c", cwd=tmp_path).returncode == 0
    assert run("check", "--config", "conf:find", cwd=tmp_path).returncode == 2


def test_check_takes_what_the_module_configured_when_config_names_a_module(tmp_path):
    (tmp_path / "app.py").write_text("import dbsession\ndbsession.configure({'a': 'sqlite:///a.db'})\n")
    done = run("check", "--config", "app", cwd=tmp_path)
    assert done.returncode == 0 and ("ok", "a", "reachable") in rows(done)


def test_check_ends_with_2_and_shows_no_secret_when_config_cannot_be_used(tmp_path):
    (tmp_path / "fails.py").write_text(f"x = 1\nraise RuntimeError('{SECRET}')\n")
    (tmp_path / "bad.py").write_text(f"import dbsession\ndbsession.configure({{'a': '{SECRET}'}})\nurl = '{SECRET}'\n")
    (tmp_path / "wrong.py").write_text(f"url = '{SECRET}'\n")
    for target, text in {
        "fails": "fails.py:2",
        "bad": "[DBS-CONFIG]",
        "wrong:url": "[DBS-CONFIG]",
        "wrong:other": "has no 'other'",
        "missing": "of 'missing'",
    }.items():
        done = run("check", "--config", target, cwd=tmp_path)
        assert done.returncode == 2 and text in done.stderr, done
        assert SECRET not in done.stdout + done.stderr


def test_wrong_usage_ends_with_2(capsys):
    def status(*arguments):
        with pytest.raises(SystemExit) as end:
            cli.main(arguments)
        return end.value.code

    assert status() == status("chekc") == 2
    for wrong in ("0", "-1", "1.5", "many", ""):
        capsys.readouterr()
        assert status("check", f"--workers={wrong}") == 2
        said = capsys.readouterr().err
        assert f"{wrong!r} is no number" in said and "_" not in said
    assert status("--help") == 0


def test_command_ends_without_a_traceback_when_nobody_reads_its_output(tmp_path):
    command = [sys.executable, "-W", "error", "-m", "dbsession", "check", "--json"]
    env = script_env({"DBSESSION_URL": f"sqlite:///{tmp_path}/a.db"})
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env) as process:
        process.stdout.close()
        assert (process.stderr.read(), process.wait(60)) == (b"", 1)


def test_version_prints_ours_and_those_of_the_libraries():
    done = run("--version")
    assert (done.returncode, done.stderr) == (0, ""), done
    ours, libraries = done.stdout.splitlines()[:2]
    assert re.fullmatch(r"gevent-dbsession \d+\.\d+\.\d+", ours)
    for name in ("Python", "SQLAlchemy", "gevent", "greenlet", "PyMySQL"):
        assert re.search(rf"\b{name} \d", libraries), name
