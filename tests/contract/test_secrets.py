"""A URL where a name, a label or a word belongs: its password is in no error, log line, repr, report or traceback."""

from __future__ import annotations

import sys
import traceback

import pytest
from sqlalchemy.engine import URL

import dbsession
from dbsession import aio
from dbsession.core import sources
from dbsession.errors import is_url, masked
from dbsession.green import api
from dbsession.watch import cli
from support.halves import HALVES, done, entered

SECRET = "s3cr3t"

URLS = {
    "plain": f"mysql://u:{SECRET}@host/db",
    "driver and query": f"mysql+pymysql://u:{SECRET}@host:3306/db?charset=utf8mb4",
    "at sign": f"mysql://u:a@{SECRET}@host/db",
    "at sign and slash": f"mysql://u:a@{SECRET}/b@host/db",
    "slash": f"mysql://u:a/{SECRET}@host/db",
    "hash, question mark, space": f"mysql://u:a#?{SECRET} b@host/db",
    "percent": f"mysql://u:100%{SECRET}@host/db",
    "line end": f"mysql://u:a\n{SECRET}@host/db",
    "no user": f"redis://:{SECRET}@host",
    "slash in the user": f"mysql://u/x:{SECRET}@host/db",
    "no scheme": f"u:{SECRET}@host/db",
    "no slashes": f"mysql:u:{SECRET}@host",
    "no host": f"mysql://u:{SECRET}",
    "JDBC": f"jdbc:mysql://host/db?user=u&password={SECRET}",
    "query": f"postgresql://host/db?passwd={SECRET}",
    "key": f"postgresql://host/db?sslkey={SECRET}",
    "libpq": f"host=db user=u password='{SECRET} x' dbname=d",
    "ODBC": f"Driver=X;Server=db;UID=u;PWD={SECRET}",
}


QUICK = ("plain", "at sign", "no slashes", "JDBC", "libpq")
EACH = [pytest.param(what, marks=[] if what in QUICK else [pytest.mark.slow]) for what in URLS]


@pytest.fixture(params=HALVES)
def half(request):
    return HALVES[request.param]


@pytest.fixture(params=[False, True], ids=["unconfigured", "configured"])
def verbs(half, request, monkeypatch, tmp_path):
    """The module's functions over managers of this test's own."""
    for module in (api, aio):
        monkeypatch.setattr(module, "manager", type(module.manager)())
    monkeypatch.setattr(sources, "process_wide", sources.EnvironmentSource())
    if request.param:
        half.verbs.configure({"default": f"sqlite:///{tmp_path}/a.db"})
    return half.verbs


def told_by(half, work):
    """What a traceback shows of the error of `work`, and of those it came from; and the error itself."""

    async def run():
        try:
            return await done(work())
        except Exception as error:
            return error

    error = half.run(run)
    assert isinstance(error, Exception), f"no error, but {error!r}"
    return "".join(traceback.format_exception(error)), error


@pytest.mark.parametrize("what", EACH)
def test_f31_password_of_a_url_given_as_a_name_is_never_shown(half, verbs, what, caplog):
    url = URLS[what]
    for work in (
        lambda: verbs.get_dbsession(url),
        lambda: verbs.SessionManager().get(url),
        lambda: verbs.get_engine(url),
        lambda: verbs.release_dbsession(url),
        lambda: verbs.run_in_transaction(lambda: None, name=url),
        lambda: verbs.transactional(name=url)(lambda: None)(),
    ):
        shown, error = told_by(half, work)
        assert isinstance(error, dbsession.UnknownDatabase) and SECRET.lower() not in shown.lower(), shown
        assert "A URL is no name" in shown
    assert SECRET not in caplog.text


