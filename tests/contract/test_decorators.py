"""What decorators are given: each function becomes a unit of work, or is refused where it stands."""

from __future__ import annotations

import functools
import inspect
import subprocess
import sys

import flask
import pytest

import dbsession.flask
from dbsession import aio
from dbsession.errors import UnknownDatabase
from support.halves import HALVES, done, on_both_halves


@pytest.fixture(params=HALVES)
def half(request):
    return HALVES[request.param]


@pytest.fixture
def manager(half, tmp_path):
    manager = half.verbs.SessionManager({"default": f"sqlite:///{tmp_path}/default.db"})

    async def dispose():
        await done(manager.dispose())

    yield manager
    half.run(dispose)


def functions_of(half, body):
    """The function `body(n)` in each shape that a decorator may be given, by the half's kind of `def`."""
    if half.name == "aio":

        async def function(n):
            return body(n)

        class Called:
            async def __call__(self, n):
                return body(n)

        class Owner:
            async def method(self, n):
                return body(n)
    else:

        def function(n):
            return body(n)

        class Called:
            def __call__(self, n):
                return body(n)

        class Owner:
            def method(self, n):
                return body(n)

    return {
        "function": function,
        "bound method": Owner().method,
        "partial": functools.partial(function),
        "partial of an object": functools.partial(functools.partial(Called())),
        "object": Called(),
    }


SHAPES = ("function", "bound method", "partial", "partial of an object", "object")

