"""The public contract, on the gevent half and on the asyncio half: the same names, the same errors, the same ends."""

from __future__ import annotations

import inspect
import sqlite3

import pytest
from sqlalchemy import event, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import InvalidRequestError, OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.pool import NullPool, StaticPool

import dbsession
from dbsession import aio, errors
from dbsession.core import engine as created
from dbsession.core import sources
from dbsession.core.entries import KEYS
from dbsession.errors import ConfigError
from dbsession.green import api
from support.halves import HALVES, done, entered, on_both_halves, sync

SECRET = "s3cret"


class Base(DeclarativeBase):
    pass


class Item(Base):
    __tablename__ = "item"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(default="none")


@pytest.fixture(params=HALVES)
def half(request):
    return HALVES[request.param]


@pytest.fixture
def manager(half, tmp_path):
    manager = half.verbs.SessionManager({name: f"sqlite:///{tmp_path}/{name}.db" for name in ("default", "other")})

    async def prepare():
        for name in ("default", "other"):
            await done(manager.get(name).execute(text("CREATE TABLE item (id INTEGER PRIMARY KEY, name TEXT)")))
            await done(manager.get(name).execute(text("INSERT INTO item VALUES (1, 'one')")))
            await done(manager.get(name).commit())

    async def dispose():
        await done(manager.dispose())

    half.run(prepare)
    yield manager
    half.run(dispose)


@pytest.fixture
def verbs(half, monkeypatch):
    """The module's functions over a manager of this test's own, in a process that nobody has configured."""
    for module in (api, aio):
        monkeypatch.setattr(module, "manager", type(module.manager)())
    monkeypatch.setattr(sources, "process_wide", sources.EnvironmentSource())
    return half.verbs


def in_use(manager, name="default"):
    return manager.engine(name).pool.checkedout()


async def insert(manager, id, name="default"):
    await done(manager.get(name).execute(text("INSERT INTO item (id) VALUES (:id)"), {"id": id}))


async def rows(manager, name="default"):
    async with entered(manager.scope()):
        return sorted((await done(manager.get(name).scalars(text("SELECT id FROM item")))).all())


# --- names


def test_names_are_the_same_but_for_those_of_one_halfs_own_things():
    greenlets = {"DeadlineExceeded", "deadline", "ForeignSession", "UsedInHub"}
    reports = {"serve_snapshots"}
    assert set(dbsession.__all__) - greenlets - reports == set(aio.__all__) - {"LoopRequired", "loop_local", "running"}


def test_errors_are_the_same_classes():
    for name in aio.__all__:
        if inspect.isclass(getattr(aio, name)) and issubclass(getattr(aio, name), Exception):
            assert getattr(aio, name) is getattr(errors, name)
            assert getattr(dbsession, name, getattr(errors, name)) is getattr(errors, name)


@pytest.mark.parametrize("name", [each for each in aio.__all__ if inspect.isroutine(getattr(aio, each))])
def test_functions_take_the_same_arguments(name):
    if hasattr(dbsession, name):
        ours, theirs = (inspect.signature(getattr(module, name)).parameters for module in (aio, dbsession))
        assert [(each.name, each.kind, each.default) for each in ours.values()] == [
            (each.name, each.kind, each.default) for each in theirs.values()
        ]


def test_manager_has_the_same_verbs():
    verbs = {name for name in vars(dbsession.SessionManager) if not name.startswith("_")}
    own = {"known", "after_fork", "source"}  # for reports, for the fork hooks, for the process-wide configuration
    assert verbs - own <= {name for name in dir(aio.SessionManager) if not name.startswith("_")}


# --- get_dbsession, get_engine


@on_both_halves
async def test_proxy_is_the_same_object_for_ever_and_bound_to_its_engine(half, manager, tmp_path):
    proxy = manager.get()
    assert manager.get() is proxy is manager.get("default") is not manager.get("other")
    for name in ("default", "other"):
        assert manager.engine(name) is manager.engine(name)
        assert manager.get(name)().get_bind() is sync(manager.engine(name))
    manager.configure({"default": f"sqlite:///{tmp_path}/new.db"})
    assert manager.get() is proxy


@on_both_halves
async def test_proxy_of_module_level_works_when_configure_comes_later(half, verbs, tmp_path):
    proxy = verbs.get_dbsession("early")
    verbs.get_dbsession("late")  # unchecked as yet
    verbs.configure({"early": f"sqlite:///{tmp_path}/e.db"})
    assert verbs.get_dbsession("early") is proxy
    assert await done(proxy.scalar(text("SELECT 1"))) == 1
    assert proxy().get_bind() is sync(verbs.get_engine("early"))
    await done(verbs.release_dbsession("early"))
    assert verbs.get_engine("early").pool.checkedout() == 0
    await done(verbs.clear_dbsession())
    with pytest.raises(errors.UnknownDatabase):
        verbs.get_dbsession("late")
    await done(verbs.dispose())


