"""aio.loop_local: what is made once per event loop, and closed before the loop ends."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import threading
import weakref
from contextlib import asynccontextmanager
from functools import partial

import pytest
import uvloop

from dbsession import errors
from dbsession.aio import loop_local
from dbsession.aio.loop_local import call_keys
from support.processes import run_python

DEADLINE_S = 10.0  # for what must not hang

LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


@pytest.fixture(params=LOOPS)
def new_loop(request):
    return LOOPS[request.param]


@pytest.fixture
def run(new_loop):
    """As asyncio.run does, in each kind of loop; a test that hangs fails."""

    def run(main):
        with asyncio.Runner(loop_factory=new_loop) as runner:
            return runner.run(asyncio.wait_for(main, DEADLINE_S))

    return run


class Resource:
    """An asynchronous context manager that writes down what happens to it."""

    def __init__(self, name="resource", seen=None, on_enter=None, on_exit=None):
        self.name = name
        self.seen = [] if seen is None else seen
        self.on_enter = on_enter
        self.on_exit = on_exit

    async def __aenter__(self):
        if self.on_enter is not None:
            await self.on_enter()
        self.seen.append(f"+{self.name}")
        return self

    async def __aexit__(self, *raised):
        assert raised == (None, None, None)
        self.seen.append(f"-{self.name}")
        if self.on_exit is not None:
            await self.on_exit()


async def fail():
    raise ValueError("broken")


async def hang():
    await asyncio.Event().wait()


# The faults of asyncio-loop-local, by their numbers in the comparison of the peers.


def test_1_failing_exit_lets_the_older_ones_run_and_the_loop_close(new_loop):
    seen = []
    loop = new_loop()
    reported = []
    loop.set_exception_handler(lambda _, context: reported.append(context["exception"]))

    async def main():
        await loop_local.enter(Resource("old", seen))
        await loop_local.enter(Resource("bad", seen, on_exit=fail))
        await loop_local.enter(Resource("new", seen))

    loop.run_until_complete(main())
    loop.close()
    assert loop.is_closed() and seen[3:] == ["-new", "-bad", "-old"]
    (group,) = reported
    (error,) = group.exceptions
    assert isinstance(error, ValueError) and "Resource" in error.__notes__[0]
    loop.close()


def test_1_failing_exits_are_gathered_in_a_group_when_closed_explicitly(run):
    seen = []

    async def main():
        for name in "abc":
            await loop_local.enter(Resource(name, seen, on_exit=fail))
        with pytest.raises(ExceptionGroup, match="3 exits failed") as caught:
            await loop_local.aclose()
        assert [type(each) for each in caught.value.exceptions] == [ValueError] * 3
        await loop_local.aclose()

    run(main())
    assert seen[3:] == ["-c", "-b", "-a"]


@pytest.mark.parametrize("decorator", [loop_local.singleton, loop_local.singleton()])
def test_2_async_singleton_can_be_awaited_again_and_again(run, decorator):
    built = []

    @decorator
    async def make():
        await asyncio.sleep(0)
        built.append(object())
        return built[-1]

    async def main():
        call = make()
        assert await call is await call is await make() is await asyncio.create_task(make())
        assert await asyncio.gather(make(), call) == built * 2
        async with asyncio.TaskGroup() as group:
            task = group.create_task(make())
        assert task.result() is built[0]

        assert len(built) == 1

    run(main())
    built.clear()
    run(main())


def test_3_entries_of_different_ones_do_not_wait_for_each_other(run):
    async def main():
        both = asyncio.Barrier(3)
        await asyncio.gather(*(loop_local.enter_once(Resource(on_enter=both.wait)) for _ in range(3)))

    run(main())


def test_3_entry_may_enter_others(run):
    seen = []
    inner = Resource("inner", seen)

    async def enter_inner():
        await loop_local.enter_once(inner)

    async def main():
        for _ in range(2):
            await loop_local.enter_once(outer)
        await loop_local.enter_once(inner)

    outer = Resource("outer", seen, on_enter=enter_inner)
    run(main())
    assert seen == ["+inner", "+outer", "-outer", "-inner"]


def test_4_singleton_tells_arguments_apart_by_type_and_value(run):
    @loop_local.singleton
    def make(value=0, *rest, other=None, **more):
        return object()

    class Name(str):
        pass

    async def main():
        different = [
            1, True, 1.0, "1", b"1", (1,), (True,), (1.0,), ((1,), 2), ((True,), 2), frozenset({1}), frozenset({True}),
            frozenset({(1,)}), frozenset({(True,)}), "a", Name("a"), None, (), frozenset(),
        ]  # fmt: skip
        values = [make(each) for each in different]
        assert len(set(values)) == len(different)
        assert values == [make(each) for each in different] == [make(value=each) for each in different]
        assert make(1, 1) is not make(1, True) and make(1, 1) is make(1, 1)
        assert make(x=1) is not make(x=True) and make(x=1) is not make(y=1) and make(x=(1,)) is not make(x=(True,))

    run(main())


def test_4_singleton_takes_calls_that_mean_the_same_for_the_same(run):
    @loop_local.singleton
    def make(a=1, b=(), c=[], /, d=None, *, e=None, **more):  # noqa: B006  # a default that cannot be hashed
        return object()

    @loop_local.singleton
    async def make_async(a=1, b=2):
        return object()

    async def main():
        assert make() is make(1) is make(1, ()) is make(d=None, e=None) is not make(True)
        assert make(d=1, e=2) is make(e=2, d=1) is make(1, e=2, d=1)
        assert make(x=1, y=2) is make(y=2, x=1)
        assert await make_async(b=3) is await make_async(1, 3) is await make_async(b=3, a=1)

    run(main())


def test_4_equal_context_managers_are_entered_each(run):
    class Equal(Resource):
        def __eq__(self, other):
            return True

        __hash__ = None

    seen = []

    async def main():
        first, second = Equal("first", seen), Equal("second", seen)
        assert await loop_local.enter_once(first) is first is await loop_local.enter_once(first)
        assert await loop_local.enter_once(second) is second

    run(main())
    assert seen == ["+first", "+second", "-second", "-first"]


@pytest.mark.parametrize("factory", ["sync", "async", "sticky"])
def test_4_argument_that_cannot_be_hashed_is_a_clear_error(run, factory):
    def plain(options, **more):
        return object()

    async def coroutine(options, **more):
        return object()

    make = {
        "sync": lambda: loop_local.singleton(plain),
        "async": lambda: loop_local.singleton(coroutine),
        "sticky": lambda: loop_local.sticky_singleton_acm(plain),
    }[factory]()

    async def main():
        for arguments in ({"options": ["secret"]}, {"options": (1, {"secret"})}, {"options": 1, "x": {"secret": 1}}):
            with pytest.raises(TypeError, match=r"'(options|x)' .*cannot be hashed.*\[DBS-ARGUMENT\]") as caught:
                make(**arguments)
            assert "secret" not in str(caught.value)
        with pytest.raises(TypeError, match="missing a required argument: 'options'"):
            make(x=1)

    run(main())


def test_5_evict_forgets_one_and_runs_its_exit(run):
    seen = []

    @loop_local.singleton
    def plain(name):
        return object()

    @loop_local.singleton
    async def coroutine(name="a"):
        return object()

    @loop_local.sticky_singleton_acm
    def sticky(name):
        return Resource(name, seen)

    async def main():
        values = [(plain("a"), plain("b"), await coroutine("a"), await coroutine("b"))]
        assert await loop_local.evict(plain, name="a") and await loop_local.evict(coroutine)
        values.append((plain("a"), plain("b"), await coroutine("a"), await coroutine("b")))
        assert [old is new for old, new in zip(*values, strict=True)] == [False, True, False, True]
        assert not await loop_local.evict(plain, "c") and not await loop_local.evict(coroutine, "c")

        first = await sticky("a")
        assert await loop_local.evict(sticky, "a") and seen == ["+a", "-a"]
        assert not await loop_local.evict(sticky, "a")
        assert await sticky("a") is not first
        acm, once, kept = Resource("acm", seen), Resource("once", seen), Resource("kept", seen)
        await loop_local.enter(acm)
        await loop_local.enter(acm)
        await loop_local.enter_once(once)
        await loop_local.sticky_acm(kept)
        del seen[:]
        for what in acm, once, loop_local.sticky_acm(kept), sticky("a"):
            assert await loop_local.evict(what) and not await loop_local.evict(what)
        assert seen == ["-acm", "-acm", "-once", "-kept", "-a"]
        with pytest.raises(TypeError, match=r"Resource.*\[DBS-ARGUMENT\]"):
            await loop_local.evict(acm, "a")

    run(main())
    assert len(seen) == 5, "nothing is left for the end"


def test_5_exit_that_takes_too_long_is_cancelled_and_named(run):
    seen = []

    async def main():
        await loop_local.enter(Resource("old", seen))
        await loop_local.enter(Resource("hanging", seen, on_exit=hang))
        with pytest.raises(ExceptionGroup) as caught:
            await loop_local.aclose(timeout=0.01)
        (error,) = caught.value.exceptions
        assert isinstance(error, TimeoutError) and "Resource did not end within 0.01 s" in str(error)
        assert str(error).endswith("[DBS-EXIT-UNFINISHED]")

    run(main())
    assert seen[2:] == ["-hanging", "-old"]


def test_5_exit_that_ignores_its_cancellation_does_not_hold_up_the_others(run, monkeypatch):
    monkeypatch.setattr("dbsession.aio.loop_local.state._CANCEL_GRACE_S", 0.01)
    seen = []
    stop = None

    async def ignore():
        while not stop.is_set():
            try:
                await stop.wait()
            except asyncio.CancelledError:
                seen.append("ignored")
        raise ValueError("late")

    async def main():
        nonlocal stop
        stop = asyncio.Event()
        await loop_local.enter(Resource("old", seen))
        loop_local.at_close(ignore)
        asyncio.get_running_loop().set_exception_handler(lambda _, context: seen.append(context))
        before = asyncio.all_tasks()
        with pytest.raises(ExceptionGroup, match="1 exits failed"):
            await loop_local.aclose(timeout=0.01)
        assert seen == ["+old", "ignored", "-old"]
        stop.set()
        await asyncio.wait(asyncio.all_tasks() - before)

    run(main())
    gc.collect()
    assert seen == ["+old", "ignored", "-old"], "it was reported when it overran its time"


def test_6_loop_that_is_collected_unclosed_warns_and_runs_nothing(caplog):
    """Only asyncio's own: uvloop keeps an unclosed loop that has run for ever."""
    seen = []

    async def main():
        await loop_local.enter(Resource("lost", seen))
        await loop_local.enter(async_resource())

    @asynccontextmanager
    async def async_resource():
        yield

    loop = asyncio.new_event_loop()
    loop.run_until_complete(main())
    gone = weakref.ref(loop)
    with pytest.warns(ResourceWarning, match="unclosed event loop"):
        del loop
        gc.collect()
    gc.collect()
    assert gone() is None and seen == ["+lost"]
    (record,) = [each for each in caplog.records if each.name == "dbsession.aio.loop_local"]
    assert record.levelname == "WARNING" and "Resource" in record.getMessage()


