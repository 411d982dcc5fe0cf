"""What SQLAlchemy's own tests claim of its pool events and of the reset on return, claimed of FairPool
(test_pool_queue.py says what is claimed where)."""

from __future__ import annotations

import gc
import threading
from unittest.mock import Mock

import pytest
from sqlalchemy import event
from sqlalchemy.pool import Pool, QueuePool

from dbsession.green.pool import FairPool
from support.waiting import wait_until


class Kill(BaseException):
    """As gevent's timeouts and kills: no Exception."""


def of_another_driver():
    """A connection that has nothing of our own classes."""
    return Mock(spec=["rollback", "commit", "close", "special"])


def make(size=2, overflow=0, creator=of_another_driver, **more):
    return FairPool(creator, pool_size=size, max_overflow=overflow, timeout=5.0, **more)


def listen(pool, *names):
    """What happens, in its order: a list of (event, its first argument)."""
    happened = []
    for name in names:
        event.listen(pool, name, lambda *given, name=name: happened.append((name, given[0])))
    return happened


def names(happened):
    return [name for name, _ in happened]


def test_opening_events_come_once_a_connection_and_first_connect_once_a_pool():
    pool = make()
    happened = listen(pool, "first_connect", "connect", "checkout")
    held = [pool.connect(), pool.connect()]
    assert names(happened) == ["first_connect", "connect", "checkout", "connect", "checkout"]
    for connection in held:
        connection.close()
    del happened[:]
    pool.connect().close()
    assert names(happened) == ["checkout"]


@pytest.mark.parametrize("when", ["before", "after"])
def test_recreated_pool_has_the_same_listeners(when):
    pool = make()
    happened = listen(pool, "first_connect", "connect", "checkout", "checkin")
    if when == "before":
        other = pool.recreate()
    pool.connect().close()
    if when == "after":
        other = pool.recreate()
    other.connect().close()
    assert names(happened) == ["first_connect", "connect", "checkout", "checkin"] * 2


def test_inserted_listener_comes_first():
    pool, order = make(), []
    event.listen(pool, "connect", lambda *_: order.append(1))
    event.listen(pool, "connect", lambda *_: order.append(2), insert=True)
    event.listen(pool, "connect", lambda *_: order.append(3))
    pool.connect()
    assert order == [2, 1, 3]


def test_listeners_of_its_base_classes_are_its_own_and_its_listeners_not_theirs():
    heard = []
    listeners = {kind: lambda *_, kind=kind: heard.append(kind) for kind in (Pool, QueuePool, FairPool)}
    for kind, listener in listeners.items():
        event.listen(kind, "connect", listener)
    try:
        make().connect()
        assert heard == [Pool, QueuePool, FairPool]
        del heard[:]
        QueuePool(Mock).connect()
        assert heard == [Pool, QueuePool]
    finally:
        for kind, listener in listeners.items():
            event.remove(kind, "connect", listener)


def test_reset_comes_before_checkin_and_close_only_when_it_is_closed():
    pool = make()
    happened = listen(pool, "reset", "checkin", "close")
    connection = pool.connect()
    driver = connection.dbapi_connection
    connection.close()
    assert happened == [("reset", driver), ("checkin", driver)]
    pool.dispose()
    assert happened[2:] == [("close", driver)] and driver.close.call_count == 1


def test_surplus_connection_is_checked_in_and_then_closed():
    pool = make(1, 1)
    happened = listen(pool, "checkin", "close")
    first, second = pool.connect(), pool.connect()
    first.close()
    second.close()
    assert names(happened) == ["checkin", "checkin", "close"]


def test_detached_connection_is_not_checked_in():
    pool = make()
    happened = listen(pool, "detach", "close_detached", "checkin", "close")
    connection = pool.connect()
    driver = connection.dbapi_connection
    connection.detach()
    assert happened == [("detach", driver)] and pool.checkedout() == 0
    connection.close()
    assert happened[1:] == [("close_detached", driver)]


@pytest.mark.parametrize("error", [None, ValueError("no")])
@pytest.mark.parametrize("soft", [False, True])
def test_invalidation_tells_the_connection_and_the_reason(soft, error):
    pool, told = make(), []
    event.listen(pool, "soft_invalidate" if soft else "invalidate", lambda *given: told.append((given[0], given[2])))
    pool.connect().close()
    connection = pool.connect()
    driver = connection.dbapi_connection
    connection.invalidate(error, soft=soft)
    assert told == [(driver, error)] and driver.close.called is not soft
    connection.close()
    assert pool.checkedout() == 0