@on_both_halves
async def test_proxy_of_module_level_works_when_the_environment_is_set_later(half, verbs, tmp_path, monkeypatch):
    proxy, other = verbs.get_dbsession(), verbs.get_dbsession("re-ports")
    monkeypatch.setenv("DBSESSION_URL", f"sqlite:///{tmp_path}/d.db")
    monkeypatch.setenv("DBSESSION_RE_PORTS_URL", f"sqlite:///{tmp_path}/r.db")
    assert proxy().get_bind().url.database == f"{tmp_path}/d.db"
    assert other().get_bind().url.database == f"{tmp_path}/r.db"
    with pytest.raises(errors.ConfigError, match="DBSESSION_RE_PORTS_URL"):
        verbs.get_engine("re.ports")
    with pytest.raises(errors.UnknownDatabase, match=r"call configure\(\) or set DBSESSION_AUDIT_URL"):
        verbs.get_engine("audit")


@on_both_halves
async def test_greenlet_or_task_has_a_session_of_its_own_which_ends_with_it(half, manager):
    seen = []

    async def use():
        seen.append(manager.get()())
        await done(manager.get().execute(text("SELECT 1")))
        assert manager.get()() is seen[-1]

    mine = manager.get()()
    for _ in range(3):
        await half.elsewhere(use)
    assert len({id(each) for each in [mine, *seen]}) == 4 and manager.get()() is mine
    await half.until(lambda: in_use(manager) == 0)
    for session in seen:
        with pytest.raises(InvalidRequestError, match="permanently closed"):
            await done(session.execute(text("SELECT 1")))


@on_both_halves
async def test_unknown_name_lists_the_others_and_guesses(half, tmp_path):
    manager = half.verbs.SessionManager({"orders": f"sqlite:///{tmp_path}/a.db", "audit": f"sqlite:///{tmp_path}/a.db"})
    for ask in (manager.get, manager.engine, manager.release):
        with pytest.raises(errors.UnknownDatabase) as caught:
            await done(ask("order"))
        assert str(caught.value) == (
            "No database 'order' is configured. Configured are: 'audit', 'orders'. Did you mean 'orders'? [DBS-UNKNOWN]"
        )
    assert isinstance(caught.value, LookupError)
    for wrong in (None, 5, "", ("orders",)):
        with pytest.raises(errors.UnknownDatabase):
            manager.get(wrong)


@on_both_halves
async def test_name_that_a_later_configuration_does_not_have_is_refused_at_once(half, manager, tmp_path):
    proxy = manager.get("other")
    proxy()
    manager.configure({"default": f"sqlite:///{tmp_path}/b.db"})
    with pytest.raises(errors.UnknownDatabase, match="'other'"):
        manager.get("other")
    with pytest.raises(errors.UnknownDatabase, match="'other'"):
        await done(proxy.execute(text("SELECT 1")))


# --- configure


FILE = "sqlite:///unused.db"
WRONG = {
    "a number": 5,
    "nothing": None,
    "bytes": b"sqlite://",
    "unknown key": {"url": FILE, "pool_size": 5},
    "no url": {"options": {}},
    "bad url": {"url": f"mysql://u:{SECRET}@h:port/db"},
    "options no mapping": {"url": FILE, "options": 5},
    "session no mapping": {"url": FILE, "session": "x"},
    "unknown dialect": f"msyql+pymysql://u:{SECRET}@h/db",
    "misspelt connect argument": {"url": f"mysql+pymysql://u:{SECRET}@h/d?charsett={SECRET}"},
    "unknown option": {"url": FILE, "options": {"pool_sise": SECRET}},
    "refused option": {"url": FILE, "options": {"poolclass": NullPool, "max_overflow": 1}},
    "poolclass no pool": {"url": FILE, "options": {"poolclass": int}},
    "connect_args no mapping": {"url": FILE, "options": {"connect_args": [SECRET]}},
    "bind": {"url": FILE, "session": {"bind": None}},
    "unknown session argument": {"url": FILE, "session": {"expire_on_comit": False}},
    "class_ no class": {"url": FILE, "session": {"class_": "Session"}},
    "class_ no session": {"url": FILE, "session": {"class_": int}},
    "busy timeout": {"url": FILE, "busy_timeout_s": -1},
    "memory": "sqlite://",
    "memory by uri": "sqlite:///file:x?mode=memory&uri=true",
    "readonly": {"url": FILE, "readonly": 1},
    "reset": {"url": FILE, "reset": "everything"},
}


@pytest.mark.parametrize("what", WRONG)
@on_both_halves
async def test_configure_refuses_bad_input_at_once_and_applies_nothing(half, manager, tmp_path, what):
    engine = manager.engine()
    with pytest.raises(errors.ConfigError, match=r"^Database 'orders'.*\[DBS-CONFIG\]$") as caught:
        manager.configure({"new": f"sqlite:///{tmp_path}/b.db", "orders": WRONG[what]})
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None or SECRET not in str(caught.value.__cause__)
    assert manager.engine() is engine
    with pytest.raises(errors.UnknownDatabase):
        manager.get("new")


@pytest.mark.parametrize("databases", [5, "sqlite:///a.db", ["a"]])
@on_both_halves
async def test_configure_refuses_what_is_no_mapping_or_callable(half, databases):
    with pytest.raises(errors.ConfigError, match=type(databases).__name__):
        half.verbs.SessionManager(databases)


ONE_ENTRY = [
    {"url": f"sqlite:///{SECRET}.db"},
    {"url": make_url(FILE), "options": {"pool_size": 3}, "guard": "warn"},
    {"url": FILE, "pool_size": 3},
]