def test_7_exits_run_one_by_one_in_the_context_of_their_registration(run):
    variable = contextvars.ContextVar("variable")
    seen = []

    async def tell():
        seen.append(variable.get())

    async def register(value):
        variable.set(value)
        loop_local.at_close(tell)

    async def main():
        for value in "ab":
            await asyncio.create_task(register(value))
        variable.set("other")

    run(main())
    assert seen == ["b", "a"]


def test_8_exit_finds_the_executor_working(run):
    seen = []

    async def in_executor():
        seen.append(await asyncio.get_running_loop().run_in_executor(None, threading.get_ident))

    async def main():
        await asyncio.get_running_loop().run_in_executor(None, threading.get_ident)
        loop_local.at_close(in_executor)

    run(main())
    assert len(seen) == 1 and seen[0] != threading.get_ident()


def test_8_exits_run_newest_first_before_any_asynchronous_generator_is_closed(run):
    """shutdown_asyncgens() would close those inside of @asynccontextmanager's objects all at once."""
    seen = []

    @loop_local.sticky_singleton_acm
    @asynccontextmanager
    async def resource(name):
        try:
            yield name
        except BaseException as error:
            seen.append(repr(error))
            raise
        seen.append(name)
        await asyncio.sleep(0)

    async def main():
        for name in "abcdefgh":
            assert await resource(name) == name

    run(main())
    assert seen == list("hgfedcba")