# Each with the scope's label of a call of the function `job`.
USES = {
    "session_scope": lambda manager: manager.scope,
    "session_scope()": lambda manager: manager.scope(),
    "session_scope(read_timeout_s)": lambda manager: functools.partial(manager.scope, read_timeout_s=9),
    "transactional": lambda manager: manager.transactional,
    "transactional()": lambda manager: manager.transactional(),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("shape", SHAPES)
@on_both_halves
async def test_f27_decorated_function_runs_in_a_scope_for_each_call(half, manager, use, shape):
    ran = []

    def body(n):
        ran.append((n, half.scopes.current()))
        return n + 1

    function = functions_of(half, body)[shape]
    job = USES[use](manager)(function)
    assert await done(job(1)) == 2 and await done(job(n=2)) == 3
    (one, first), (two, second) = ran
    assert (one, two) == (1, 2) and first is not second and first.ended and first.kind == "block"
    assert inspect.signature(job) == inspect.signature(function) and inspect.unwrap(job) is function
    assert first.label.endswith(("function", "Owner.method", "Called")), first.label
    assert inspect.iscoroutinefunction(job) is (half.name == "aio")


@pytest.mark.parametrize("use", USES)
@on_both_halves
async def test_f27_decorated_methods_stay_what_they_are(half, manager, use):
    decorate = USES[use](manager)
    seen = []

    def note(*what):
        seen.append((what, half.scopes.current()))
        return what

    if half.name == "aio":

        class Service:
            @decorate
            async def plain(self, n):
                return note(self, n)

            @decorate
            @classmethod
            async def outside_of_class(cls, n):
                return note(cls, n)

            @classmethod
            @decorate
            async def inside_of_class(cls, n):
                return note(cls, n)

            @decorate
            @staticmethod
            async def outside_of_static(n):
                return note(n)

            @staticmethod
            @decorate
            async def inside_of_static(n):
                return note(n)
    else:

        class Service:
            @decorate
            def plain(self, n):
                return note(self, n)

            @decorate
            @classmethod
            def outside_of_class(cls, n):
                return note(cls, n)

            @classmethod
            @decorate
            def inside_of_class(cls, n):
                return note(cls, n)

            @decorate
            @staticmethod
            def outside_of_static(n):
                return note(n)

            @staticmethod
            @decorate
            def inside_of_static(n):
                return note(n)

    service = Service()
    assert await done(service.plain(1)) == (service, 1)
    for method in (service.outside_of_class, service.inside_of_class, Service.outside_of_class):
        assert await done(method(2)) == (Service, 2)
    for method in (service.outside_of_static, service.inside_of_static, Service.outside_of_static):
        assert await done(method(3)) == (3,)
    assert len({scope for _, scope in seen}) == len(seen) == 7
    assert seen[0][1].label.endswith("Service.plain")


@pytest.mark.parametrize("use", USES)
@on_both_halves
async def test_f27_what_cannot_be_a_unit_of_work_is_refused_where_it_is_decorated(half, manager, use):
    def generator():
        yield

    async def async_generator():
        yield

    async def coroutine():
        pass

    class Generating:
        def __call__(self):
            yield

    class Waiting:
        async def __call__(self):
            pass

    class Job:
        pass

    refused = [generator, async_generator, Generating(), functools.partial(generator), functools.partial(Generating())]
    refused += [staticmethod(generator), classmethod(async_generator), Job]
    if half.name == "gevent":
        refused += [coroutine, Waiting(), functools.partial(coroutine), functools.partial(Waiting())]
        refused += [staticmethod(coroutine)]
    elif "scope" in use:
        refused += [lambda: None, len, staticmethod(lambda: None)]
    decorate = USES[use](manager)
    for function in refused:
        with pytest.raises(TypeError, match=r"cannot (decorate|be run)"):
            decorate(function)
    for nothing in (property(lambda self: None), 5, b"label", ["label"]):
        with pytest.raises(TypeError, match=r"label|by keyword|cannot decorate"):
            decorate(nothing)


@on_both_halves
async def test_f27_label_is_a_text(half, manager):
    assert manager.scope("")._shown_label == manager.scope(None)._shown_label == "a session_scope()"
    for wrong in (5, b"a job", ("a", "job"), object()):
        with pytest.raises(TypeError, match=r"label of a session_scope\(\) is a .*\[DBS-ARGUMENT\]"):
            manager.scope(wrong)
        with pytest.raises(TypeError, match=r"label of a transaction is a .*\[DBS-ARGUMENT\]"):
            manager.transactional(label=wrong)
        with pytest.raises(TypeError, match=r"label of a transaction is a .*\[DBS-ARGUMENT\]"):
            await done(manager.run_in_transaction(lambda: None, label=wrong))
    with pytest.raises(TypeError, match="nme"):
        manager.transactional(nme="reports")
    with pytest.raises(TypeError, match="by keyword"):
        manager.transactional("reports")
    for wrong in (None, "job", 5):
        with pytest.raises(TypeError, match="give the function to run"):
            await done(manager.run_in_transaction(wrong))


@pytest.mark.filterwarnings("error")
def test_f27_coroutine_that_a_plain_function_returns_is_not_taken_for_work_done(tmp_path):
    manager = dbsession.SessionManager({"default": f"sqlite:///{tmp_path}/default.db"})

    async def work():
        raise AssertionError("never run")

    for job in (manager.scope(lambda: work()), manager.transactional(lambda: work())):
        with pytest.raises(TypeError, match="returned a coroutine"):
            job()
    with pytest.raises(TypeError, match="returned a coroutine"):
        manager.run_in_transaction(lambda: work(), label="a job")

    @manager.transactional
    def outer():
        try:
            manager.run_in_transaction(lambda: work())
        except TypeError:
            pass

    with pytest.raises(dbsession.RollbackRequired):
        outer()
    manager.dispose()


def test_f27_bare_decorator_of_the_module_runs_what_it_decorates(tmp_path):
    @dbsession.session_scope
    def job():
        return "done"

    assert job() == "done" and job.__name__ == "job"

    @aio.session_scope
    async def task():
        return "done"

    assert HALVES["aio"].run(task) == "done"


@pytest.mark.parametrize(
    "use",
    [
        lambda f: dbsession.deadline(f),
        lambda f: dbsession.clear_dbsession(f),
        lambda f: dbsession.dispose(f),
        lambda f: dbsession.release_dbsession(f),
        lambda f: dbsession.get_dbsession(f),
        lambda f: dbsession.get_engine(f),
        lambda f: dbsession.SessionManager().get(f),
        lambda f: aio.SessionManager().get(f),
        lambda f: aio.get_dbsession(f),
        lambda f: dbsession.serve_snapshots(f),
        lambda f: dbsession.flask.init_app(f),
        lambda f: dbsession.flask.init_app(flask.Flask),
        lambda f: dbsession.DBSessionMiddleware("app:application"),
        lambda f: dbsession.DBSessionMiddleware(None),
        lambda f: dbsession.DBSessionMiddleware(aio.DBSessionMiddleware(f)),
        lambda f: aio.DBSessionMiddleware("app:application"),
        lambda f: dbsession.on_engine_created("f"),
        lambda f: aio.on_engine_created(None),
    ],
)
def test_f27_function_where_none_belongs_is_an_error_at_once(use):
    def function():
        raise AssertionError("never run")

    with pytest.raises((TypeError, UnknownDatabase, dbsession.ConfigError)):
        use(function)


def test_f27_listener_of_engines_is_a_plain_function():
    async def coroutine(name, engine):
        pass

    def generator(name, engine):
        yield

    for listener in (coroutine, generator):
        with pytest.raises(TypeError, match="plain function"):
            dbsession.on_engine_created(listener)


TYPED = """
import dbsession
from dbsession import aio

@dbsession.session_scope
def bare(n: int) -> str:
    return str(n)

@dbsession.session_scope("a job", read_timeout_s=5)
def labelled(n: int) -> str:
    return str(n)

@aio.session_scope
async def task(n: int) -> str:
    return str(n)

class Service:
    @dbsession.session_scope
    def method(self, n: int) -> str:
        return str(n)

    @dbsession.session_scope
    @classmethod
    def of_class(cls, n: int) -> str:
        return str(n)

    @dbsession.SessionManager().scope
    @staticmethod
    def static(n: int) -> str:
        return str(n)

with dbsession.session_scope() as scope, dbsession.session_scope("b"):
    reveal_type(scope)
reveal_type(bare)
reveal_type(labelled)
reveal_type(task)
reveal_type(Service().method)
reveal_type(Service.of_class)
reveal_type(Service.static)
"""


@pytest.mark.slow
def test_f27_decorated_function_keeps_its_type(tmp_path):
    (tmp_path / "typed.py").write_text(TYPED)
    arguments = ["--strict", "--no-error-summary", "--cache-dir", str(tmp_path / "cache"), str(tmp_path / "typed.py")]
    answer = subprocess.run([sys.executable, "-m", "mypy", *arguments], capture_output=True, text=True, check=False)
    revealed = [line.partition("is ")[2].strip('"') for line in answer.stdout.splitlines()]
    assert revealed == [
        "dbsession.green.scope.Scope",
        *["def (n: int) -> str"] * 2,
        "def (n: int) -> typing.Coroutine[Any, Any, str]",
        *["def (n: int) -> str"] * 3,
    ], answer.stdout
