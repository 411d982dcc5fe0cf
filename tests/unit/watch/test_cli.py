"""The command line, as a user runs it."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from dbsession.watch import cli
from dbsession.watch.check.finding import LEVELS
from support.processes import script_env
from support.snapshots import Served, database, worker

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


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["chekc"], "Did you mean 'check'?"),
        (["Dashbord"], "Did you mean 'dashboard'?"),
        (["--versoin"], "unrecognized arguments: --versoin. Did you mean '--version'?"),
        (["check", "--wrokers=3"], "unrecognized arguments: --wrokers=3. Did you mean '--workers'?"),
        (["top", "--onse"], "dbsession top: error: unrecognized arguments: --onse. Did you mean '--once'?"),
        (["dashboard", "--prot", "1"], "unrecognized arguments: --prot 1. Did you mean '--port'?"),
        (["top", f"mysql://u:{SECRET}@h/d"], "unrecognized arguments:"),
        ([], "no command is given: choose from check, top, dashboard"),
    ],
)
def test_unknown_command_or_option_ends_with_2_and_what_was_meant(arguments, said, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    told = capsys.readouterr().err
    assert end.value.code == 2 and said in told and SECRET not in told


def examples(capsys):
    """The examples at the end of each command's help, each once."""
    found = {}
    for command in ([], ["check"], ["top"], ["dashboard"]):
        with pytest.raises(SystemExit) as end:
            cli.main([*command, "--help"])
        lines = capsys.readouterr().out.partition("\nexamples:\n")[2].splitlines()
        assert end.value.code == 0 and lines, command
        found.update(dict.fromkeys(line.strip() for line in lines))
    return found


def in_shell(line, folder, sockets):
    """How to start an example as it stands, but with another folder of sockets."""
    command = line.replace("/run/shop", str(sockets)).replace("dbsession ", f"{sys.executable} -m dbsession ", 1)
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(f"exec env {command}", shell=True, cwd=folder, env=script_env({}), **both)


@pytest.mark.slow  # nine processes
def test_examples_of_the_help_work_as_they_stand(tmp_path, capsys):
    (tmp_path / "shop.py").write_text("DATABASES = {'default': 'sqlite:///shop.db'}\n")
    for line in examples(capsys):
        with Served(tmp_path / "sockets", worker(1, database())) as served:
            live = " top " in line and "--once" not in line and "--json" not in line
            serves = " dashboard " in line
            if serves and "--port" not in line and "--socket" not in line:
                line += " --port 0"  # its own may be taken
            with in_shell(line, tmp_path, served.folder) as process:
                if serves:
                    assert process.stdout.readline().startswith("The dashboard of ")
                    process.terminate()
                out, err = process.communicate(timeout=60)
            assert process.returncode == (2 if live else 0), (line, out, err)
            assert not live or "This is no terminal" in err  # test_top.py has one


def test_check_warns_of_variables_that_nothing_reads(tmp_path):
    env = {"DBSESSION_URL": f"sqlite:///{tmp_path}/a.db", "DBSESSION_METRIC": SECRET, "DB_SESSION_URL": SECRET}
    done = run("check", **env)
    said = " ".join(done.stdout.split())
    assert done.returncode == 0 and "0 errors, 2 warnings" in said and SECRET not in said
    assert "the environment has DBSESSION_METRIC, which nothing reads -> Did you mean DBSESSION_METRICS?" in said
    told = json.loads(run("check", "--json", **env).stdout)
    assert told["status"] == "warning"
    assert [each["databases"] for each in told["findings"] if each["check"] == "environment"] == [[], []]


def test_check_says_what_the_environment_has_when_nothing_is_configured():
    done = run("check", DATABASE_URL=f"mysql://u:{SECRET}@h/d", DBSESION_URL=SECRET)
    assert done.returncode == 2 and SECRET not in done.stderr
    assert "DATABASE_URL, which dbsession does not read" in done.stderr and "Did you mean DBSESSION_URL?" in done.stderr


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