def test_9_exit_registered_while_closing_runs_too(run):
    seen = []

    async def enter_another():
        await loop_local.enter(Resource("late", seen))

    async def main():
        await loop_local.enter(Resource("old", seen))
        await loop_local.enter(Resource("new", seen, on_exit=enter_another))

    run(main())
    assert seen[2:] == ["-new", "+late", "-late", "-old"]


def test_9_exit_never_gets_what_is_closed_already(run):
    seen = []

    async def use_newer():
        assert await newer() not in closed

    newer = loop_local.sticky_singleton_acm(lambda: Resource("newer", seen))
    closed = []

    async def main():
        await loop_local.enter(Resource("older", seen, on_exit=use_newer))
        closed.append(await newer())

    run(main())
    assert seen[2:] == ["-newer", "-older", "+newer", "-newer"]


def test_9_aclose_ends_when_a_task_goes_on_using_what_is_closed(run):
    seen = []

    @loop_local.sticky_singleton_acm
    def used():
        return Resource("used", seen, on_exit=partial(asyncio.sleep, 0.001))

    async def use():
        while True:
            await used()
            await asyncio.sleep(0)

    async def main():
        await loop_local.enter(Resource("older", seen))
        await used()
        user = asyncio.create_task(use())
        with pytest.raises(ExceptionGroup) as raised:
            await loop_local.aclose()
        (unfinished,) = raised.value.exceptions
        assert isinstance(unfinished, errors.ExitUnfinished)
        assert "used. End these tasks before." in str(unfinished)
        assert seen[-1] == "-older"
        user.cancel()
        await asyncio.wait([user])
        await loop_local.aclose()
        assert seen.count("+used") == seen.count("-used")

    run(main())


def test_9_loop_closed_inside_another_warns_and_closes(new_loop, caplog):
    seen = []

    async def main():
        await loop_local.enter(Resource("lost", seen))

    async def outer():
        loop.close()

    loop = new_loop()
    loop.run_until_complete(main())
    asyncio.run(outer())
    assert loop.is_closed() and seen == ["+lost"]
    (record,) = [each for each in caplog.records if each.name == "dbsession.aio.loop_local"]
    assert "could not run: Resource" in record.getMessage()


def test_9_loop_collected_while_another_runs_breaks_nothing(caplog):
    async def main():
        await loop_local.enter(Resource("lost", seen))

    async def outer():
        nonlocal loop
        del loop
        gc.collect()

    seen = []
    loop = asyncio.new_event_loop()
    loop.run_until_complete(main())
    gone = weakref.ref(loop)
    with pytest.warns(ResourceWarning, match="unclosed event loop"):
        asyncio.run(outer())
    gc.collect()
    assert gone() is None and seen == ["+lost"]


@pytest.mark.parametrize("exits", [True, False])
@pytest.mark.parametrize("collector", [True, False])
def test_10_value_that_refers_to_the_loop_does_not_keep_it_alive(new_loop, collector, exits):
    @loop_local.singleton
    def owner():
        return [asyncio.get_running_loop()]

    async def main():
        loop = asyncio.get_running_loop()
        loop_local.storage()["loop"] = loop
        owner()
        if exits:
            loop_local.at_close(partial(asyncio.sleep, 0, loop))

    gone = []
    if not collector:
        gc.disable()
    try:
        for _ in range(3):
            loop = new_loop()
            gone.append(weakref.ref(loop))
            loop.run_until_complete(main())
            loop.close()
            del loop
        if collector:
            gc.collect()
        assert [each() for each in gone] == [None] * 3
    finally:
        gc.enable()