@pytest.mark.parametrize("entry", ONE_ENTRY, ids=["url", "with_its_keys", "with_keys_of_others"])
@on_both_halves
async def test_entry_in_place_of_a_mapping_is_told_to_put_a_name_before_it(half, manager, entry):
    engine = manager.engine()
    with pytest.raises(
        errors.ConfigError, match=r"the entry of one database, with 'url'.*write {'default': {"
    ) as caught:
        manager.configure(entry)
    assert SECRET not in str(caught.value) and manager.engine() is engine


@pytest.mark.parametrize("databases", [{"url": FILE, "audit": FILE}, {"url": {"url": FILE}}])
@on_both_halves
async def test_database_may_be_called_url(half, manager, databases):
    manager.configure(databases)
    assert manager.engine("url").url.database == "unused.db"


@on_both_halves
async def test_nothing_configured_names_what_the_environment_has_and_no_value(half, manager, monkeypatch):
    for variable in ("DATABASE_URL", "DBSESION_URL", "DBSESSION_ULR"):
        monkeypatch.setenv(variable, f"mysql://u:{SECRET}@h/d")
    manager.configure()
    with pytest.raises(errors.UnknownDatabase) as caught:
        manager.engine()
    said = str(caught.value)
    assert "has DATABASE_URL, which dbsession does not read: set DBSESSION_URL to its value." in said
    assert "has DBSESION_URL. Did you mean DBSESSION_URL?" in said and "has DBSESSION_ULR. Did" in said
    assert SECRET not in said
    monkeypatch.setenv("DBSESSION_AUDIT_URL", FILE)  # so the environment is known
    with pytest.raises(errors.UnknownDatabase) as caught:
        manager.engine()
    assert "DATABASE_URL" not in str(caught.value)


ENTRY = {
    "options": {"pool_size": 3},
    "session": {"expire_on_commit": True},
    "leak_after_s": 0,
    "idle_in_transaction_s": 0,
    "guard": "off",
}
OF_SQLITE = {"busy_timeout_s": 1, "readonly": False}
OF_MYSQL = {
    "connect_timeout_s": 1,
    "read_timeout_s": 1,
    "write_timeout_s": 1,
    "reset": "rollback",
    "kill_abandoned": False,
    "readonly": False,
    "ping_idle_s": 0,
}


@on_both_halves
async def test_configure_takes_every_key_of_its_database(half, tmp_path):
    """Those that one half has no use for are accepted, so that one configuration serves both."""
    assert {"url", *ENTRY, *OF_SQLITE, *OF_MYSQL} == set(KEYS)
    manager = half.verbs.SessionManager(
        {
            "default": {"url": f"sqlite:///{tmp_path}/a.db", **ENTRY, **OF_SQLITE},
            "mysql": {"url": "mysql+pymysql://u@127.0.0.1:1/a", **ENTRY, **OF_MYSQL},
        }
    )
    assert await done(manager.get().scalar(text("SELECT 1"))) == 1
    assert manager.engine().pool.size() == 3
    assert getattr(manager.get()(), "sync_session", manager.get()()).expire_on_commit is True
    await done(manager.clear())
    await done(manager.dispose())


@on_both_halves
@pytest.mark.parametrize(
    ("url", "taken"),
    [
        ("sqlite:///a.db", OF_SQLITE),
        ("sqlite+aiosqlite:///a.db", OF_SQLITE),
        ("mysql+pymysql://u@h/a", OF_MYSQL),
        ("mariadb+pymysql://u@h/a", OF_MYSQL),
        ("mysql+asyncmy://u@h/a", OF_MYSQL.keys() - {"write_timeout_s", "reset"}),
        ("mysql+aiomysql://u@h/a", OF_MYSQL.keys() - {"write_timeout_s", "reset"}),
        ("mysql+mysqldb://u@h/a", {"readonly"}),  # in asyncio asyncmy stands in for it
        ("postgresql+psycopg://u@h/a", OF_MYSQL),
        ("postgresql://u@h/a", OF_MYSQL),
        ("mssql+pyodbc://u@h/a", ()),
    ],
)
async def test_key_that_would_do_nothing_on_its_database_is_refused(half, url, taken):
    """Whatever its value is, the default included."""
    if half.name == "aio" and "mysqldb" in url:
        taken = OF_MYSQL.keys() - {"write_timeout_s", "reset"}
    for key in KEYS:
        if key in taken or key in ENTRY or key == "url":
            continue
        value = {**OF_SQLITE, **OF_MYSQL}[key]
        with pytest.raises(ConfigError, match=f"`{key}` does nothing on .*, it is for .*Remove it"):
            half.verbs.SessionManager({"default": {"url": url, key: value}})


@on_both_halves
async def test_memory_sqlite_is_taken_with_a_poolclass(half):
    manager = half.verbs.SessionManager({"default": {"url": "sqlite://", "options": {"poolclass": StaticPool}}})
    async with entered(manager.scope()):
        assert await done(manager.get().scalar(text("SELECT 1"))) == 1
    await done(manager.dispose())


@on_both_halves
async def test_callable_is_asked_on_first_use_and_once_per_name(half, tmp_path):
    asked = []

    def find(name):
        asked.append(name)
        return f"sqlite:///{tmp_path}/{name}.db"

    manager = half.verbs.SessionManager(find)
    assert asked == []
    for _ in range(3):
        assert sync(manager.engine("a")) is manager.get("a")().get_bind()
        await done(manager.clear())
    manager.get("b")
    manager.engine("b")
    assert asked == ["a", "b"]


