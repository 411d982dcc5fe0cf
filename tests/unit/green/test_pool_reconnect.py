"""What SQLAlchemy's own tests claim of a pooled connection that is replaced, claimed of FairPool (test_pool_queue.py
says what is claimed where)."""

from __future__ import annotations

import gc

import pytest
from sqlalchemy import create_engine, event, text
from sqlalchemy.exc import DisconnectionError

from dbsession.green.pool import FairPool
from support.drivers import Driver


class Kill(BaseException):
    """As gevent's timeouts and kills: no Exception."""


@pytest.fixture
def driver():
    return Driver()


@pytest.fixture
def clock(monkeypatch):
    """The time that the pool sees; each look at it is a second later, so that nothing happens at the same time."""
    now = [10_000.0]

    def time():
        now[0] += 1
        return now[0]

    monkeypatch.setattr("sqlalchemy.pool.base.time.time", time)
    return now


def make(driver, size=1, overflow=0, **more):
    return FairPool(driver.connect, pool_size=size, max_overflow=overflow, timeout=more.pop("timeout", 5.0), **more)


def status(pool):
    return pool.size(), pool.checkedin(), pool.overflow(), pool.checkedout()


def test_info_lives_as_long_as_the_connection_and_record_info_as_long_as_the_place(driver):
    pool = make(driver)
    with pool.connect() as connection:
        assert not connection.info and "b" not in connection.record_info
        connection.info["a"] = connection.record_info["b"] = 1
    connection = pool.connect()
    assert "a" in connection.info and "b" in connection.record_info
    connection.invalidate()
    connection = pool.connect()
    assert "a" not in connection.info
    connection.info["c"] = 1
    connection.detach()
    assert "c" in connection.info and connection.record_info is None
    assert not pool.connect().info


@pytest.mark.parametrize("how", ["age", "soft", "pool"])
def test_connection_is_replaced_in_its_place_once_it_is_too_old_or_invalidated(driver, clock, how):
    pool = make(driver, recycle=30 if how == "age" else -1)
    pool.connect().close()
    connection = pool.connect()
    assert connection.dbapi_connection is driver.opened[0] and len(driver.opened) == 1
    if how == "soft":
        connection.invalidate(soft=True)
        assert not driver.opened[0].closed
    elif how == "pool":
        pool._invalidate(connection, _checkin=False)
    connection.close()
    clock[0] += 60
    connection = pool.connect()
    assert [one.closed for one in driver.opened] == [1, 0] and status(pool) == (1, 0, 0, 1)
    connection.close()


@pytest.mark.parametrize("how", ["invalidated", "too old", "refused", "killed"])
def test_failure_to_reopen_a_pooled_connection_costs_no_place(driver, clock, how):
    pool = make(driver, 1, 2, recycle=30 if how == "too old" else -1)
    connection = pool.connect()
    if how == "invalidated":
        connection.invalidate()
    connection.close()
    clock[0] += 60

    def checkout(*_):
        if driver.down:
            raise DisconnectionError if how == "refused" else Kill

    if how in ("refused", "killed"):
        event.listen(pool, "checkout", checkout)
    driver.down = True
    with pytest.raises(Kill if how == "killed" else OSError):
        pool.connect()
    assert pool.checkedout() == 0
    driver.down = False
    held = [pool.connect() for _ in range(3)]
    assert status(pool) == (1, 0, 2, 3) and driver.open() == 3
    for connection in held:
        connection.close()
    assert status(pool) == (1, 1, 0, 0)


def test_pooled_connection_that_a_listener_finds_broken_is_replaced_and_the_new_one_dropped_comes_back(driver):
    pool = make(driver)

    @event.listens_for(pool, "checkout")
    def checkout(connection, record, fairy):
        if connection is driver.opened[0] and connection.rolled_back:
            raise DisconnectionError

    pool.connect().close()
    connection = pool.connect()
    assert [one.closed for one in driver.opened] == [1, 0]
    del connection
    gc.collect()
    assert driver.opened[1].rolled_back == 1 and status(pool) == (1, 1, 0, 0)


def test_pre_ping_that_fails_replaces_every_idle_connection_in_its_place(tmp_path, clock):
    engine = create_engine(f"sqlite:///{tmp_path}/a.db", poolclass=FairPool, pool_size=2, pool_pre_ping=True)
    pinged = []

    def ping(connection):
        pinged.append(connection)
        return len(pinged) > 1

    engine.dialect.do_ping = ping
    held = [engine.connect(), engine.connect()]
    old = [connection.connection.dbapi_connection for connection in held]
    for connection in held:
        connection.close()
    held = [engine.connect(), engine.connect()]
    new = [connection.connection.dbapi_connection for connection in held]
    assert pinged == [old[0]] and not set(old) & set(new) and status(engine.pool) == (2, 0, 0, 2)
    for connection in held:
        assert connection.scalar(text("SELECT 1")) == 1
        connection.close()
    engine.dispose()


def test_detached_connection_leaves_its_place_to_others_and_is_closed_for_good(driver):
    pool = make(driver)
    detached = pool.connect()
    detached.detach()
    assert pool.checkedout() == 0
    pool.connect().close()
    assert [one.closed for one in driver.opened] == [0, 0]
    detached.close()
    assert [one.closed for one in driver.opened] == [1, 0] and status(pool) == (1, 1, 0, 0)


def test_invalidated_connection_is_closed_at_once_and_its_place_opened_anew(driver):
    pool = make(driver)
    connection = pool.connect()
    connection.invalidate()
    assert connection.dbapi_connection is None and driver.opened[0].closed == 1
    pool.connect().close()
    assert len(driver.opened) == 2 and driver.open() == 1


def test_second_checkin_of_a_record_is_a_warning_and_no_second_place(driver):
    pool = make(driver)
    connection = pool.connect()
    record = connection._connection_record
    connection.close()
    with pytest.warns(Warning, match="Double checkin attempted"):
        record.checkin()
    assert status(pool) == (1, 1, 0, 0)