def test_11_interrupt_in_an_exit_closes_the_rest_and_goes_on(new_loop):
    seen = []

    async def interrupt():
        raise KeyboardInterrupt

    async def main():
        await loop_local.enter(Resource("old", seen))
        await loop_local.enter(Resource("new", seen, on_exit=interrupt))

    loop = new_loop()
    loop.set_exception_handler(lambda _, context: seen.append(type(context["exception"])))
    loop.run_until_complete(main())
    with pytest.raises(KeyboardInterrupt):
        loop.close()
    assert loop.is_closed() and seen[2:] == ["-new", "-old", BaseExceptionGroup]


def test_11_interrupt_in_the_last_exit_leaves_no_task_behind(new_loop, caplog):
    async def interrupt():
        raise KeyboardInterrupt

    async def main():
        loop_local.at_close(interrupt)

    with pytest.raises(KeyboardInterrupt), asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(main())
    gc.collect()
    assert ["exits failed" in each.getMessage() for each in caplog.records] == [True]


def test_11_exit_that_stops_the_loop_does_not_keep_the_others_from_running(new_loop):
    seen = []

    async def stop():
        asyncio.get_running_loop().stop()

    async def main():
        await loop_local.enter(Resource("old", seen))
        await loop_local.enter(Resource("new", seen, on_exit=stop))

    loop = new_loop()
    loop.run_until_complete(main())
    loop.close()
    assert loop.is_closed() and seen[2:] == ["-new", "-old"]


# What is made once.


async def settle():
    """Lets every task go on as far as it can."""
    for _ in range(10):
        await asyncio.sleep(0)


class Gate:
    """A factory that waits to be let through, and counts."""

    def __init__(self):
        self.calls = 0
        self.open = asyncio.Event()
        self.error = None

    async def make(self):
        self.calls += 1
        await self.open.wait()
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        return object()


@pytest.fixture(params=["singleton", "sticky"])
def decorate(request):
    """Makes a factory of a value one that is called once per loop, in each way there is."""

    def sticky(factory):
        @asynccontextmanager
        async def entered(*args):
            yield await factory(*args)

        return loop_local.sticky_singleton_acm(entered)

    return {"singleton": loop_local.singleton, "sticky": sticky}[request.param]


def test_concurrent_first_calls_build_once_when_waiters_are_cancelled(run, decorate):
    async def main():
        gate = Gate()
        make = decorate(gate.make)
        tasks = [asyncio.ensure_future(wait(make())) for _ in range(4)]
        await settle()
        tasks[1].cancel()
        await settle()
        assert tasks[1].cancelled()
        gate.open.set()
        first, second, third = await asyncio.gather(tasks[0], *tasks[2:])
        assert first is second is third is await make() and gate.calls == 1

    run(main())


async def wait(awaitable):
    return await awaitable


def test_next_waiter_builds_when_the_builder_is_cancelled(run, decorate):
    async def main():
        gate = Gate()
        make = decorate(gate.make)
        tasks = [asyncio.ensure_future(wait(make())) for _ in range(3)]
        await settle()
        tasks[0].cancel()
        await settle()
        assert tasks[0].cancelled() and gate.calls == 2
        gate.open.set()
        assert await tasks[1] is await tasks[2] and gate.calls == 2

    run(main())


def test_failed_build_is_not_kept(run, decorate):
    async def main():
        gate = Gate()
        gate.error = ValueError("first")
        gate.open.set()
        make = decorate(gate.make)
        results = await asyncio.gather(make(), make(), return_exceptions=True)
        assert str(results[0]) == "first" and results[0].__context__ is None
        assert results[1] is await make() and gate.calls == 2

    run(main())


@pytest.mark.parametrize("args", [(), (1,)])
def test_failed_sync_build_is_not_kept(run, args):
    calls = []

    @loop_local.singleton
    def make(*args):
        calls.append(1)
        if len(calls) == 1:
            raise ValueError("first")
        return calls

    async def main():
        with pytest.raises(ValueError, match="first") as caught:
            make(*args)
        assert caught.value.__context__ is None and make(*args) is make(*args) is calls and len(calls) == 2

    run(main())


def test_factory_that_asks_for_itself_gets_a_clear_error(run, decorate):
    @loop_local.singleton
    def sync(n):
        return sync(n)

    async def itself(n):
        return await make(n)

    make = decorate(itself)

    async def main():
        with pytest.raises(errors.RecursiveUse, match=r"\[DBS-RECURSION\]"):
            sync(1)
        with pytest.raises(errors.RecursiveUse, match=r"\[DBS-RECURSION\]"):
            await make(1)

    run(main())


def test_factory_may_ask_for_another_call_of_itself(run, decorate):
    async def less(n):
        return 0 if n == 0 else 1 + await make(n - 1)

    make = decorate(less)

    async def main():
        assert await make(5) == 5

    run(main())


def test_factories_of_two_tasks_that_ask_for_each_other_get_a_clear_error(run, decorate):
    async def main():
        both = asyncio.Barrier(2)
        asked = set()

        async def ask(own):
            if own not in asked:
                asked.add(own)
                await both.wait()
            return await make(not own)

        make = decorate(ask)
        results = await asyncio.wait_for(
            asyncio.gather(make(False), make(True), return_exceptions=True), DEADLINE_S / 2
        )
        assert all(isinstance(each, errors.RecursiveUse) for each in results), results

    run(main())