@pytest.mark.parametrize("what", ["plain", "at sign", "libpq"])
def test_f31_password_of_a_url_in_the_wrong_place_of_a_configuration_is_never_shown(half, verbs, what, tmp_path):
    url, good = URLS[what], f"sqlite:///{tmp_path}/b.db"
    for wrong in (
        {url: "default"},
        {url: good},
        {(url,): good},
        {b"x" + url.encode(): good},
        {"default": {url: good}},
        {"default": [url]},
        {"default": {"url": good, "guard": url}},
        {"default": {"url": good, "guard": {"url": url}}},
        {"default": {"url": good, "reset": [url]}},
        {"default": {"url": good, "busy_timeout_s": url}},
        {"default": {"url": good, "leak_after_s": (url,)}},
        {"default": {"url": good, "options": {"connect_args": url}}},
        {"default": {"url": good, "options": {"pool_size": url, "poolclass": url}}},
        {"default": {"url": good, "session": {"info": url}}},
        {"default": {"url": {"url": url}}},
        {"default": {"url": "x" + url + ":port:"}},
        [url],
        url,
    ):
        shown, error = told_by(half, lambda wrong=wrong: verbs.configure(wrong))
        assert isinstance(error, dbsession.ConfigError) and SECRET not in shown, shown


@pytest.mark.parametrize("what", ["plain", "driver and query", "at sign", "slash", "slash in the user", "libpq"])
def test_f31_password_is_not_shown_by_what_reads_the_environment(half, verbs, what, monkeypatch):
    monkeypatch.setenv("DBSESSION_URL", URLS[what].replace("mysql", "msyql"))
    half.verbs.configure()
    shown, _ = told_by(half, lambda: verbs.get_engine())
    assert SECRET not in shown, shown
    shown, _ = told_by(half, lambda: verbs.get_engine("reports"))
    assert SECRET not in shown, shown


@pytest.mark.parametrize("what", ["at sign", "at sign and slash", "slash in the user"])
def test_f31_url_whose_password_would_be_read_as_its_host_is_refused(half, verbs, what):
    shown, error = told_by(half, lambda: verbs.configure({"default": URLS[what]}))
    assert isinstance(error, dbsession.ConfigError) and "percent-encoded" in shown and SECRET not in shown


@pytest.mark.parametrize("what", EACH)
def test_f31_password_in_a_label_is_masked(half, verbs, what):
    async def main():
        async with entered(verbs.session_scope(URLS[what])) as scope:
            return scope.label, repr(scope)

    assert SECRET not in "".join(half.run(main))


@pytest.mark.parametrize("what", EACH)
def test_f31_check_shows_no_password_of_a_url_given_as_a_name(what, capsys, monkeypatch, tmp_path):
    url = URLS[what]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gevent.monkey.patch_all", lambda: None)
    (tmp_path / "reversed_mapping.py").write_text(f"databases = {{{url!r}: 'default'}}\n")
    reverse = ["check", "--config", "reversed_mapping:databases"]
    monkeypatch.syspath_prepend(str(tmp_path))
    for arguments in (["check", url], ["check", "--json", url], ["check", "--config", url], reverse, [*reverse, url]):
        assert cli.main(arguments) in (1, 2)
    del sys.modules["reversed_mapping"]
    for arguments in ([url], ["check", "--url", url], ["check", "--workers", url]):
        with pytest.raises(SystemExit):
            cli.main(arguments)
    said = capsys.readouterr()
    assert SECRET not in said.out + said.err and "***" in said.out + said.err


@pytest.mark.parametrize(
    "name", ["default", "shop:eu", "a/b", "tenant@eu", "orders 2", "Größe", "-", "a=b", "x://y"[0]]
)
def test_f31_what_is_a_name_is_shown_as_it_is(name, tmp_path):
    manager = dbsession.SessionManager({name: f"sqlite:///{tmp_path}/a.db"})
    assert not is_url(name) and masked(name) == name
    with pytest.raises(dbsession.UnknownDatabase) as caught:
        manager.get(f"{name}x")
    assert repr(f"{name}x") in str(caught.value) and repr(name) in str(caught.value)


def test_f31_url_objects_are_no_names(half, verbs):
    url = URL.create("mysql", "u", SECRET, "host", query={"password": SECRET})
    for work in (lambda: verbs.get_dbsession(url), lambda: verbs.configure({url: "default"})):
        shown, _ = told_by(half, work)
        assert SECRET not in shown, shown