@pytest.mark.parametrize("answer", [lambda name: None, lambda name: {}, lambda name: {"a": FILE}[name]])
@on_both_halves
async def test_callable_says_unknown_by_none_empty_or_lookuperror(half, answer):
    with pytest.raises(errors.UnknownDatabase):
        half.verbs.SessionManager(answer).get("b")


@on_both_halves
async def test_callable_with_a_bad_entry_is_asked_again(half):
    answers = iter([{"urll": FILE}, ConnectionError("down"), FILE])

    def find(name):
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    manager = half.verbs.SessionManager(find)
    with pytest.raises(errors.ConfigError, match="'urll'"):
        manager.get("a")
    with pytest.raises(ConnectionError):
        manager.get("a")
    manager.get("a")


@pytest.mark.parametrize("verb", ["get", "engine", "database"])
@on_both_halves
async def test_callable_that_asks_for_its_own_session_is_told_so(half, verb):
    manager = half.verbs.SessionManager(lambda name: getattr(manager, verb)(name) and FILE)
    for ask in (manager.get, manager.engine):
        with pytest.raises(errors.ConfigError, match="asks for its session"):
            ask("a")


@on_both_halves
async def test_callable_may_ask_for_another_database(half, manager, tmp_path):
    def find(name):
        if name == "default":
            return f"sqlite:///{tmp_path}/default.db"
        return second.engine("default").url

    second = half.verbs.SessionManager(find)
    assert second.engine("tenant").url == second.engine("default").url
    assert await done(second.get("tenant").scalar(text("SELECT name FROM item"))) == "one"
    await done(second.clear())
    await done(second.dispose())


@on_both_halves
async def test_configure_again_lets_a_transaction_finish_where_it_began(half, manager, tmp_path):
    proxy, old = manager.get(), manager.engine()
    await insert(manager, 7)
    before = proxy()
    manager.configure({"default": f"sqlite:///{tmp_path}/new.db"})
    assert manager.engine() is not old and proxy() is before and proxy().get_bind() is sync(old)
    await done(proxy.commit())
    assert proxy() is not before and proxy().get_bind() is sync(manager.engine())
    await half.until(lambda: (old.pool.checkedout(), old.pool.checkedin()) == (0, 0))
    manager.configure({"default": f"sqlite:///{tmp_path}/default.db"})
    assert await rows(manager) == [1, 7]


@on_both_halves
async def test_configure_again_gives_an_idle_session_of_a_long_scope_the_new_engine(half, manager, tmp_path):
    before = manager.get()()
    assert manager.get()() is before
    manager.configure({"default": f"sqlite:///{tmp_path}/new.db"})
    assert manager.get()() is not before and manager.get()().get_bind() is sync(manager.engine())
    with pytest.raises(InvalidRequestError, match="permanently closed"):
        await done(before.execute(text("SELECT 1")))


@on_both_halves
async def test_transaction_under_way_can_be_finished_when_its_name_is_gone(half, manager, tmp_path):
    proxy = manager.get("other")
    await insert(manager, 2, "other")
    manager.configure({"default": f"sqlite:///{tmp_path}/default.db"})
    await done(proxy.execute(text("UPDATE item SET id = 3 WHERE id = 2")))
    await done(proxy.commit())
    with pytest.raises(errors.UnknownDatabase):
        proxy()
    with sqlite3.connect(f"{tmp_path}/other.db") as written:
        assert written.execute("SELECT id FROM item").fetchall() == [(1,), (3,)]
    written.close()


# --- scopes


@on_both_halves
async def test_scopes_nest_and_each_has_its_own_sessions(half, manager):
    outer = manager.get()()
    async with entered(manager.scope("a job")) as unit:
        assert unit.label == "a job" and unit.kind == "block" and not unit.ended
        inner = manager.get()()
        async with entered(manager.scope()):
            assert manager.get()() not in (inner, outer)
        assert manager.get()() is inner is not outer
    assert unit.ended and manager.get()() is outer


@on_both_halves
async def test_scope_ends_when_its_block_raises_and_commits_nothing(half, manager):
    with pytest.raises(ZeroDivisionError):
        async with entered(manager.scope()) as unit:
            await insert(manager, 9)
            raise ZeroDivisionError
    assert in_use(manager) == 0 and unit.outcome == "rolled back" and await rows(manager) == [1]


@on_both_halves
async def test_scope_is_a_decorator_with_a_scope_for_each_call(half, verbs, manager):
    if half.name == "aio":

        @verbs.session_scope("a job")
        async def job(n):
            return manager.get()(), n
    else:

        @verbs.session_scope("a job")
        def job(n):
            return manager.get()(), n

    (first, one), (second, two) = await done(job(1)), await done(job(n=2))
    assert first is not second and (one, two) == (1, 2) and job.__name__ == "job"


@on_both_halves
async def test_scope_refuses_to_decorate_a_generator(half, verbs):
    def generator():
        yield

    async def async_generator():
        yield

    for function in (generator, async_generator):
        with pytest.raises(TypeError, match="generator"):
            verbs.session_scope()(function)