def test_evict_waits_for_the_build_and_the_next_build_for_the_exit(run):
    async def main():
        seen = []
        enter, leave = asyncio.Event(), asyncio.Event()
        make = loop_local.sticky_singleton_acm(lambda: Resource("x", seen, on_enter=enter.wait, on_exit=leave.wait))
        first = asyncio.ensure_future(wait(make()))
        await settle()
        evicting = asyncio.ensure_future(loop_local.evict(make))
        second = asyncio.ensure_future(wait(make()))
        enter.set()
        await settle()
        assert seen == ["+x", "-x"] and not second.done()
        leave.set()
        assert await evicting and await second is not await first and seen == ["+x", "-x", "+x"]

    run(main())


def test_evict_raises_what_the_exit_raised_and_has_forgotten_it(run):
    async def main():
        acm = Resource(on_exit=fail)
        await loop_local.enter_once(acm)
        with pytest.raises(ExceptionGroup, match="1 exits failed") as caught:
            await loop_local.evict(acm)
        assert isinstance(caught.value.exceptions[0], ValueError)
        assert not await loop_local.evict(acm)

    run(main())


def test_exit_that_asks_for_what_it_ends_gets_a_clear_error_when_evicted(run):
    async def again():
        await make()

    make = loop_local.sticky_singleton_acm(lambda: Resource(on_exit=again))

    async def main():
        await make()
        with pytest.raises(ExceptionGroup) as caught:
            await loop_local.evict(make)
        assert isinstance(caught.value.exceptions[0], errors.RecursiveUse)

    run(main())


def test_nothing_is_left_of_the_turns(run, decorate):
    async def main():
        gate = Gate()
        make = decorate(gate.make)
        gate.open.set()
        await asyncio.gather(*(make() for _ in range(5)))
        await loop_local.evict(make)
        state = asyncio.get_running_loop()._dbsession_loop_local
        assert not state.turns and not state.waiting and not state.values and not state.exits

    run(main())


# What is remembered of calls with one plain argument.


class Text(str):
    pass


class Number(int):
    pass


@pytest.fixture(params=["plain", "singleton", "sticky"])
def once(request):
    """A function that gives the loop's value for its arguments, whose `factory` can be evicted and has `built`."""
    built = []

    def make(name="a", *rest, **more):
        built.append(name)
        return Resource(name)

    async def make_async(name="a", *rest, **more):
        return make(name)

    async def ask(*args, **kwargs):
        if request.param == "sticky":
            async with ask.factory(*args, **kwargs) as value:
                assert value is await ask.factory(*args, **kwargs)
                return value
        value = ask.factory(*args, **kwargs)
        return await value if request.param == "singleton" else value

    ask.built = built
    ask.factory = {
        "plain": lambda: loop_local.singleton(make),
        "singleton": lambda: loop_local.singleton(make_async),
        "sticky": lambda: loop_local.sticky_singleton_acm(make),
    }[request.param]()
    return ask


def test_remembered_calls_are_told_apart_by_type(run, once):
    different = [1, True, 1.0, "1", b"1", None, Text("1"), Number(1), (1,), (True,), 2]

    async def main():
        values = [await once(each) for each in different]
        assert len(set(values)) == len(once.built) == len(different)
        for _ in range(2):
            assert values == [await once(each) for each in different]
            assert values == [await once(each) for each in reversed(different)][::-1]

    run(main())


def test_remembered_call_is_the_same_in_all_spellings(run, once):
    async def main():
        for _ in range(2):
            assert await once() is await once("a") is await once(name="a")
            assert await once("b") is await once(name="b") is not await once("b", "b")
            assert await once("b") is not await once("b", name_="b")
        assert once.built == ["a", "b", "b", "b"]

    run(main())


def test_remembered_call_builds_anew_when_evicted_or_closed(run, once):
    async def main():
        for spelling in ((), {"name": "b"}), (("b",), {}):
            first, other = await once("b"), await once("c")
            assert await loop_local.evict(once.factory, *spelling[0], **spelling[1])
            assert not await loop_local.evict(once.factory, "b")
            assert await once("b") is await once(name="b") is not first and await once("c") is other
            await loop_local.aclose()
            assert not await loop_local.evict(once.factory, "b")
            assert await once("c") is not other

    run(main())
    assert once.built == ["b", "c", "b", "c", "b", "b", "c"]


def test_remembered_call_gets_its_own_argument_when_an_equal_one_was_evicted(run, once):
    async def main():
        assert str((await once(0.0)).name) == "0.0"
        await loop_local.evict(once.factory, 0.0)
        assert str((await once(-0.0)).name) == "-0.0"

    run(main())


def test_remembered_call_has_a_value_in_each_loop(run, once):
    async def both():
        first = await once("a")
        second = await asyncio.to_thread(run, once("a"))
        assert first is await once("a") is not second
        return first, second

    assert len({*run(both()), *run(both())}) == 4 and once.built == ["a"] * 4


def test_number_of_remembered_calls_is_bounded(run, once):
    short = {}
    for each in range(5000):
        call_keys.remember(short, each, each)
        assert short[int][each] == each and len(short[int]) <= 1024

    async def main():
        values = [await once(each) for each in range(1100)]
        assert values == [await once(each) for each in range(1100)]

    run(main())
    for cell in once.factory.__closure__:
        if isinstance(cell.cell_contents, dict):
            assert all(len(same_type) <= 1024 for same_type in cell.cell_contents.values())


