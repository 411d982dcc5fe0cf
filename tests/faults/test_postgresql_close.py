"""A connection of psycopg's that one greenlet closes while another waits for its answer; and the waits that nobody else
bounds: for a name, and for a server that reads nothing."""

from __future__ import annotations

import pytest

from support.servers import on


@on("postgresql")
@pytest.mark.parametrize("mode", ["patched", pytest.param("threads", marks=pytest.mark.slow)])
@pytest.mark.parametrize("who", ["the connection", "the session", "the connection, without a kill"])
def test_waiting_user_gets_an_error_at_once_when_another_closes_the_connection(with_server, mode, who):
    """And its descriptor's number is nobody else's until then; the statement is ended at the server."""
    with_server(
        """
        configure(options={"pool_size": 1}, kill_abandoned="without" not in sys.argv[3])
        held, failed = [], []
        def use():
            with dbsession.session_scope():
                held.extend([session.connection().connection.dbapi_connection, session()])
                try:
                    session.execute(text("SELECT pg_sleep(60)"))
                except exc.OperationalError as error:
                    failed.append(error)
        user = spawn(use)
        number = running("pg_sleep")
        before = held[0].fileno()
        held["session" in sys.argv[3]].close()
        fillers = [socket.socket() for _ in range(5)]
        assert before not in [filler.fileno() for filler in fillers]
        join([user], 20)
        assert len(failed) == 1 and held[0].closed
        if "without" not in sys.argv[3]:
            wait_until(lambda: number not in [each["id"] for each in server.processlist()], 10, "it is gone there")
        assert request("SELECT 7") == 7
        nothing_in_use()
        """.replace("configure(", "import socket\n        configure(", 1),
        who,
        mode=mode,
    )


@on("postgresql")
def test_name_that_is_not_resolved_ends_connecting_within_its_time(with_server):
    with_server(
        """
        import gevent, socket
        from time import monotonic
        socket.getaddrinfo = lambda *arguments, **more: gevent.sleep(30)
        dbsession.configure({"default": {"url": url.replace("127.0.0.1", "slow.example"), "connect_timeout_s": 0.5}})
        began = monotonic()
        assert "not resolved within 0.5 s" in str(failure())
        assert monotonic() - began < 15
        """
    )
