"""What configure() takes, and what it says of what it does not take."""

from __future__ import annotations

import inspect
import math
import typing

import pytest
from sqlalchemy import URL, create_engine, text
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool, QueuePool, StaticPool

from dbsession import ConfigError, SessionManager, UnknownDatabase
from dbsession.core.config import DatabaseConfig
from dbsession.core.entries import parse
from dbsession.core.keys import OPTIONS
from dbsession.green.pool import FairPool

FILE = "sqlite:///unused.db"
SECRET = "s3cret"


def refused(databases: object) -> str:
    with pytest.raises(ConfigError) as caught:
        SessionManager(databases)
    text = str(caught.value)
    assert text.endswith("[DBS-CONFIG]")
    return text


def test_entry_may_be_a_string_a_url_or_a_mapping(tmp_path):
    url = f"sqlite:///{tmp_path}/a.db"
    manager = SessionManager({"a": url, "b": URL.create("sqlite", database=f"{tmp_path}/b.db"), "c": {"url": url}})
    assert [manager.engine(name).url.database for name in "abc"] == [f"{tmp_path}/{n}.db" for n in "aba"]


@pytest.mark.parametrize("entry", [5, None, [FILE], b"sqlite://", object(), True])
def test_entry_of_a_wrong_type_is_refused_with_its_type(entry):
    text = refused({"orders": entry})
    assert "'orders'" in text and type(entry).__name__ in text


@pytest.mark.parametrize(("name", "shown"), [(5, "5"), (None, "None"), ("", "''"), (("a",), "a tuple")])
def test_name_that_is_no_string_is_refused(name, shown):
    assert f"not {shown}." in refused({name: FILE})


def test_unknown_key_is_named_with_those_there_are():
    text = refused({"orders": {"url": FILE, "pool_size": 5}})
    assert "'orders'" in text and "'pool_size'" in text and "`options`" in text


MISPLACED = [
    ({"urll": 1}, "'urll'", "Did you mean `url`?"),
    ({"readonli": SECRET}, "'readonli'", "Did you mean `readonly`?"),
    ({"pool_size": SECRET}, "'pool_size'", "belongs into `options`"),
    ({"pool_sise": SECRET}, "'pool_sise'", "Did you mean `pool_size`? It is an argument of create_engine"),
    ({"autoflush": SECRET}, "'autoflush'", "belongs into `session`"),
    ({"charset": SECRET}, "'charset'", "belongs into `connect_args` in `options`"),
    ({"read_timeout": SECRET}, "'read_timeout'", "its key is `read_timeout_s`"),
    ({"password": SECRET}, "'password'", "a part of the `url`"),
    ({"options": {"readonly": SECRET}}, "`readonly`", "belongs beside `url`"),
    ({"options": {"pool_sise": SECRET}}, "`pool_sise`", "Did you mean `pool_size`?"),
    ({"options": {"autoflush": SECRET}}, "`autoflush`", "belongs into `session`"),
    ({"options": {"connect_args": {"charsett": SECRET}}}, "'charsett'", "Did you mean `charset`?"),
    ({"options": {"connect_args": {"pool_size": SECRET}}}, "'pool_size'", "belongs into `options`"),
    ({"url": f"mysql+pymysql://u@h/d?charsett={SECRET}"}, "'charsett'", "Did you mean `charset`?"),
    ({"session": {"autoflsh": SECRET}}, "'autoflsh'", "Did you mean `autoflush`?"),
    ({"session": {"guard": SECRET}}, "'guard'", "belongs beside `url`"),
]


@pytest.mark.parametrize(("entry", "key", "said"), MISPLACED, ids=[str(index) for index in range(len(MISPLACED))])
def test_key_that_is_misspelt_or_in_the_wrong_place_is_told_what_was_meant(entry, key, said):
    text = refused({"orders": {"url": f"mysql+pymysql://u:{SECRET}@h/d", **entry}})
    assert "'orders'" in text and key in text and said in text and SECRET not in text


def test_connect_argument_like_no_other_is_left_to_a_listener_of_the_engine():
    entry = {"url": "mysql+pymysql://u@h/d", "options": {"connect_args": {"token_of_mine": 1}}}
    assert SessionManager({"orders": entry}).engine("orders")


def test_arguments_of_create_engine_are_all_known():
    said = set(inspect.signature(typing.get_overloads(create_engine)[0]).parameters)
    deprecated = {"convert_unicode", "future", "implicit_returning"}
    assert said - deprecated - {"url", "kwargs"} <= set(OPTIONS)


