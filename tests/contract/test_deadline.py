"""deadline(), and the timer of a request with a deadline: whom it hits, and when no more."""

from __future__ import annotations

import gc
import threading

import gevent
import pytest
from gevent.event import Event

from dbsession import ConfigError, DBSessionMiddleware, DeadlineExceeded, deadline
from support.deadlines import (
    LONG,
    NO_SECONDS,
    SOON,
    Server,
    environ_of,
    in_use,
    manager_of,
    nothing_else_fires,
    plain,
    query,
    run_plain_thread,
    run_thread,
    wait,
)


@pytest.fixture(autouse=True)
def hub():
    return gevent.get_hub()


@pytest.fixture
def manager(tmp_path):
    manager = manager_of(tmp_path)
    yield manager
    manager.dispose()


@pytest.fixture
def warnings_of(caplog):
    return lambda: [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def test_deadline_ends_the_block_that_waits_too_long():
    with pytest.raises(DeadlineExceeded) as caught, deadline(SOON):
        wait()
    assert isinstance(caught.value, gevent.Timeout) and not isinstance(caught.value, Exception)
    assert str(caught.value) == ("This was not over within its deadline of 0.05 s and was ended here. [DBS-DEADLINE]")


def test_deadline_is_cancelled_when_its_block_ends_however():
    with deadline(SOON):
        pass
    with pytest.raises(KeyError), deadline(SOON):
        raise KeyError
    nothing_else_fires()


def test_deadlines_nest_and_the_one_that_is_over_says_its_own_seconds():
    with pytest.raises(DeadlineExceeded) as caught, deadline(SOON), deadline(LONG):
        wait()
    assert caught.value.seconds == SOON
    with deadline(LONG):
        with pytest.raises(DeadlineExceeded) as caught, deadline(SOON):
            wait()
        assert caught.value.seconds == SOON


def test_deadline_hits_only_the_greenlet_that_runs_the_block():
    def late():
        with deadline(SOON):
            wait()

    task = gevent.spawn(late)
    with deadline(LONG):
        task.join()
    assert isinstance(task.exception, DeadlineExceeded)


@pytest.mark.parametrize("value", [*NO_SECONDS, None], ids=repr)
def test_deadline_refuses_what_is_no_number_of_seconds_above_0(value):
    with pytest.raises(ConfigError, match=r"^The deadline is .*: give a number .* above 0, .*\. \[DBS-CONFIG\]$"):
        deadline(value)


def test_deadline_is_for_one_block():
    used = deadline(SOON)
    with used:
        pass
    with pytest.raises(RuntimeError, match="call deadline"), used:
        raise AssertionError("unreachable")
    nothing_else_fires()


def test_deadline_left_in_another_thread_is_cancelled_all_the_same():
    def block():
        with deadline(SOON):
            yield

    generator = block()
    next(generator)
    assert run_plain_thread(generator.close) is None
    nothing_else_fires()


def test_deadline_off_gevent_is_refused():
    error = run_plain_thread(lambda: deadline(1))
    assert isinstance(error, ConfigError) and "gevent" in str(error)


def test_deadline_in_a_native_thread_with_a_hub_hits_that_thread():
    def late():
        gevent.get_hub()
        try:
            with deadline(SOON):
                wait()
        except DeadlineExceeded as exceeded:
            return exceeded.seconds

    assert run_thread(late) == SOON


def test_deadline_ends_the_wait_for_a_connection_of_the_pool(manager):
    with manager.scope(), manager.scope():
        taken = [manager.engine().connect() for _ in range(2)]
        with pytest.raises(DeadlineExceeded), deadline(SOON):
            query(manager)
        for connection in taken:
            connection.close()
        assert query(manager) == b"1"
    assert in_use(manager) == 0


# The timer of a request


def test_body_read_on_in_another_greenlet_is_ended_there(manager):
    def lines():
        yield query(manager)
        wait()

    server = Server(plain(lines))
    next(server.body)
    reader = gevent.spawn(lambda: next(server.body))
    with deadline(LONG):  # this greenlet is not hit
        reader.join()
    assert isinstance(reader.exception, ConnectionResetError) and in_use(manager) == 0
    server.body.close()


def test_body_read_on_in_another_thread_is_ended_there():
    def lines():
        yield b"x"
        wait()

    server = Server(plain(lines))
    next(server.body)

    def read_on():
        gevent.get_hub()
        try:
            next(server.body)
        except ConnectionResetError:
            return "cut"

    assert run_thread(read_on) == "cut"
    server.body.close()


def test_body_read_on_in_a_thread_without_a_hub_is_ended_at_its_next_chunk():
    server = Server(plain(lambda: iter([b"x"] * 9)))
    read_one = threading.Event()
    run_plain_thread(lambda: (next(server.body), read_one.set()))
    assert read_one.is_set()
    nothing_else_fires()
    with pytest.raises(ConnectionResetError):
        next(server.body)
    server.body.close()


def test_timer_does_not_keep_the_greenlet_that_died_with_its_request_open():
    servers = []

    def serve():
        servers.append(Server(plain(lambda: iter([b"x"] * 9))))
        next(servers[0].body)

    gevent.spawn(serve).join()
    nothing_else_fires()
    with pytest.raises(ConnectionResetError):
        next(servers[0].body)
    servers[0].body.close()


def end_by_close(server):
    server.body.close()


def end_by_reading(server):
    server.read()


def end_by_the_next_request(server):
    Server(plain(list), LONG)


def end_by_the_backstop(server):
    from dbsession.gunicorn_hooks import post_request

    post_request(None, None, server.environ, None)


def end_in_a_thread(server):
    assert run_plain_thread(server.body.close) is None


def end_by_dropping(server):
    del server.body


@pytest.mark.parametrize(
    "end",
    [end_by_close, end_by_reading, end_by_the_next_request, end_by_the_backstop, end_in_a_thread, end_by_dropping],
)
def test_timer_fires_no_more_once_the_request_has_ended(manager, end):
    def app(environ, start_response):
        start_response("200 OK", [])
        return (query(manager) for _ in range(3))

    gc.disable()
    try:
        server = Server(app)
        next(server.body)
        end(server)
        nothing_else_fires()
    finally:
        gc.enable()
    assert in_use(manager) == 0


@pytest.mark.parametrize("body", [lambda: [b"x"], lambda: (b"x",), lambda: 1 / 0], ids=["list", "tuple", "error"])
def test_timer_fires_no_more_once_the_answer_is_complete(body):
    try:
        server = Server(plain(body))
    except ZeroDivisionError:
        pass
    else:
        assert server.read() == b"x" and server.status == "200 OK"
    nothing_else_fires()


def test_teardown_is_never_hit(manager):
    """Neither the end of the scope nor, for a complete body in an object of its own, its emptying."""
    engine = manager.engine()
    rollback = engine.dialect.do_rollback

    def slow_rollback(connection):
        nothing_else_fires()
        rollback(connection)

    def app(environ, start_response):
        start_response("200 OK", [])
        query(manager)
        environ["dbsession.body_complete"] = environ["PATH_INFO"] == "/complete"
        return iter([b"x"])

    with manager.scope():
        query(manager)  # the first connection of all is rolled back, too
    engine.dialect.do_rollback = slow_rollback
    try:
        complete = Server(app, environ=environ_of(path="/complete"))
        assert in_use(manager) == 0
        assert complete.read() == b"x"  # sending it has no bound any more, as with a list
        open_one = Server(app)
        open_one.body.close()
    finally:
        del engine.dialect.do_rollback
    assert in_use(manager) == 0


def test_f05_deadline_of_the_outer_request_passes_through_an_inner_one(warnings_of):
    inner = DBSessionMiddleware(lambda *_: wait(), deadline=LONG)

    def app(environ, start_response):
        inner(environ_of(path="/inner"), start_response)

    server = Server(app)
    server.read()
    assert server.status.startswith("503")
    assert [line.split(" was")[0] for line in warnings_of()] == ["GET /orders/7"]


def test_f05_deadline_round_a_call_of_an_application_passes_through_it(manager):
    for app in (lambda *_: (query(manager), wait()), plain(lambda: (wait() for _ in "x"))):
        with pytest.raises(DeadlineExceeded), deadline(SOON):
            Server(app, LONG).read()
        assert in_use(manager) == 0


def test_body_that_was_dropped_hits_nobody_while_it_is_closed_aside():
    go_on, closed = Event(), Event()

    def lines():
        try:
            yield b"x"
        finally:
            go_on.wait(LONG)
            closed.set()

    server = Server(plain(lines))
    next(server.body)
    end_by_dropping(server)
    nothing_else_fires()
    go_on.set()
    assert closed.wait(LONG)