def test_singleton_of_a_method_is_one_per_object(run):
    class Client:
        @loop_local.singleton
        def plain(self):
            return object()

        @loop_local.singleton
        async def coroutine(self):
            return object()

    async def main():
        one, two = Client(), Client()
        assert one.plain() is one.plain() is not two.plain()
        assert await one.coroutine() is await one.coroutine() is not await two.coroutine()

    run(main())


def test_evict_takes_a_bound_method(run):
    class Client:
        def __init__(self):
            self.seen = []

        @loop_local.sticky_singleton_acm
        def resource(self, name):
            return Resource(name, self.seen)

        @classmethod
        @loop_local.singleton
        def of_class(cls):
            return object()

    async def main():
        one, two = Client(), Client()
        await one.resource("a")
        await two.resource("a")
        assert await loop_local.evict(one.resource, "a")
        assert (one.seen, two.seen) == (["+a", "-a"], ["+a"])
        first = Client.of_class()
        assert await loop_local.evict(Client.of_class)
        assert Client.of_class() is not first

    run(main())


def test_sticky_of_what_gives_no_context_manager_is_refused_at_once():
    async def coroutine():
        return Resource()

    async def generator():
        yield Resource()

    for factory in (coroutine, generator):
        with pytest.raises(TypeError, match="put it above @asynccontextmanager"):
            loop_local.sticky_singleton_acm(factory)


def test_singleton_recognises_every_kind_of_async_factory(run):
    class Factory:
        async def __call__(self, n):
            return object()

    async def plain(n):
        return object()

    async def main():
        for factory in Factory(), partial(plain, 1), partial(plain, n=1):
            make = loop_local.singleton(factory)
            args = (1,) if isinstance(factory, Factory) else ()
            assert await make(*args) is await make(*args)
        assert loop_local.singleton(dict)(a=1) == {"a": 1}, "a class that tells no signature"

    run(main())


def test_singleton_can_be_a_task_in_debug_mode(new_loop):
    @loop_local.singleton
    async def make():
        await asyncio.sleep(0)
        return object()

    async def main():
        task = asyncio.create_task(make())
        assert "pending" in repr(task)
        cancelled = asyncio.create_task(loop_local.singleton(hang)())
        await settle()
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        assert await task is await make()

    with asyncio.Runner(loop_factory=new_loop, debug=True) as runner:
        runner.run(main())


def test_singleton_that_is_never_awaited_warns_of_nothing(run):
    @loop_local.singleton
    async def make():
        raise AssertionError

    async def main():
        make()
        make().close()

    run(main())
    gc.collect()


def test_sticky_is_entered_once_and_left_at_the_end(run):
    seen = []

    @loop_local.sticky_singleton_acm
    def make(name="a", *, size=1):
        return Resource(name, seen)

    acm = Resource("acm", seen)
    kept = loop_local.sticky_acm(acm)

    async def main():
        async with make() as one, make("a", size=1) as two, make("b") as other:
            assert one is two is await make(size=1) and other is await make("b")
        async with kept as value:
            assert value is acm is await kept is await loop_local.enter_once(acm)
        with pytest.raises(ValueError):
            async with kept:
                raise ValueError
        assert seen == ["+a", "+b", "+acm"]

    for _ in range(2):
        run(main())
        assert seen[3:] == ["-acm", "-b", "-a"]
        seen.clear()


def test_failed_entry_is_not_remembered(run):
    seen = []

    async def fail_once():
        if not seen:
            seen.append("failed")
            raise ValueError

    async def main():
        acm = Resource("x", seen, on_enter=fail_once)
        with pytest.raises(ValueError):
            await loop_local.enter_once(acm)
        await loop_local.enter_once(acm)

    run(main())
    assert seen == ["failed", "+x", "-x"]


# Storage, and the closing of everything.


def test_storage_is_the_loops_own_and_empty_after_closing(run):
    @loop_local.singleton
    def make():
        return object()

    async def main():
        storage = loop_local.storage()
        assert storage == {} and storage is loop_local.storage()
        storage["x"] = make()
        await loop_local.aclose()
        assert storage == {} and storage is loop_local.storage()
        storage["x"] = make()
        await loop_local.enter(Resource("again", seen))
        return storage

    seen = []
    first, second = run(main()), run(main())
    assert first is not second and first == second == {}
    assert seen == ["+again", "-again"] * 2


def test_at_close_can_be_taken_back(run):
    seen = []

    async def main():
        for name in "abc":
            take_back = loop_local.at_close(Resource(name, seen).__aenter__)
            if name == "b":
                take_back()
                take_back()
        await loop_local.aclose()
        take_back()

    run(main())
    assert seen == ["+c", "+a"]


def test_second_aclose_waits_for_the_first(run):
    async def main():
        leave = asyncio.Event()
        seen = []
        await loop_local.enter(Resource("x", seen, on_exit=leave.wait))
        first = asyncio.create_task(loop_local.aclose())
        second = asyncio.create_task(loop_local.aclose())
        await settle()
        assert seen == ["+x", "-x"] and not first.done() and not second.done()
        leave.set()
        await asyncio.gather(first, second)

    run(main())


