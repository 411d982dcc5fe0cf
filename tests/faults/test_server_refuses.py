"""The server is full, read-only, or dies under load: requests end with its own error at once, and the pool heals."""

from __future__ import annotations

import pytest

MODES = pytest.mark.parametrize("mode", ["patched", pytest.param("threads", marks=pytest.mark.slow)])


@MODES
def test_requests_fail_at_once_when_others_hold_all_connections(mode, mariadb, with_server):
    """Error 1040, no slot lost; the first request after it succeeds."""
    with_server(
        """
        import contextlib, pymysql
        from sqlalchemy.engine import make_url
        configure()
        request()
        dbsession.dispose()
        configure()
        wait_until(lambda: not server.ids())

        server.set_global("max_connections", 10)  # the least it takes
        arguments = make_url(url).translate_connect_args(username="user")
        with contextlib.ExitStack() as others:
            # The one that set it may still be ending, and its place would be free a moment after the last is taken.
            first = pymysql.connect(**arguments)
            others.callback(first.close)
            def connected():
                with first.cursor() as cursor:
                    cursor.execute("SHOW GLOBAL STATUS LIKE 'Threads_connected'")
                    return int(cursor.fetchone()[1])
            wait_until(lambda: connected() == 1)
            for _ in range(100):
                try:
                    others.callback(pymysql.connect(**arguments).close)
                except pymysql.err.OperationalError as error:
                    assert error.args[0] == 1040, error
                    break
            errors = concurrently(failure) + [failure() for _ in range(20)]
            assert [code(error) for error in errors] == [1040] * 40, errors
            nothing_in_use()
        wait_until(lambda: not server.ids())
        assert concurrently(request, 5) == [1] * 5
        nothing_in_use()

        server.set_global("max_connections", 500)
        assert concurrently(request) == [1] * 20
        fill(20)
        """,
        mode=mode,
    )


def test_writes_go_on_when_the_server_was_read_only_for_a_while(with_server):
    """1290: the server was demoted. The pool is replaced, since behind the same address there may be a new primary."""
    with_server(
        """
        configure()
        request("CREATE TABLE t (n INT)", commit=True)
        for user in server.sql("SELECT * FROM information_schema.user_privileges WHERE grantee LIKE '%%app%%'"):
            assert user["PRIVILEGE_TYPE"] == "USAGE", "only an account without more is refused"
        fill()
        before = server.ids()
        server.set_global("read_only", 1)
        for _ in range(2):
            assert code(failure("INSERT INTO t VALUES (1)", commit=True)) == 1290
            nothing_in_use()
            assert request("SELECT COUNT(*) FROM t") == 0
        # The rest of the old pool's connections are closed as they are met.
        assert request("SELECT CONNECTION_ID()") not in before
        server.set_global("read_only", 0)
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
        assert {code(error) for error in failed} <= {2003, 2006, 2013, 1927, 1053}, failed
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
        assert {code(error) for error in errors} <= {2003, 2006, 2013}, errors
        nothing_in_use()
        server.start()
        assert concurrently(lambda: request("SELECT 1 + SLEEP(0.05)"), 100) == [1] * 100
        assert len(server.ids()) <= 20
        nothing_in_use()
        """
    )