@pytest.mark.parametrize("key", ["options", "session"])
@pytest.mark.parametrize("value", [5, None, [("a", 1)], "x", {1: 2}])
def test_arguments_must_be_a_mapping_of_names(key, value):
    text = refused({"orders": {"url": FILE, key: value}})
    assert "'orders'" in text and f"`{key}`" in text


def test_missing_url_is_named():
    assert "'orders' has no `url`" in refused({"orders": {"options": {}}})


@pytest.mark.parametrize("url", ["", "nonsense", f"mysql://u:{SECRET}@h:port/db", f"//u:{SECRET}@h", 5, None])
def test_unparsable_url_is_refused_without_showing_it(url):
    text = refused({"orders": {"url": url}})
    assert "'orders'" in text and "`url`" in text and SECRET not in text


def test_secret_in_the_wrong_place_of_a_configuration_is_not_shown():
    url = "mysql+pymysql://u:s3cret@h/db"
    for databases in (
        {url: "orders"},
        {"orders": {url: "x"}},
        {"orders": {"url": "sqlite:///a.db", "options": {"echo": "s3cret"}}},
        {"orders": {"url": "sqlite:///a.db", "options": {url: 1}}},
        {"orders": "my@s3cret://h/db"},
    ):
        with pytest.raises(ConfigError) as caught:
            SessionManager(databases)
        assert "s3cret" not in str(caught.value), caught.value


def test_unknown_dialect_is_refused():
    assert "'msyql+pymysql'" in refused({"orders": f"msyql+pymysql://u:{SECRET}@h/db"})


def test_missing_driver_is_named_with_the_fix():
    text = refused({"orders": f"mysql+mysqldb://u:{SECRET}@h/db"})
    assert "not installed" in text and "mysql+pymysql" in text and SECRET not in text


def test_driver_that_cannot_be_imported_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "MySQLdb.py").write_text("from pymysql import gone_since\n")
    monkeypatch.syspath_prepend(tmp_path)
    text = refused({"orders": f"mysql+mysqldb://u:{SECRET}@h/db"})
    assert "is there, but cannot be imported: cannot import name 'gone_since'" in text and SECRET not in text


def test_option_that_create_engine_refuses_is_named():
    text = refused({"orders": {"url": FILE, "options": {"pool_sise": 5}}})
    assert "'orders'" in text and "`pool_sise`" in text


def test_option_that_the_pool_class_refuses_is_named():
    assert "`max_overflow`" in refused({"o": {"url": FILE, "options": {"poolclass": NullPool, "max_overflow": 1}}})


def test_poolclass_that_is_no_pool_is_refused():
    assert "`poolclass`" in refused({"o": {"url": FILE, "options": {"poolclass": int}}})


def test_connect_args_that_is_no_mapping_is_refused():
    assert "`connect_args`" in refused({"o": {"url": FILE, "options": {"connect_args": [1]}}})


@pytest.mark.parametrize("key", ["bind", "binds"])
def test_session_cannot_be_bound_elsewhere(key):
    assert f"'{key}'" in refused({"o": {"url": FILE, "session": {key: None}}})


@pytest.mark.parametrize("arguments", [{"expire_on_comit": False}, {"class_": int}, {"class_": "Session"}])
def test_session_argument_that_the_class_refuses_is_refused(arguments):
    assert "'o'" in refused({"o": {"url": FILE, "session": arguments}})


@pytest.mark.parametrize("value", [-1, math.nan, math.inf, "5", None, True])
def test_busy_timeout_must_be_a_number_of_seconds(value):
    assert "`busy_timeout_s`" in refused({"o": {"url": FILE, "busy_timeout_s": value}})


@pytest.mark.parametrize(
    "url",
    [
        "sqlite://",
        "sqlite:///:memory:",
        "sqlite:///file:x?mode=memory&uri=true",
        "sqlite:///file::memory:?cache=shared&uri=true",
    ],
)
def test_memory_sqlite_is_refused_unless_a_poolclass_is_given(url):
    assert "in-memory" in refused({"o": url})
    manager = SessionManager({"o": {"url": "sqlite://", "options": {"poolclass": StaticPool}}})
    with manager.scope():
        assert manager.get("o").scalar(text("SELECT 1")) == 1
    manager.dispose()


@pytest.mark.parametrize("databases", [5, "sqlite:///a.db", ["a"]])
def test_configure_refuses_what_is_no_mapping_or_callable(databases):
    assert type(databases).__name__ in refused(databases)