@on_both_halves
async def test_scope_can_be_opened_once_at_a_time(half, manager):
    block = entered(manager.scope())
    async with block:
        with pytest.raises(RuntimeError, match="open already"):
            await block.__aenter__()
    async with block as unit:
        assert not unit.ended


@on_both_halves
async def test_scope_that_was_ended_in_its_block_refuses_sessions(half, manager):
    async with entered(manager.scope("a job")) as unit:
        await done(manager.get().execute(text("SELECT 1")))
        await done(unit.end())
        await done(unit.end())
        assert in_use(manager) == 0
        with pytest.raises(errors.ScopeEnded, match=r"^a job is over .*\[DBS-SCOPE-ENDED\]$"):
            await done(manager.get().execute(text("SELECT 1")))
        await done(manager.clear())
        await done(manager.release())
    assert await done(manager.get().scalar(text("SELECT 1"))) == 1


@pytest.mark.parametrize("seconds", [0, -1, "5", float("nan"), True])
@on_both_halves
async def test_scope_refuses_a_wrong_timeout(half, verbs, seconds):
    with pytest.raises(errors.ConfigError, match=r"read_timeout_s.*\[DBS-CONFIG\]$"):
        verbs.session_scope(read_timeout_s=seconds)


@on_both_halves
async def test_label_is_one_line_of_printable_characters(half, manager):
    async with entered(manager.scope("a\nb\x1b[31m")) as unit:
        assert unit.label == r"a\nb\x1b[31m" and "ended" not in repr(unit)
    assert repr(unit).endswith("ended, 0 sessions>")


@on_both_halves
async def test_outcome_is_readable_on_the_scope(half, manager):
    async with entered(manager.scope()) as unit:
        assert unit.outcome is None
        await insert(manager, 2)
        await done(manager.get().commit())
        assert unit.outcome == "committed"
        await done(manager.get().execute(text("SELECT 1")))
        await done(manager.get().rollback())  # it wrote nothing, so this says nothing of the work
        assert unit.outcome == "committed"
        await insert(manager, 3)
    assert unit.outcome == "rolled back" and unit.outcomes == {"default": "rolled back"}
    async with entered(manager.scope()) as unit:
        await insert(manager, 4)
        async with entered(manager.get().begin_nested()):
            await insert(manager, 5)
        assert unit.outcome is None
    assert unit.outcome == "rolled back" and await rows(manager) == [1, 2]


# --- clear, remove, the session's end


@on_both_halves
async def test_clear_is_idempotent_and_the_scope_stays_usable(half, manager):
    await done(manager.clear())
    before = manager.get()()
    await done(manager.get().execute(text("SELECT 1")))
    await done(manager.clear())
    await done(manager.clear())
    assert in_use(manager) == 0 and manager.get()() is not before
    assert await done(manager.get().scalar(text("SELECT 1"))) == 1


@pytest.mark.parametrize("end", ["clear", "close", "remove", "invalidate", "end of the scope"])
@pytest.mark.parametrize("used", [False, True])
@on_both_halves
async def test_session_that_has_ended_refuses_every_use_and_the_proxy_gives_a_fresh_one(half, manager, end, used):
    async with entered(manager.scope()) as unit:
        session = manager.get()()
        if used:
            await done(session.execute(text("SELECT 1")))
        if end != "end of the scope":
            ends = {"clear": manager.clear, "remove": manager.get().remove}
            await done(ends[end]() if end in ends else getattr(session, end)())
            assert not unit.sessions and manager.get()() is not session
    for use in (
        lambda: session.execute(text("SELECT 1")),
        lambda: session.get(Item, 1),
        lambda: session.add(Item(id=2)),
        lambda: session.connection(),
    ):
        with pytest.raises(InvalidRequestError, match="permanently closed"):
            await done(use())
    assert in_use(manager) == 0


@on_both_halves
async def test_clear_leaves_the_sessions_of_another_manager_alone(half, manager, tmp_path):
    second = half.verbs.SessionManager({"default": f"sqlite:///{tmp_path}/second.db"})
    mine, others = manager.get()(), second.get()()
    assert mine.get_bind() is not others.get_bind()
    await done(second.clear())
    assert manager.get()() is mine and second.get()() is not others
    await done(second.clear())


@on_both_halves
async def test_proxy_works_as_users_of_scoped_session_know_it(half, manager):
    proxy = manager.get()
    assert proxy.registry.has() is False
    session = proxy(info={"x": 1})
    assert session.info == {"x": 1} and proxy() is session is proxy.registry() and proxy.registry.has() is True
    with pytest.raises(InvalidRequestError, match="already present"):
        proxy(info={"x": 2})
    item = await done(proxy.get(Item, 1))
    assert item in proxy and not proxy.dirty and not proxy.new
    await done(proxy.remove())
    assert proxy.registry.has() is False and proxy() is not session
    proxy.registry.clear()
    await done(proxy.remove())
    replacement = proxy.session_factory()
    proxy.registry.set(replacement)
    assert proxy() is replacement
    await done(proxy.remove())
    proxy.configure(info={"x": 3})
    assert proxy().info == {"x": 3}
    assert repr(proxy).endswith("ScopedSession 'default'>")


@on_both_halves
async def test_sessions_do_not_autoflush_by_default(half, manager):
    manager.get().add(Item(id=3))
    assert (await done(manager.get().scalars(text("SELECT id FROM item")))).all() == [1]


