"""The server is full, read-only, or dies under load: requests end with its own error at once, and the pool heals."""

from __future__ import annotations

import pytest

MODES = pytest.mark.parametrize("mode", ["patched", pytest.param("threads", marks=pytest.mark.slow)])


@MODES
def test_requests_fail_at_once_when_others_hold_all_connections(mode, with_server):
    """Its error, no slot lost; the first request after it succeeds."""
    with_server(
        """
        import contextlib
        from sqlalchemy import NullPool, create_engine
        configure()
        request()
        dbsession.dispose()
        configure()
        wait_until(lambda: not server.ids())

        server.limit_connections(10)
        other = create_engine(url, poolclass=NullPool)
        with contextlib.ExitStack() as others:
            # The one that set it may still be ending, and its place would be free a moment after the last is taken.
            first = others.enter_context(other.connect())
            wait_until(lambda: first.scalar(text(db.connected)) == 1)
            for _ in range(100):
                try:
                    others.enter_context(other.connect())
                except exc.OperationalError as error:
                    assert db.is_full(error), error
                    break
            errors = concurrently(failure) + [failure() for _ in range(20)]
            assert len(errors) == 40 and all(map(db.is_full, errors)), errors
            nothing_in_use()
        wait_until(lambda: not server.ids())
        assert concurrently(request, 5) == [1] * 5
        nothing_in_use()

        server.limit_connections(None)
        assert concurrently(request) == [1] * 20
        fill(20)
        """,
        mode=mode,
    )


def test_writes_go_on_when_the_server_was_read_only_for_a_while(with_server):
    """1290, 25006: the server was demoted. The pool is replaced: behind the same address there may be a new primary."""
    with_server(
        """
        configure()
        request("CREATE TABLE t (n INT)", commit=True)
        fill()
        before = server.ids()
        server.refuse_writes(True)
        for _ in range(2):
            assert code(failure("INSERT INTO t VALUES (1)", commit=True)) == db.READ_ONLY
            nothing_in_use()
            assert request("SELECT COUNT(*) FROM t") == 0
        # The rest of the old pool's connections are closed as they are met.
        assert request(f"SELECT {db.who}") not in before
        server.refuse_writes(False)
        request("INSERT INTO t VALUES (1)", commit=True)
        fill()
        wait_until(lambda: not before & server.ids(), 20, "the server has ended those of before")
        assert request("SELECT COUNT(*) FROM t") == 1
        nothing_in_use()
        """
    )


@pytest.mark.slow
def test_commits_are_stored_and_requests_end_when_the_server_crashes_under_load(with_server):
    """SIGKILL, twice, with 30 writers over 20 connections: every acknowledged row is there, nobody hangs, and the
    first use after the recovery works."""
    with_server(
        """
        configure(read_timeout_s=20)
        request("CREATE TABLE t (n INT PRIMARY KEY)", commit=True)
        acknowledged, failed, stop = set(), [], threading.Event()
        def write(task):
            n = task * 1_000_000
            while not stop.is_set():
                n += 1
                error = failure(f"INSERT INTO t VALUES ({n})", commit=True)
                if error is None:
                    acknowledged.add(n)
                else:
                    failed.append(error)
                    sleep(0.01)
        for round in range(2):
            stop.clear()
            acknowledged_before, failed_before = len(acknowledged), len(failed)
            tasks = [spawn(write, 30 * round + k) for k in range(30)]
            wait_until(lambda: len(acknowledged) > acknowledged_before + 100, 40)
            server.kill()
            wait_until(lambda: len(failed) > failed_before + 30, 40)
            server.start()
            acknowledged_at_recovery = len(acknowledged)
            if round:
                wait_until(lambda: len(acknowledged) > acknowledged_at_recovery + 100, 40)
            stop.set()
            join(tasks, 40)
            nothing_in_use()
            assert concurrently(request) == [1] * 20
            with dbsession.session_scope():
                stored = set(session.scalars(text("SELECT n FROM t")))
            assert acknowledged <= stored, acknowledged - stored
        nothing_in_use()
        assert all(map(db.is_lost, failed)), failed
        """,
        timeout=200,
    )


@pytest.mark.slow
def test_connections_of_a_herd_stay_within_the_pool_when_the_server_comes_back(with_server):
    with_server(
        """
        configure()
        fill()
        server.stop()
        errors = concurrently(failure, 60)
        assert all(map(db.is_lost, errors)), errors
        nothing_in_use()
        server.start()
        assert concurrently(lambda: request(f"SELECT 1 + {db.sleep(0.05)}"), 100) == [1] * 100
        assert len(server.ids()) <= 20
        nothing_in_use()
        """
    )
