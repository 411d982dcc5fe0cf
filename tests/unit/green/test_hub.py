"""Waiting, sleeping and putting aside, with a hub and without one, within a thread and across threads."""

from __future__ import annotations

import threading

import gevent
import pytest

from dbsession.green import hub
from support.processes import run_python
from support.waiting import wait_until


def in_thread(function):
    """A started native thread; the tests' own process is not patched."""
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


def with_hub(function):
    def run():
        gevent.spawn(function).join()
        gevent.get_hub().destroy()

    return run


@pytest.mark.parametrize("waits_in", [with_hub, lambda f: f], ids=["greenlet waits", "thread waits"])
@pytest.mark.parametrize("wakes_in", [with_hub, lambda f: f], ids=["greenlet wakes", "thread wakes"])
@pytest.mark.parametrize("first", ["wake", "wait"])
def test_waiter_is_woken_across_threads_whichever_comes_first(waits_in, wakes_in, first):
    made, woken, woke = [], threading.Event(), threading.Event()

    def wait():
        waiter = hub.Waiter()
        made.append(waiter)
        if first == "wake":
            woke.wait(10)  # stops this thread's hub as well: the wake comes before anybody waits
        waiter.wait()
        woken.set()

    def wake():
        made[0].wake()
        made[0].wake()
        woke.set()

    waiting = in_thread(waits_in(wait))
    wait_until(lambda: made, 5)
    waking = in_thread(wakes_in(wake))
    assert woken.wait(5)
    waiting.join(5)
    waking.join(5)
    made[0].wake()  # late, after the wait is over


def test_mutex_lets_one_in_at_a_time_whatever_hub_or_thread_it_waits_in():
    mutex, inside, done, most = hub.Mutex(), [], [], []

    def use():
        for _ in range(20):
            with mutex:
                inside.append(None)
                most.append(len(inside))
                hub.sleep(0)
                inside.pop()
            hub.sleep(0)
        done.append(None)

    def greenlets():
        gevent.joinall([gevent.spawn(use) for _ in range(3)])
        gevent.get_hub().destroy()

    threads = [in_thread(function) for function in (greenlets, greenlets, use, use)]
    for thread in threads:
        thread.join(30)
    assert (len(done), max(most), len(most)) == (8, 1, 160)


def test_mutex_is_free_again_when_its_owner_fails_and_a_waiter_is_killed():
    mutex, order = hub.Mutex(), []

    def use(name):
        with mutex:
            order.append(name)
            gevent.sleep(0)
            raise gevent.GreenletExit

    first, killed, last = (gevent.spawn(use, name) for name in ("first", "killed", "last"))
    gevent.sleep(0)
    assert order == ["first"]
    killed.kill()
    gevent.joinall([first, last], 5)
    assert order == ["first", "last"] and mutex._waiting == []


def test_waiter_that_is_killed_may_still_be_woken():
    made = []

    def wait():
        made.append(hub.Waiter())
        made[0].wait()

    job = gevent.spawn(wait)
    gevent.sleep(0)
    job.kill()
    made[0].wake()
    gevent.sleep(0)


def test_waiter_whose_hub_is_gone_stops_no_other_waiter():
    import threading

    made = []

    def in_thread():
        gevent.sleep(0)
        made.append(hub.Waiter())
        gevent.get_hub().destroy(destroy_loop=True)

    thread = threading.Thread(target=in_thread)
    thread.start()
    thread.join()
    made[0].wake()


def test_run_aside_runs_in_a_greenlet_of_this_hub_or_of_the_owner():
    seen = []
    gevent.sleep(0)
    hub.run_aside(lambda: seen.append((threading.get_ident(), hub.here())))
    assert not seen
    gevent.sleep(0)
    owner = hub.here()
    assert seen == [(threading.get_ident(), owner)]
    in_thread(lambda: hub.run_aside(lambda: seen.append((threading.get_ident(), hub.here())), owner)).join()
    with gevent.Timeout(5):
        while len(seen) < 2:
            gevent.sleep(0.001)
    assert seen[1] == seen[0]


def test_run_aside_runs_in_a_thread_when_no_hub_is_alive():
    seen, done = [], threading.Event()

    def work():
        seen.append(threading.get_ident())
        done.set()

    hubs = []
    in_thread(lambda: (gevent.sleep(0), hubs.append(gevent.get_hub()))).join()
    wait_until(lambda: hubs[0].dead)  # greenlet knows it when the system's thread is gone, a moment after join()
    starter = in_thread(lambda: hub.run_aside(work, hubs[0]))
    assert done.wait(5)
    starter.join()
    assert seen[0] not in (threading.get_ident(), starter.ident)