@on_both_halves
async def test_session_that_fails_to_close_raises_nothing_and_costs_no_place(half, manager, caplog):
    sessions = []
    for name in ("default", "other"):
        sessions.append(manager.get(name)())
        await done(manager.get(name).execute(text("SELECT 1")))
        event.listen(getattr(sessions[-1], "sync_session", sessions[-1]), "after_transaction_end", _fail)
    async with entered(manager.scope("a job")):
        for name in ("default", "other"):  # in a transaction, and without a connection
            manager.get(name).add(Item(id=2))
            event.listen(
                getattr(manager.get(name)(), "sync_session", manager.get(name)()), "after_transaction_end", _fail
            )
    await done(manager.clear())
    assert (in_use(manager), in_use(manager, "other")) == (0, 0)
    assert all(manager.get(name)() not in sessions for name in ("default", "other"))
    lines = [
        record.getMessage()
        for record in caplog.records
        if record.name in ("dbsession.teardown", "dbsession.aio.closing")
    ]
    assert len(lines) == 4 and not any("secret" in line for line in lines)
    assert sum("of a job failed to close with RuntimeError" in line for line in lines) == 2


def _fail(session, transaction):
    raise RuntimeError("secret")


# --- release


@on_both_halves
async def test_release_gives_connections_back_and_keeps_objects_attached(half, manager):
    item = await done(manager.get().get(Item, 1))
    await done(manager.get("other").execute(text("SELECT 1")))
    session = manager.get()()
    await done(manager.release())
    assert in_use(manager) == in_use(manager, "other") == 0
    assert manager.get()() is session and item in session and "name" not in item.__dict__
    await done(session.refresh(item))
    assert item.name == "one" and in_use(manager) == 1


@on_both_halves
async def test_release_of_one_name_leaves_the_others(half, manager):
    for name in ("default", "other"):
        await done(manager.get(name).execute(text("SELECT 1")))
    await done(manager.release("other"))
    assert (in_use(manager), in_use(manager, "other")) == (1, 0)
    with pytest.raises(errors.UnknownDatabase, match="'other'"):
        await done(manager.release("othr"))


@on_both_halves
async def test_release_without_a_scope_or_a_transaction_does_nothing(half, manager):
    await done(manager.release())
    session = manager.get()()
    await done(manager.release())
    await done(manager.release("default"))
    assert manager.get()() is session


async def new(session):
    session.add(Item(id=3))


async def dirty(session):
    (await done(session.get(Item, 1))).name = "uno"


async def deleted(session):
    await done(session.delete(await done(session.get(Item, 1))))


async def flushed(session):
    session.add(Item(id=3))
    await done(session.flush())


async def core_write(session):
    await done(session.execute(text("  -- a comment\n UPDATE item SET name = 'x'")))


async def many(session):
    await done(session.execute(text("INSERT INTO item (id) VALUES (:id)"), [{"id": 3}, {"id": 4}]))


async def cte_write(session):
    await done(session.execute(text("BEGIN")))  # sqlite3 itself begins none for a WITH
    await done(session.execute(text("WITH i AS (SELECT 1 AS id) DELETE FROM item WHERE id IN (SELECT id FROM i)")))


async def driver_write(session):
    connection = await done(session.connection())
    await done(connection.exec_driver_sql("DELETE FROM item", execution_options={"no_parameters": True}))


@pytest.mark.parametrize("work", [new, dirty, deleted, flushed, core_write, many, cte_write, driver_write])
@on_both_halves
async def test_release_refuses_unsaved_work_and_changes_nothing(half, manager, work):
    session = manager.get()
    await done(manager.get("other").execute(text("SELECT 1")))
    await done(session.execute(text("SELECT 1")))
    await work(session)
    with pytest.raises(errors.UnsavedWork, match=r"'default'.*commit\(\) or rollback\(\).*\[DBS-UNSAVED\]$"):
        await done(manager.release())
    assert (in_use(manager), in_use(manager, "other")) == (1, 1)
    await done(session.commit())
    await done(manager.release())
    assert in_use(manager) == 0


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT 1",
        "/* a */ SELECT 1",
        "WITH a AS (SELECT 1 AS n) SELECT n FROM a",
        "PRAGMA journal_mode",
        "EXPLAIN SELECT 1",
        "VALUES (1)",
    ],
)
@on_both_halves
async def test_release_takes_reading_for_no_work(half, manager, statement):
    (await done(manager.get().execute(text(statement)))).all()
    await done(manager.release())
    assert in_use(manager) == 0


@on_both_halves
async def test_release_that_fails_to_roll_back_is_logged_and_gives_the_place_back(half, manager, caplog):
    await done(manager.get().execute(text("SELECT 1")))
    dialect = sync(manager.engine()).dialect
    original = vars(dialect).get("do_rollback")

    def do_rollback(connection):
        del dialect.do_rollback
        if original is not None:
            dialect.do_rollback = original
        raise RuntimeError("secret")

    dialect.do_rollback = do_rollback
    await done(manager.release())
    assert in_use(manager) == 0 and await done(manager.get().scalar(text("SELECT 1"))) == 1
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("dbsession")]
    assert len(lines) == 1 and "'default'" in lines[0] and "secret" not in lines[0]


# --- dispose, on_engine_created