def test_configure_applies_nothing_when_one_entry_is_wrong(tmp_path):
    manager = SessionManager({"a": f"sqlite:///{tmp_path}/a.db"})
    engine = manager.engine("a")
    with pytest.raises(ConfigError):
        manager.configure({"b": f"sqlite:///{tmp_path}/b.db", "c": {"url": FILE, "options": {"nope": 1}}})
    assert manager.engine("a") is engine
    with pytest.raises(UnknownDatabase):
        manager.get("b")


def test_unknown_name_lists_the_others_and_guesses():
    manager = SessionManager({"orders": FILE, "audit": FILE})
    with pytest.raises(UnknownDatabase) as caught:
        manager.get("order")
    assert "'audit', 'orders'" in str(caught.value) and "Did you mean 'orders'?" in str(caught.value)
    assert isinstance(caught.value, LookupError)


def test_callable_is_asked_once_per_name(tmp_path):
    asked = []

    def find(name):
        asked.append(name)
        return f"sqlite:///{tmp_path}/{name}.db"

    manager = SessionManager(find)
    assert asked == []
    for _ in range(3):
        assert manager.engine("a") is manager.get("a")().get_bind()
        manager.clear()
    assert asked == ["a"]
    manager.dispose()


@pytest.mark.parametrize("answer", [lambda name: None, lambda name: {}, lambda name: {"a": FILE}[name]])
def test_callable_says_unknown_by_none_empty_or_lookuperror(answer):
    with pytest.raises(UnknownDatabase):
        SessionManager(answer).get("b")


def test_callable_unknown_lists_what_was_resolved():
    manager = SessionManager(lambda name: FILE if name == "orders" else None)
    manager.get("orders")
    with pytest.raises(UnknownDatabase, match="'orders'"):
        manager.get("ordres")


def test_callable_with_a_bad_entry_is_a_configerror_and_is_asked_again():
    answers = iter([{"urll": FILE}, FILE])
    manager = SessionManager(lambda name: next(answers))
    with pytest.raises(ConfigError, match="'urll'"):
        manager.get("a")
    manager.get("a")


def test_callable_that_asks_for_its_own_session_is_told_so():
    manager = SessionManager(lambda name: manager.engine(name).url)
    with pytest.raises(ConfigError, match="asks for its session"):
        manager.get("a")


def test_environment_is_read_on_first_use(monkeypatch, tmp_path):
    manager = SessionManager()
    proxy, other = manager.get(), manager.get("re-ports")  # before any configuration: unchecked
    monkeypatch.setenv("DBSESSION_URL", f"sqlite:///{tmp_path}/d.db")
    monkeypatch.setenv("DBSESSION_RE_PORTS_URL", f"sqlite:///{tmp_path}/r.db")
    with manager.scope():
        assert proxy().get_bind().url.database == f"{tmp_path}/d.db"
        assert other().get_bind().url.database == f"{tmp_path}/r.db"
    with pytest.raises(ConfigError, match="DBSESSION_RE_PORTS_URL"):
        manager.engine("re.ports")
    with pytest.raises(UnknownDatabase, match="DBSESSION_AUDIT_URL is not set"):
        manager.engine("audit")


def test_environment_with_two_default_urls_is_refused(monkeypatch):
    monkeypatch.setenv("DBSESSION_URL", FILE)
    monkeypatch.setenv("DBSESSION_DEFAULT_URL", FILE)
    assert SessionManager().engine().url.database == "unused.db"
    monkeypatch.setenv("DBSESSION_DEFAULT_URL", "sqlite:///other.db")
    with pytest.raises(ConfigError, match="DBSESSION_DEFAULT_URL"):
        SessionManager().engine()


def test_environment_nothing_set_is_unknown_and_says_what_to_set():
    said = r"DBSESSION_URL is not set: call configure\(\) or set DBSESSION_URL\. \["
    with pytest.raises(UnknownDatabase, match=said):
        SessionManager().engine()


@pytest.mark.parametrize("variable", ["DBSESSION_ULR", "DBSESION_URL", "DBSESSIONURL"])
def test_environment_with_a_misspelt_variable_is_told_which_is_read(monkeypatch, variable):
    monkeypatch.setenv(variable, f"sqlite:///{SECRET}.db")
    with pytest.raises(UnknownDatabase, match=rf"has {variable}\. Did you mean DBSESSION_URL\?") as caught:
        SessionManager().engine()
    assert SECRET not in str(caught.value)