@pytest.fixture
def loop_timers(monkeypatch):
    """The timers that are made from here on for this hub's loop, to be started again and again."""
    made, loop = [], gevent.get_hub().loop

    class Loop:
        def timer(self, after, *repeat, **more):
            timer = loop.timer(after, *repeat, **more)
            made.extend([timer] if repeat else [])
            return timer

        def __getattr__(self, name):
            return getattr(loop, name)

    monkeypatch.setattr(gevent.get_hub(), "loop", Loop())
    monkeypatch.setattr(gevent.get_hub(), "_dbsession_timer", None, raising=False)
    return made


def test_call_within_ends_what_takes_longer_and_leaves_no_timer_running(loop_timers, monkeypatch):
    monkeypatch.setattr(hub.monkey, "is_module_patched", lambda name: True)
    done = []
    with pytest.raises(hub.BoundExceeded):
        hub.call_within(0.01, gevent.get_hub().switch)  # for ever
    with pytest.raises(ZeroDivisionError):
        hub.call_within(60, lambda: 1 / 0)
    hub.call_within(60, lambda: done.append(loop_timers[-1].active))
    assert done == [True] and len(loop_timers) == 2 and not any(timer.active for timer in loop_timers)


def test_call_within_throws_once_and_its_kept_timer_has_its_whole_time_again(loop_timers, monkeypatch):
    monkeypatch.setattr(hub.monkey, "is_module_patched", lambda name: True)
    seen = []

    def goes_on():
        try:
            gevent.get_hub().switch()
        except hub.BoundExceeded:
            seen.append("first")
            gevent.sleep(0.2)  # four times the bound, in which it must not be thrown again

    hub.call_within(0.05, goes_on)
    hub.call_within(0.05, lambda: seen.append("second"))
    with pytest.raises(hub.BoundExceeded):
        hub.call_within(0.05, gevent.get_hub().switch)
    assert seen == ["first", "second"] and len(loop_timers) == 1


def test_call_within_bounds_each_of_two_at_once(loop_timers, monkeypatch):
    monkeypatch.setattr(hub.monkey, "is_module_patched", lambda name: True)
    two = [gevent.spawn(hub.call_within, 0.01, gevent.get_hub().switch) for _ in range(2)]
    gevent.joinall(two, timeout=10)
    assert [type(each.exception) for each in two] == [hub.BoundExceeded] * 2
    assert len(loop_timers) == 2 and not any(timer.active for timer in loop_timers)


def test_call_within_has_no_bound_where_no_timer_would_run(loop_timers, monkeypatch):
    done = []
    hub.call_within(0, lambda: done.append("sockets that block"))  # nothing is patched here
    monkeypatch.setattr(hub.monkey, "is_module_patched", lambda name: True)
    in_thread(lambda: hub.call_within(0, lambda: done.append("a thread without a hub"))).join()
    assert done == ["sockets that block", "a thread without a hub"] and not loop_timers


def test_sleep_lets_other_greenlets_run_where_there_is_a_hub():
    ran = []
    gevent.spawn(ran.append, 1)
    hub.sleep(0)
    assert ran == [1]
    slept = in_thread(lambda: hub.sleep(0.001))
    slept.join(5)
    assert not slept.is_alive()


def test_interpreter_that_ends_with_open_sessions_says_nothing(tmp_path):
    """In the main greenlet, a greenlet that never ran to its end, a raw one and a thread that is still there."""
    for mode in ("patched", "plain"):
        result = run_python(
            """
            import sys
            if sys.argv[2] == "patched":
                from gevent import monkey; monkey.patch_all()
            import threading
            import gevent, greenlet, dbsession
            from sqlalchemy import text
            dbsession.configure({"default": f"sqlite:///{sys.argv[1]}/a.db"})
            session = dbsession.get_dbsession()
            def use(then=lambda: None):
                session.execute(text("SELECT 1"))
                then()
            use()
            raw = greenlet.greenlet(use)
            raw.switch()
            suspended = greenlet.greenlet(lambda: use(greenlet.getcurrent().parent.switch))
            suspended.switch()
            job = gevent.spawn(use, lambda: gevent.sleep(60))
            gevent.sleep(0.01)
            started, never = threading.Event(), threading.Event()
            threading.Thread(target=lambda: use(lambda: (started.set(), never.wait())), daemon=True).start()
            started.wait()
            def body():
                with dbsession.session_scope():
                    use()
                    yield
            kept = body()
            next(kept)
            """,
            tmp_path,
            mode,
        )
        assert result.stderr == "", result.stderr