def test_cancelled_aclose_runs_the_rest_and_is_cancelled_then(run):
    async def main():
        seen, reported = [], []
        leave = asyncio.Event()
        asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context["exception"]))
        await loop_local.enter(Resource("old", seen, on_exit=fail))
        await loop_local.enter(Resource("new", seen, on_exit=leave.wait))
        closing = asyncio.create_task(loop_local.aclose())
        await settle()
        for _ in range(3):
            closing.cancel()
            await settle()
        assert not closing.done()
        leave.set()
        with pytest.raises(asyncio.CancelledError):
            await closing
        assert seen[2:] == ["-new", "-old"]
        (group,) = reported
        assert [type(each) for each in group.exceptions] == [ValueError]

    run(main())


def test_cancellation_of_aclose_goes_on_when_it_comes_after_an_exits_time(run):
    async def main():
        late, end = asyncio.Event(), asyncio.Event()

        async def stubborn():
            try:
                await end.wait()
            except asyncio.CancelledError:
                late.set()
                await end.wait()

        asyncio.get_running_loop().set_exception_handler(lambda *_: None)  # hears of the ExitUnfinished
        loop_local.at_close(stubborn)
        closing = asyncio.create_task(loop_local.aclose(timeout=0.01))
        await late.wait()
        closing.cancel()
        await asyncio.sleep(0)
        end.set()
        await asyncio.wait([closing])
        assert closing.cancelled()

    run(main())


def test_evict_runs_no_exit_that_aclose_runs_meanwhile(run):
    seen = []
    resource = Resource("twice", seen, on_exit=partial(asyncio.sleep, 0))

    async def main():
        await loop_local.enter(resource)
        await loop_local.enter(resource)
        assert await asyncio.gather(loop_local.evict(resource), loop_local.aclose()) == [True, None]

    run(main())
    assert seen == ["+twice", "+twice", "-twice", "-twice"]


def test_exit_that_is_cancelled_from_outside_is_told_of(run):
    async def cancel_me():
        asyncio.current_task().cancel()
        await asyncio.sleep(0)

    async def main():
        await loop_local.enter(Resource("pool of secret", on_exit=cancel_me))
        with pytest.raises(ExceptionGroup) as caught:
            await loop_local.aclose()
        text = str(caught.value.exceptions[0])
        assert "exit of Resource was cancelled" in text and "secret" not in text

    run(main())


def test_exit_that_closes_everything_gets_a_clear_error(run):
    async def main():
        await loop_local.enter(Resource(on_exit=loop_local.aclose))
        with pytest.raises(ExceptionGroup) as caught:
            await loop_local.aclose()
        assert isinstance(caught.value.exceptions[0], errors.RecursiveUse)

    run(main())


def test_exits_run_when_the_loops_task_factory_fails(new_loop):
    seen = []

    def factory(loop, coroutine, **options):
        coroutine.close()
        raise ValueError

    async def main():
        await loop_local.enter(Resource("explicit", seen))
        asyncio.get_running_loop().set_task_factory(factory)
        await loop_local.aclose()
        await loop_local.enter(Resource("last net", seen))

    loop = new_loop()
    loop.run_until_complete(main())
    loop.close()
    assert loop.is_closed() and seen == ["+explicit", "-explicit", "+last net", "-last net"]


def test_failure_at_the_end_of_the_loop_goes_to_its_exception_handler(run):
    async def main():
        asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context["exception"]))
        await loop_local.enter(Resource(on_exit=fail))

    reported = []
    run(main())
    (group,) = reported
    assert isinstance(group, ExceptionGroup) and isinstance(group.exceptions[0], ValueError)


def test_close_closes_the_resources_of_a_loop_from_outside(new_loop):
    seen = []

    async def main(on_exit=None):
        await loop_local.enter(Resource("x", seen, on_exit=on_exit))

    async def inside(other):
        with pytest.raises(errors.LoopRequired, match=r"while another one runs.*\[DBS-LOOP\]"):
            loop_local.close(other)
        with pytest.raises(errors.LoopRequired, match=r"it is running.*\[DBS-LOOP\]"):
            loop_local.close(asyncio.get_running_loop())

    loop = new_loop()
    loop_local.close(loop)
    loop.run_until_complete(main())
    loop_local.close(loop)
    assert seen == ["+x", "-x"] and not loop.is_closed()
    loop.run_until_complete(main(hang))
    with pytest.raises(ExceptionGroup):
        loop_local.close(loop, timeout=0.01)
    other = new_loop()
    loop.run_until_complete(inside(other))
    other.close()
    loop.close()
    with pytest.raises(errors.LoopRequired, match=r"closed already.*\[DBS-LOOP\]"):
        loop_local.close(loop)
    assert seen == ["+x", "-x"] * 2


def test_every_verb_says_so_when_no_loop_runs():
    async def coroutine():
        return object()

    acm = Resource()
    for use in (
        loop_local.storage,
        lambda: loop_local.at_close(hang),
        loop_local.singleton(object),
        lambda: loop_local.singleton(coroutine)().send(None),
        lambda: loop_local.enter(acm).send(None),
        lambda: loop_local.enter_once(acm).send(None),
        lambda: next(loop_local.sticky_acm(acm).__await__()),
        lambda: next(loop_local.sticky_singleton_acm(Resource)().__aenter__().__await__()),
        lambda: loop_local.evict(acm).send(None),
        lambda: loop_local.aclose().send(None),
    ):
        with pytest.raises(errors.LoopRequired, match=r"No event loop runs in this thread.*\[DBS-LOOP\]"):
            use()