def test_environment_with_other_names_lists_them(monkeypatch):
    monkeypatch.setenv("DBSESSION_AUDIT_URL", FILE)
    with pytest.raises(UnknownDatabase, match=r"set DBSESSION_AUDTI_URL\. .*: 'audit'\. Did you mean 'audit'\?"):
        SessionManager().engine("audti")


def test_engine_defaults_may_each_be_overridden():
    manager = SessionManager(
        {
            "plain": "mysql+pymysql://u:p@h/db",
            "own": {"url": "mysql+pymysql://u:p@h/db", "options": {"pool_size": 3, "max_overflow": 2}},
            "null": {"url": "mysql+pymysql://u:p@h/db", "options": {"poolclass": NullPool}},
            "stock": {"url": "mysql+pymysql://u:p@h/db", "options": {"poolclass": QueuePool}},
        }
    )
    plain, own = manager.engine("plain").pool, manager.engine("own").pool
    assert isinstance(plain, FairPool) and (plain.size(), plain._max_overflow, plain._recycle) == (20, 0, 3600)
    assert (own.size(), own._max_overflow) == (3, 2)
    assert type(manager.engine("null").pool) is NullPool
    assert type(manager.engine("stock").pool) is QueuePool and manager.engine("stock").pool.size() == 20
    session = manager.get("plain").session_factory()
    assert session.autoflush is False


def test_mysql_defaults_are_finite_timeouts_and_utf8mb4_below_the_url_and_the_options():
    from dbsession.core.pool.stats import Stats
    from dbsession.green.mysql.backend import PyMySQL

    def connect_args(url: str) -> object:
        return PyMySQL(parse("a", url), Stats()).engine_options().get("connect_args")

    assert connect_args("mariadb+pymysql://h/db") == {
        "charset": "utf8mb4", "connect_timeout": 10, "read_timeout": 60, "write_timeout": 60,
    }  # fmt: skip
    assert connect_args("mysql+pymysql://h/db?charset=latin1&read_timeout=5") == {
        "connect_timeout": 10, "write_timeout": 60,
    }  # fmt: skip


def test_users_session_class_is_mixed_in():
    class Mine(Session):
        def hello(self) -> str:
            return "hello"

    manager = SessionManager({"a": {"url": FILE, "session": {"class_": Mine, "expire_on_commit": False}}})
    with manager.scope():
        session = manager.get("a")()
        assert isinstance(session, Mine) and session.hello() == "hello" and session.expire_on_commit is False


def test_nothing_printable_shows_a_password():
    entry = {"url": f"mysql+pymysql://u:{SECRET}@h/db?k={SECRET}", "options": {"connect_args": {"password": SECRET}}}
    manager = SessionManager({"a": entry})
    shown = [repr(parse("a", entry)), repr(manager), repr(manager.get("a")), repr(manager.database("a"))]
    assert not any(SECRET in text for text in shown)
    assert isinstance(parse("a", entry), DatabaseConfig)


@pytest.mark.parametrize(
    "entry",
    [
        {"read_timeout_s": -1},
        {"read_timeout_s": 0},
        {"connect_timeout_s": float("nan")},
        {"write_timeout_s": "60"},
        {"read_timeout_s": 10**400},
        {"read_timeout_s": 5, "url": "mysql+pymysql://h/db?read_timeout=3"},
        {"connect_timeout_s": 5, "options": {"connect_args": {"connect_timeout": 3}}},
        {"reset": "everything"},
        {"reset": ["rollback"]},
        {"kill_abandoned": "yes"},
        {"readonly": 1},
        {"readonly": True, "options": {"isolation_level": "READ COMMITTED"}},
        {"ping_idle_s": -1},
    ],
    ids=repr,
)
def test_keys_for_mysql_are_checked_at_once(entry):
    with pytest.raises(ConfigError, match=r"^Database 'a': .*\[DBS-CONFIG\]$"):
        parse("a", {"url": "mysql+pymysql://h/db", **entry})


def test_unknown_reset_lists_the_valid_ones():
    with pytest.raises(ConfigError, match="'rollback', 'connection'"):
        parse("a", {"url": "mysql+pymysql://h/db", "reset": "none"})


def test_timeouts_reach_the_driver():
    from dbsession.core.pool.stats import Stats
    from dbsession.green.mysql.backend import PyMySQL

    config = parse("a", {"url": "mysql+pymysql://h/db", "connect_timeout_s": 1, "read_timeout_s": 2.5})
    assert PyMySQL(config, Stats()).engine_options()["connect_args"] == {
        "charset": "utf8mb4", "connect_timeout": 1, "read_timeout": 2.5, "write_timeout": 60,
    }  # fmt: skip