@on_both_halves
async def test_dispose_closes_idle_connections_now_and_those_in_use_on_return(half, manager):
    engine = manager.engine()
    await done(manager.get().execute(text("SELECT 1")))
    async with entered(manager.scope()):
        await done(manager.get().execute(text("SELECT 1")))
    pool = engine.pool
    assert (pool.checkedout(), pool.checkedin()) == (1, 1)
    await done(manager.dispose())
    assert pool.checkedin() == 0
    assert await done(manager.get().scalar(text("SELECT 5"))) == 5  # in the middle of its transaction
    await done(manager.clear())
    assert (pool.checkedout(), pool.checkedin()) == (0, 0)
    assert await done(manager.get().scalar(text("SELECT 6"))) == 6 and manager.engine() is engine


@on_both_halves
async def test_function_is_told_of_each_engine_once_and_logged_when_it_fails(
    half, verbs, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(created, "listeners", [])
    told, url = [], f"sqlite:///{tmp_path}/a.db"
    manager = half.verbs.SessionManager({"default": url, "audit": url})
    engine = manager.engine()

    def tell(name, engine):
        if engine.url.database == f"{tmp_path}/a.db":
            told.append((name, engine))

    def broken(name, engine):
        raise ValueError("secret")

    assert verbs.on_engine_created(tell) is tell
    verbs.on_engine_created(tell)
    verbs.on_engine_created(broken)
    assert ("default", sync(engine)) in told
    audit = manager.engine("audit")
    assert sorted(told) == [("audit", sync(audit)), ("default", sync(engine))]
    replaced = engine
    manager.configure({"default": url})
    assert manager.engine() is not replaced and told[2:] == [("default", sync(manager.engine()))]
    assert caplog.records and not any("secret" in record.getMessage() for record in caplog.records)


# --- run_in_transaction, transactional


def busy():
    error = sqlite3.OperationalError("database is locked")
    error.sqlite_errorcode = sqlite3.SQLITE_BUSY
    return OperationalError(None, None, error)


def unit_of(half, work):
    """`work`, a coroutine function that takes no argument, as the function that this half runs in a transaction."""
    if half.name == "aio":
        return work

    def run():
        try:
            work().send(None)
        except StopIteration as end:
            return end.value

    run.__qualname__ = work.__qualname__
    return run


@on_both_halves
async def test_transaction_commits_in_a_scope_of_its_own_and_returns_what_fn_returned(half, manager):
    outer = manager.get()()

    async def work():
        labels.append(half.scopes.current().label)
        assert manager.get()() is not outer
        await insert(manager, 2)
        return "done"

    labels, run = [], manager.run_in_transaction
    assert await done(run(unit_of(half, work), label="import\nof orders")) == "done"
    assert await rows(manager) == [1, 2] and manager.get()() is outer and in_use(manager) == 0
    await done(run(lambda: labels.append(half.scopes.current().label)))
    assert labels == [r"import\nof orders", work.__qualname__.replace("work", "<lambda>")]


@on_both_halves
async def test_transaction_gives_fn_the_session_when_it_takes_an_argument(half, manager):
    run = manager.run_in_transaction
    assert await done(run(lambda session: session is manager.get("other"), name="other"))
    assert await done(run(lambda *all_of_them: all_of_them)) == ()
    assert await done(run(dict)) == {}


@on_both_halves
async def test_transaction_rolls_back_at_an_error_and_does_not_try_again(half, manager):
    calls = []

    async def work():
        calls.append(1)
        await insert(manager, 2)
        raise KeyError("mine")

    with pytest.raises(KeyError):
        await done(manager.run_in_transaction(unit_of(half, work)))
    assert calls == [1] and await rows(manager) == [1]


@on_both_halves
async def test_transaction_is_run_again_with_a_fresh_session_when_sqlite_is_busy(half, manager):
    seen = []

    async def work():
        seen.append(manager.get()())
        await insert(manager, len(seen) + 1)
        if len(seen) < 3:
            raise busy()

    await done(manager.run_in_transaction(unit_of(half, work), backoff_s=0.001))
    assert len(set(map(id, seen))) == 3 and await rows(manager) == [1, 4]
    assert manager.database("default").stats.retries == 2


@on_both_halves
async def test_transaction_that_another_writer_really_keeps_out_is_run_again(half, manager, tmp_path):
    manager.configure({"default": {"url": f"sqlite:///{tmp_path}/default.db", "busy_timeout_s": 0}})
    other = sqlite3.connect(f"{tmp_path}/default.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    calls = []

    async def work():
        calls.append(1)
        if len(calls) == 2:
            other.execute("ROLLBACK")
        await insert(manager, 2)

    await done(manager.run_in_transaction(unit_of(half, work), backoff_s=0.001))
    other.close()
    assert len(calls) == 2 and await rows(manager) == [1, 2]


@on_both_halves
async def test_transaction_raises_the_error_of_its_last_attempt(half, manager):
    calls = []

    async def work():
        calls.append(1)
        raise busy()

    with pytest.raises(OperationalError):
        await done(manager.run_in_transaction(unit_of(half, work), attempts=2, backoff_s=0.001))
    assert len(calls) == 2


@on_both_halves
async def test_transaction_that_fn_has_committed_itself_is_not_run_again(half, manager):
    calls = []

    async def work():
        calls.append(1)
        await insert(manager, 2)
        await done(manager.get().commit())
        raise busy()

    with pytest.raises(OperationalError):
        await done(manager.run_in_transaction(unit_of(half, work), backoff_s=0.001))
    assert len(calls) == 1 and await rows(manager) == [1, 2]


@on_both_halves
async def test_nested_transaction_joins_and_commits_once_at_the_end(half, manager):
    commits = []
    event.listen(sync(manager.engine()), "commit", commits.append)
    transactional = manager.transactional

    @transactional
    def part(n):
        return insert(manager, n) if half.name == "aio" else unit_of(half, lambda: insert(manager, n))()

    async def work():
        await insert(manager, 2)
        session = manager.get()()
        await done(part(3))
        assert manager.get()() is session and commits == []

    whole = transactional(name="default", attempts=2)(unit_of(half, work))
    await done(whole())
    assert await rows(manager) == [1, 2, 3] and len(commits) == 1


@on_both_halves
async def test_nested_transaction_on_another_database_is_a_unit_of_its_own(half, manager):
    async def part():
        await insert(manager, 3, "other")

    async def whole():
        await insert(manager, 2)
        await done(manager.run_in_transaction(unit_of(half, part), name="other"))
        raise KeyError

    with pytest.raises(KeyError):
        await done(manager.run_in_transaction(unit_of(half, whole)))
    assert (await rows(manager), await rows(manager, "other")) == ([1], [1, 3])


@on_both_halves
async def test_part_that_failed_and_was_caught_refuses_the_whole(half, manager):
    async def part():
        await insert(manager, 3)
        raise KeyError

    async def whole():
        await insert(manager, 2)
        with pytest.raises(KeyError):
            await done(manager.run_in_transaction(unit_of(half, part)))

    with pytest.raises(errors.RollbackRequired, match=r"KeyError.*\[DBS-ROLLBACK\]$"):
        await done(manager.run_in_transaction(unit_of(half, whole)))
    assert await rows(manager) == [1]


@on_both_halves
async def test_unsaved_work_on_another_database_is_not_lost_in_silence(half, manager):
    async def work():
        await insert(manager, 2)
        await insert(manager, 3, "other")

    with pytest.raises(errors.UnsavedWork, match="'other'"):
        await done(manager.run_in_transaction(unit_of(half, work)))
    assert (await rows(manager), await rows(manager, "other")) == ([1], [1])


@on_both_halves
async def test_unsaved_work_of_another_manager_is_not_lost_when_its_database_has_the_same_name(half, manager, tmp_path):
    another = half.verbs.SessionManager({"default": f"sqlite:///{tmp_path}/another.db"})

    async def work():
        await done(another.get().execute(text("CREATE TABLE t (a INT)")))
        await done(another.get().execute(text("INSERT INTO t VALUES (1)")))

    with pytest.raises(errors.UnsavedWork, match="session of 'default'"):
        await done(manager.run_in_transaction(unit_of(half, work)))
    await done(another.dispose())


@pytest.mark.parametrize(
    "options",
    [{"attempts": 0}, {"attempts": "3"}, {"attempts": True}, {"backoff_s": -1}, {"backoff_s": float("nan")}],
)
@on_both_halves
async def test_transaction_says_bad_arguments_before_anything_runs(half, manager, options):
    with pytest.raises(errors.ConfigError, match=next(iter(options))):
        await done(manager.run_in_transaction(pytest.fail, **options))
    with pytest.raises(errors.ConfigError, match=next(iter(options))):
        manager.transactional(**options)(lambda: None)


@on_both_halves
async def test_transaction_of_an_unknown_database_is_refused_before_anything_runs(half, manager):
    with pytest.raises(errors.UnknownDatabase):
        await done(manager.run_in_transaction(pytest.fail, name="othr"))


@on_both_halves
async def test_transaction_refuses_what_runs_after_its_call(half, manager):
    def generator():
        yield

    async def async_generator():
        yield

    for function in (generator, async_generator):
        with pytest.raises(TypeError, match="generator"):
            await done(manager.run_in_transaction(function))
        with pytest.raises(TypeError, match="generator"):
            manager.transactional(function)
    with pytest.raises(TypeError, match="keyword"):
        manager.transactional("reports")


# --- what is seen from inside


@on_both_halves
async def test_pool_timeout_says_the_same_of_who_holds_the_connections(half, tmp_path):
    options = {"pool_size": 1, "pool_timeout": 0.01}
    manager = half.verbs.SessionManager({"default": {"url": f"sqlite:///{tmp_path}/a.db", "options": options}})
    async with entered(manager.scope("import")):
        await done(manager.get().execute(text("SELECT 'secret'")))
        async with entered(manager.scope("another")):
            with pytest.raises(errors.PoolTimeout) as raised:
                await done(manager.get().execute(text("SELECT 1")))
    (holder,) = raised.value.holders
    assert (holder.database, holder.scope, holder.statement) == ("default", "import", "SELECT ?")
    assert any(place.startswith(f"{__file__}:") for place in holder.stack) and holder.state == "idle in transaction"
    said = str(raised.value).splitlines()
    assert said[0].endswith("with 1 in use and 0 others waiting. Held, longest first:")
    assert said[1] == f"  {holder}" and "SELECT ?" in said[1] and len(said) == 3
    await done(manager.dispose())
