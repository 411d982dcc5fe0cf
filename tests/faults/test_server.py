"""F13 and its relatives: the server restarts, dies, goes silent, refuses; requests end, and the pool heals.

Each script is a process with gevent patched (a few also run with threads); a "request" is a scope of its own.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time

import pytest

from support.postgresql import PostgreSQLServer
from support.proxy import Proxy
from support.servers import on

MODES = pytest.mark.parametrize("mode", ["patched", pytest.param("threads", marks=pytest.mark.slow)])


@MODES
@on("mariadb", "postgresql")
def test_no_request_fails_when_the_server_restarts_between_requests(mode, with_server):
    with_server(
        """
        configure()
        fill()
        server.restart()
        assert [request() for _ in range(20)] == [1] * 20
        fill()
        server.restart()
        assert concurrently(request) == [1] * 20
        nothing_in_use()
        """,
        mode=mode,
    )


@MODES
def test_no_request_fails_when_all_idle_connections_were_killed(mode, with_server):
    with_server(
        """
        def kill_all():
            before = server.ids()
            assert len(before) >= 20
            for id in before:
                server.kill_connection(id)
            wait_until(lambda: not before & server.ids(), 20)

        configure()
        fill()
        kill_all()
        assert [request() for _ in range(20)] == [1] * 20
        fill()
        kill_all()
        assert concurrently(request) == [1] * 20
        nothing_in_use()
        """,
        mode=mode,
    )


@pytest.mark.slow
def test_no_request_fails_when_the_server_closed_idle_connections(with_server):
    """As MariaDB's wait_timeout and PostgreSQL's idle_session_timeout have it, which a new connection takes over."""
    with_server(
        """
        server.set_global(*db.idle_timeout)
        configure()
        fill()
        wait_until(lambda: not server.ids(), 20, "the server closes what is idle")
        assert concurrently(request) == [1] * 20
        wait_until(lambda: not server.ids(), 20, "the server closes what is idle")
        assert [request() for _ in range(20)] == [1] * 20
        nothing_in_use()
        """,
    )


def test_statement_and_connection_killed_by_somebody_cost_one_error_each(with_server):
    with_server(
        """
        configure(options={"pool_size": 2})
        for verb in ("kill_statement", "kill_connection"):
            task = spawn(failure, f"SELECT {db.sleep(30)}")
            getattr(server, verb)(running(db.sleep(30)))
            (error,) = join(task)
            assert db.is_lost(error) if verb == "kill_connection" else code(error) == db.CANCELLED, error
            nothing_in_use()
            assert [request() for _ in range(3)] == [1] * 3
        """,
    )


def test_transactions_in_flight_fail_and_refuse_work_when_the_server_restarts(with_server):
    with_server(
        """
        configure()
        request("CREATE TABLE t (n INT)", commit=True)
        ready, again = threading.Barrier(11), threading.Event()
        def write():
            with dbsession.session_scope():
                session.execute(text("INSERT INTO t VALUES (1)"))
                ready.wait(20)
                again.wait(30)
                errors = []
                for _ in range(2):
                    try:
                        session.execute(text("INSERT INTO t VALUES (2)"))
                    except exc.SQLAlchemyError as error:
                        errors.append(error)
                session.rollback()
                session.execute(text("INSERT INTO t VALUES (3)"))
                session.commit()
                return errors
        tasks = [spawn(write) for _ in range(10)]
        ready.wait(20)
        server.restart()
        again.set()
        for first, second in join(tasks):
            assert db.is_lost(first), first
            assert isinstance(second, exc.PendingRollbackError), second
        nothing_in_use()
        assert request("SELECT CONCAT(COUNT(*), ' ', SUM(n)) FROM t") == "10 30"
        """,
    )


# -- silence -----------------------------------------------------------------------------------------------


@MODES
@on("mariadb", "postgresql")
def test_f13_requests_end_with_an_error_when_the_server_is_silent(mode, with_server):
    """With idle connections and without; every slot comes back, and so does the service."""
    with_server(
        """
        configure(read_timeout_s=3, write_timeout_s=3)
        connect_within(60)
        fill(10)
        connect_within(2)
        server.pause()
        errors = concurrently(failure, timeout_s=40)
        assert all(isinstance(error, exc.OperationalError) for error in errors), errors
        nothing_in_use()
        assert isinstance(failure(), exc.OperationalError)
        nothing_in_use()
        server.resume()
        connect_within(60)
        assert concurrently(request) == [1] * 20
        nothing_in_use()
        """,
        mode=mode,
    )


@MODES
def test_f13_an_idle_connection_is_asked_as_long_as_a_new_one_may_take(mode, with_server):
    """The ping at a checkout: not as long as a statement may take."""
    with_server(
        """
        configure(read_timeout_s=300, ping_idle_s=0, connect_timeout_s=3)
        request()
        server.pause()
        (error,) = concurrently(failure, count=1, timeout_s=40)
        assert isinstance(error, exc.OperationalError), error
        nothing_in_use()
        server.resume()
        connect_within(60)
        assert request() == 1
        """,
        mode=mode,
    )


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["to_client", pytest.param("to_server", marks=pytest.mark.slow)])
def test_f13_requests_end_with_an_error_when_the_network_is_silent(direction, server, server_url, with_server):
    """In the middle of transactions; the connection is open, but nothing passes one way."""
    with Proxy(server.port) as proxy:
        with_server(
            """
            from support.proxy import ProxyControl
            proxy, direction = ProxyControl(int(sys.argv[3])), sys.argv[4]
            configure(read_timeout_s=3, write_timeout_s=3)
            connect_within(60)
            request("CREATE TABLE t (n INT)", commit=True)
            ready, again = threading.Barrier(11), threading.Event()
            def work():
                with dbsession.session_scope():
                    session.execute(text("INSERT INTO t VALUES (1)"))
                    ready.wait(20)
                    again.wait(20)
                    try:
                        session.execute(text("INSERT INTO t VALUES (2)"))
                    except exc.OperationalError as error:
                        return error
            tasks = [spawn(work) for _ in range(10)]
            ready.wait(20)
            proxy.stall(direction)
            again.set()
            assert all(db.is_lost(error) for error in join(tasks, 40))
            nothing_in_use()
            connect_within(2)
            assert isinstance(failure(), exc.OperationalError)
            nothing_in_use()
            proxy.resume()
            connect_within(60)
            assert concurrently(request) == [1] * 20
            assert request("SELECT COUNT(*) FROM t") == 0
            nothing_in_use()
            """,
            proxy.control_port,
            direction,
            url=server_url.replace(f":{server.port}/", f":{proxy.port}/"),
        )


@MODES
def test_f13_connecting_ends_with_an_error_when_the_server_never_greets(mode, server, with_server):
    """connect_timeout_s bounds the handshake too, whatever read_timeout_s says: with a stopped server, whose kernel
    still accepts, and with a listener of something else."""
    with socket.create_server(("127.0.0.1", 0)) as mute:
        with_server(
            """
            configure(connect_timeout_s=1, read_timeout_s=300, write_timeout_s=300)
            server.pause()
            errors = concurrently(failure, 5, timeout_s=40)
            assert [type(error) for error in errors] == [exc.OperationalError] * 5, errors
            assert all(map(db.is_lost, errors)), errors
            nothing_in_use()
            server.resume()
            connect_within(60)
            assert concurrently(request) == [1] * 20

            dbsession.configure({"default": {"url": sys.argv[3], "connect_timeout_s": 1, "read_timeout_s": 300}})
            errors = concurrently(failure, 5, timeout_s=40)
            assert [type(error) for error in errors] == [exc.OperationalError] * 5, errors
            nothing_in_use()
            """,
            server.url("x", port=mute.getsockname()[1]),
            mode=mode,
        )


@pytest.mark.slow
def test_f13_connecting_ends_with_an_error_when_the_greeting_drips(server, with_server):
    # PostgreSQL's clients speak first: no TLS, and the beginning of what it asks for.
    greeting = b"NR\0\0\1\0" if isinstance(server, PostgreSQLServer) else b"\x50\0\0\0"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(20)

        def drip():
            with contextlib.suppress(OSError), listener.accept()[0] as client:
                client.sendall(greeting)
                for _ in range(60):
                    client.sendall(b"\x0a")
                    time.sleep(0.3)  # the drip: less than the timeout

        dripping = threading.Thread(target=drip)
        dripping.start()
        try:
            with_server(
                """
                dbsession.configure({"default": {"url": sys.argv[3], "connect_timeout_s": 1}})
                error, = concurrently(failure, 1, timeout_s=20)
                assert isinstance(error, exc.OperationalError), error
                nothing_in_use()
                """,
                server.url("x", port=listener.getsockname()[1]),
            )
        finally:
            dripping.join(40)


@pytest.mark.slow
def test_f13_read_timeout_is_the_entrys_when_connecting_is_over(with_server):
    """connect_timeout_s is no limit on a statement."""
    with_server(
        """
        configure(connect_timeout_s=3, read_timeout_s=30)
        assert request(f"SELECT {db.sleep(4)}") == 0
        configure(connect_timeout_s=20, read_timeout_s=1)
        assert db.is_lost(failure(f"SELECT {db.sleep(30)}"))
        nothing_in_use()
        """,
    )


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["patched", "threads"])
def test_f13_teardown_is_bounded_when_the_server_is_silent(mode, with_server):
    """Not by read_timeout_s, which is for statements: the answer is made, and its client waits for the rollback."""
    with_server(
        """
        configure(options={"pool_size": 3}, read_timeout_s=300)
        request("CREATE TABLE t (n INT)", commit=True)
        ready, end = threading.Barrier(4), threading.Event()
        def work():
            with dbsession.session_scope():
                session.execute(text("INSERT INTO t VALUES (1)"))
                ready.wait(20)
                end.wait(20)
        tasks = [spawn(work) for _ in range(3)]
        ready.wait(20)
        server.pause()
        end.set()
        join(tasks, 40)  # its bound is 5 s
        nothing_in_use()
        server.resume()
        assert request("SELECT COUNT(*) FROM t") == 0
        """,
        mode=mode,
    )