def test_worker_thread_has_no_loop(run):
    async def main():
        loop_local.storage()["x"] = 1
        with pytest.raises(errors.LoopRequired):
            await asyncio.to_thread(loop_local.storage)

    run(main())


def test_loops_of_two_threads_have_their_own(new_loop):
    seen = []
    both = threading.Barrier(2)

    @loop_local.singleton
    def make():
        return threading.get_ident()

    async def main():
        both.wait(DEADLINE_S)  # the number of a thread that has ended would be used again
        assert make() == threading.get_ident()
        await loop_local.enter(Resource(make(), seen))
        both.wait(DEADLINE_S)

    def in_thread():
        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(main())

    threads = [threading.Thread(target=in_thread) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert len(seen) == 4 and len({each[1:] for each in seen}) == 2


def test_loop_is_closed_from_another_thread(new_loop):
    seen = []

    async def main():
        await loop_local.enter(Resource("x", seen))

    loop = new_loop()
    loop.run_until_complete(main())
    thread = threading.Thread(target=loop.close)
    thread.start()
    thread.join(DEADLINE_S)
    assert loop.is_closed() and seen == ["+x", "-x"]
    loop.close()


def test_close_of_a_running_loop_is_refused_and_nothing_lost(run):
    seen = []

    async def main():
        await loop_local.enter(Resource("x", seen))
        with pytest.raises(RuntimeError, match="running"):
            asyncio.get_running_loop().close()

    run(main())
    assert seen == ["+x", "-x"]


def test_closed_loop_has_its_own_methods_again(new_loop):
    async def main():
        loop_local.storage()

    loop = new_loop()
    loop.run_until_complete(main())
    assert {"close", "shutdown_asyncgens"} <= set(vars(loop))
    loop.close()
    assert not {"close", "shutdown_asyncgens"} & set(vars(loop))


def test_replacement_of_close_by_somebody_else_stays(new_loop):
    seen = []

    async def main():
        await loop_local.enter(Resource("x", seen))
        inner = loop.close

        def close():
            seen.append("theirs")
            inner()

        loop.close = close

    loop = new_loop()
    loop.run_until_complete(main())
    loop.close()
    loop.close()
    assert loop.is_closed() and seen == ["+x", "theirs", "-x", "theirs"]


@pytest.mark.parametrize("refused", [("close",), ("close", "shutdown_asyncgens", "_dbsession_loop_local")])
def test_loop_that_refuses_attributes_warns_and_is_closed_by_aclose(caplog, refused):
    class Loop(asyncio.SelectorEventLoop):
        def __setattr__(self, name, value):
            if name in refused:
                raise AttributeError(name)
            super().__setattr__(name, value)

    seen = []

    @loop_local.sticky_singleton_acm
    def make():
        return Resource("x", seen)

    async def main():
        assert await make() is await make()
        assert loop_local.storage() is loop_local.storage()
        if len(refused) > 1:
            await loop_local.aclose()

    with asyncio.Runner(loop_factory=Loop) as runner:
        runner.run(main())
    assert seen == ["+x", "-x"]
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "cannot be replaced" in record.getMessage()


def test_forked_child_does_not_run_the_exits_of_its_parent():
    run_python(
        """
        import asyncio, os
        from dbsession.aio import loop_local

        seen = []

        async def leave(name):
            seen.append(name)

        async def main(name):
            loop_local.at_close(lambda: leave(name))

        class Resource:
            async def __aenter__(self):
                pass

            async def __aexit__(self, *raised):
                seen.append("resource")

        acm = Resource()
        loop = asyncio.new_event_loop()
        loop.run_until_complete(main("parent"))
        loop.run_until_complete(loop_local.enter_once(acm))
        child = os.fork()
        if not child:
            try:
                assert loop.run_until_complete(loop_local.evict(acm))
                loop.run_until_complete(main("child"))
                loop_local.close(loop)
                assert seen == ["child"], seen
                asyncio.run(main("new loop"))
                assert seen == ["child", "new loop"], seen
            except BaseException:
                os._exit(1)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        child = os.fork()
        if not child:
            loop.run_until_complete = seen.append
            loop.close()  # runs nothing on a loop that is the parent's
            os._exit(0 if seen == [] and loop.is_closed() else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        loop.close()
        assert seen == ["resource", "parent"], seen
        """
    )


def test_uvicorn_closes_the_resources_in_its_loop_when_it_stops():
    run_python(
        """
        import asyncio, uvicorn
        from dbsession.aio import loop_local

        seen = []

        async def leave():
            await asyncio.to_thread(seen.append, "left")

        async def app(scope, receive, send):
            assert scope["type"] == "lifespan"
            assert (await receive())["type"] == "lifespan.startup"
            loop_local.at_close(leave)
            server.should_exit = True
            await send({"type": "lifespan.startup.complete"})
            assert (await receive())["type"] == "lifespan.shutdown"
            await send({"type": "lifespan.shutdown.complete"})

        for loop in "asyncio", "uvloop":
            server = uvicorn.Server(uvicorn.Config(app, port=0, loop=loop, log_level="warning", lifespan="on"))
            server.run()
        assert seen == ["left"] * 2, seen
        """
    )


def test_import_loads_no_gevent():
    run_python(
        """
        import sys
        import dbsession.aio.loop_local
        assert "gevent" not in sys.modules
        """
    )
