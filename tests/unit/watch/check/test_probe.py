"""The check while requests come: it opens a connection of the same pool, in a thread with a hub of its own."""

from __future__ import annotations

import pytest

from support.processes import run_script


@pytest.mark.parametrize(
    ("options", "before"),
    [("{}", ""), ("{}", "engine.connect().close(); engine.dispose()"), ("{'poolclass': QueuePool}", "")],
    ids=["new pool", "pool after a dispose", "stock pool"],
)
def test_f45_requests_are_served_when_their_first_connections_open_during_the_check(options, before, tmp_path):
    """SQLAlchemy sets up the first connections of a pool one at a time. Here the check waits for its turn, other
    requests behind it; its thread is slow, and so the check is third, and nobody comes after it."""
    run_script(
        "patched",
        f"""
        import gevent
        from gevent.event import Event
        from gevent.monkey import get_original
        from sqlalchemy import event, text
        from sqlalchemy.pool import QueuePool
        from dbsession.watch.check import probe

        def native():
            lock = get_original("_thread", "allocate_lock")()
            lock.acquire()
            return lock

        main = gevent.get_hub()
        main.resolver  # two threads that make the first hubs at once may wait for each other in gevent's import
        entry = {{"url": "sqlite:///{tmp_path}/a.db", "options": {options}}}
        dbsession.configure({{"default": entry}})
        engine = dbsession.get_engine()
        {before}
        first_is_in, first_may_go_on, second_is_served = Event(), Event(), Event()
        check_waits, check_may_run, check_is_in, check_may_go_on = native(), native(), native(), native()
        order, facts = [], []

        @event.listens_for(engine, "connect")
        def connected(*_):
            order.append("request" if gevent.get_hub() is main else "check")
            if order[-1] == "check":
                check_is_in.release()
                assert check_may_go_on.acquire(timeout=20)
            elif len(order) == 1:
                first_is_in.set()
                assert first_may_go_on.wait(20)
            else:
                sleep(0)

        def request():
            with engine.connect() as connection:
                if order == ["request", "request"]:
                    check_may_run.release()
                    assert check_is_in.acquire(timeout=20)  # this thread's hub does not run meanwhile
                    second_is_served.set()
                return connection.scalar(text("SELECT 1"))

        def check():
            gevent.spawn(be_slow)
            facts.append(probe.gather("default", engine))

        def be_slow():
            check_waits.release()
            assert check_may_run.acquire(timeout=20)

        requests = [spawn(request)]
        assert first_is_in.wait(20)
        get_original("_thread", "start_new_thread")(check, ())
        assert check_waits.acquire(timeout=20)
        requests += [spawn(request) for _ in range(4)]
        sleep(0)
        first_may_go_on.set()
        assert second_is_served.wait(20)
        for _ in range(5):
            sleep(0)  # who was woken by the second one has a turn
        check_may_go_on.release()
        assert join(requests, 10) == [1] * 5
        wait_until(lambda: facts, 20)
        assert facts[0].error is None and order == ["request", "request", "check", *["request"] * 3], order
        wait_until(lambda: checked_out(engine) == 0, 10)
        dbsession.dispose()
        """,
    )