@pytest.mark.parametrize("invalidated", [False, True])
def test_dropped_connection_is_reset_and_checked_in_by_the_collector(invalidated):
    pool = make()
    happened = listen(pool, "reset", "checkin")
    connection = pool.connect()
    if invalidated:
        connection._connection_record.invalidate()
    del connection
    gc.collect()
    assert names(happened) == (["checkin"] if invalidated else ["reset", "checkin"])
    assert pool.checkedout() == 0 and pool.checkedin() == (not invalidated)


@pytest.mark.parametrize("error", [ValueError, Kill])
def test_connect_listener_that_fails_costs_neither_place_nor_connection(error):
    pool, failing, drivers = make(1, creator=lambda: drivers.append(Mock()) or drivers[-1]), [], []

    @event.listens_for(pool, "connect")
    def connect(connection, record):
        if failing:
            raise error
        record.info["set up"] = True

    connection = pool.connect()
    connection.invalidate()
    failing.append(True)
    with pytest.raises(error):
        pool.connect()
    del failing[:]
    assert pool.checkedout() == 0 and [driver.close.call_count for driver in drivers] == [1, 1]
    assert pool.connect().info["set up"]


@pytest.mark.parametrize("name", ["reset", "checkout"])  # (one of `checkin` does, in every pool of SQLAlchemy's)
def test_listener_that_is_killed_costs_no_place(name):
    pool, kills = make(1), [True]

    @event.listens_for(pool, name)
    def listener(*_):
        if kills:
            kills.pop()
            raise Kill

    with pytest.raises(Kill):
        pool.connect().close()
    gc.collect()
    assert pool.checkedout() == 0
    pool.connect().close()


def test_nobody_gets_a_connection_before_the_first_one_is_set_up():
    """In threads, which all open a connection at once: the first one's set-up waits until all are there."""
    opened, order = [], []
    pool = make(3, creator=lambda: opened.append(Mock()) or opened[-1])

    @event.listens_for(pool, "first_connect")
    def first_connect(*_):
        wait_until(lambda: len(opened) == 3, 20)
        order.append("first_connect")

    event.listen(pool, "connect", lambda *_: order.append("connect"))
    held = []
    threads = [threading.Thread(target=lambda: held.append(pool.connect())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(40)
    assert order == ["first_connect", "connect", "connect", "connect"] and pool.checkedout() == len(held) == 3


@pytest.mark.parametrize(
    "reset, expected",
    [("rollback", ["rollback"]), (True, ["rollback"]), ("commit", ["commit"]), (None, []), (False, [])],
)
def test_connection_is_reset_as_reset_on_return_says(reset, expected):
    pool = make(reset_on_return=reset).recreate()
    connection = pool.connect()
    driver = connection.dbapi_connection
    connection.close()
    assert [name for name, *_ in driver.method_calls] == expected


@pytest.mark.parametrize(
    "end, expected",
    [("return", ["special"]), ("detach", ["special", "close"]), ("invalidate", ["close"])],
)
def test_reset_listener_replaces_the_reset_and_is_told_how_it_ends(end, expected):
    pool, states = make(reset_on_return=None), []

    @event.listens_for(pool, "reset")
    def reset(connection, _, state):
        connection.special()
        states.append((state.transaction_was_reset, state.terminate_only, state.asyncio_safe))

    connection = pool.connect()
    driver = connection.dbapi_connection
    if end != "return":
        getattr(connection, end)()
    connection.close()
    assert [name for name, *_ in driver.method_calls] == expected
    assert states == ([] if end == "invalidate" else [(False, end == "detach", True)])


def test_connection_is_not_lost_when_its_checkout_cannot_be_noted(monkeypatch):
    pool = make(size=1)
    with monkeypatch.context() as patch:
        patch.setattr(pool.held, "taken", lambda _: (_ for _ in ()).throw(RecursionError("the stack's end")))
        with pytest.raises(RecursionError):
            pool.connect()
    assert pool.checkedout() == 0
    pool.connect().close()
