"""The pool, in moments that nobody sees: a connection comes back while somebody holds the pool's lock, is taken without
it, or has to be closed by whoever passes by."""

from __future__ import annotations

import threading
from collections import deque

import gevent
import pytest
from sqlalchemy import exc

from dbsession.green.pool import OWNER_HUB
from support.pools import Connection, counts, make


class Slow(Connection):
    def close(self):
        super().close()
        gevent.sleep(0.01)


@pytest.fixture(autouse=True)
def none_open():
    Connection.opened = 0


def take(pool, order, name):
    connection = pool.connect()
    order.append(name)
    connection.close()


def time_out(pool):
    with pytest.raises(exc.TimeoutError):
        pool.connect()
    return True


def test_connection_that_comes_back_while_a_waiter_leaves_the_line_goes_to_the_next_one():
    """Returned under the lock, by a collection or by another thread: whoever holds the lock looks again."""
    pool, order = make(timeout=0.02), []

    class Line(type(pool._waiting)):
        def leave(self, *which):
            if held:
                held.pop().close()
            super().pop(*which, None)

        __delitem__ = leave

        def pop(self, *which):
            self.leave(which[0])

    held = [pool.connect()]
    pool._waiting = Line()
    first = gevent.spawn(time_out, pool)
    gevent.sleep(0)
    pool._timeout = 5.0
    second = gevent.spawn(take, pool, order, 2)
    first.join(timeout=5)
    second.join(timeout=20)
    assert first.value and order == [2] and counts(pool) == (0, 1, 0)


@pytest.mark.parametrize("free", [0, 1], ids=["waits", "opens"])
def test_kill_while_a_newcomer_closes_what_came_back_under_the_lock_costs_no_place(free):
    """The newcomer held the lock when a surplus connection came back; closing that one switches greenlets."""
    pool = make(1, 1 + free, creator=Slow, timeout=5.0)
    held = [pool.connect(), pool.connect()]
    pool.dispose()  # so that each is one too many when it comes back
    with pool._lock:
        held.pop().close()  # put down
    newcomer = gevent.spawn(pool.connect)
    gevent.sleep(0)
    newcomer.kill()
    held.pop().close()
    assert counts(pool) == (0, 0, 0) and pool._open == 0 and Connection.opened == 0


def test_place_is_given_back_when_the_look_at_what_was_returned_fails(monkeypatch):
    """Before it waits or opens, a newcomer ends the scopes of dead greenlets and looks at what came back."""
    pool, order = make(), []
    held = pool.connect()

    def fail():
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("dbsession.green.scope.end_dead", fail)
    with pytest.raises(RuntimeError):
        pool.connect()
    assert counts(pool) == (1, 0, 0)
    monkeypatch.undo()
    held.close()
    take(pool, order, 1)
    assert order == [1] and counts(pool) == (0, 1, 0)


def test_newcomer_waits_when_another_thread_was_quicker_to_take_the_idle_connection():
    """The other thread comes between the newcomer's look at what is idle and the step that takes it."""
    taken = []

    class Idle(deque):
        def popleft(self):
            if not taken:
                taken.append(super().popleft())
            return super().popleft()

    pool, order = make(), []
    pool.connect().close()
    pool._shared = Idle(pool._shared)
    pool._idle = {None: pool._shared}
    newcomer = gevent.spawn(take, pool, order, "newcomer")
    gevent.sleep(0)
    assert taken and counts(pool) == (1, 0, 1) and not order
    pool._do_return_conn(taken[0])
    newcomer.get(timeout=5)
    assert order == ["newcomer"] and counts(pool) == (0, 1, 0)


def test_connection_that_comes_back_between_the_look_and_the_lock_is_used():
    """By another thread, or by a collection: nobody waited yet, so it became idle."""
    pool = make()
    held = [pool.connect()]
    lock = pool._lock

    class Lock:
        acquire, release = lock.acquire, lock.release

        def __enter__(self):
            if held:
                held.pop().close()
            lock.acquire()

        def __exit__(self, *_):
            lock.release()

    pool._lock = Lock()
    connection = pool.connect()
    assert not held and counts(pool) == (1, 0, 0) and Connection.opened == 1
    connection.close()


def test_dispose_takes_from_the_idle_ones_what_nobody_else_took():
    pool = make(3)
    held = [pool.connect() for _ in range(3)]
    for connection in held:
        connection.close()
    mine = pool.connect()
    pool.dispose()
    assert counts(pool) == (1, 0, 0) and Connection.opened == 1 and mine.is_valid
    mine.close()
    assert counts(pool) == (0, 0, 0) and Connection.opened == 0


def test_idle_connections_of_hubs_that_have_none_left_are_forgotten():
    pool = make(3)

    def use():
        gevent.get_hub()
        connection = pool.connect()
        connection.info[OWNER_HUB] = home = gevent.get_hub()
        connection.close()
        again = pool.connect()
        again.invalidate()
        again.close()
        home.destroy()

    for _ in range(5):
        thread = threading.Thread(target=use)
        thread.start()
        thread.join(10)
    assert counts(pool) == (0, 0, 0)
    pool.connect().close()
    assert counts(pool) == (0, 1, 0) and len(pool._idle) <= 2


@pytest.mark.parametrize("looks", range(1, 6))
@pytest.mark.parametrize("size, expected", [(1, (1, 0, 1)), (2, (2, 0, 0))])
def test_newcomer_decides_by_one_look_at_what_is_idle_while_others_take_it(size, expected, looks):
    """A connection comes back behind its first look, and is taken by another thread at some later look."""
    truths = [False] + [True] * looks

    class Idle(deque):
        def __bool__(self):
            return truths.pop(0) if truths else len(self) > 0

    pool = make(size)
    held = pool.connect()
    pool._shared = Idle()
    pool._idle = {None: pool._shared}
    newcomer = gevent.spawn(pool.connect)
    gevent.sleep(0)
    assert counts(pool) == expected and pool._open == size
    held.close()
    newcomer.get(timeout=5).close()
    assert counts(pool) == (0, size, 0) and pool._open == size
