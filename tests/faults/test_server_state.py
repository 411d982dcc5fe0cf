"""reset="connection": nothing that a request set on its connection at the server reaches the next request. And a
result that nobody reads on is not read to its end for the sake of the connection."""

from __future__ import annotations

import pytest

from support.proxy import Proxy
from support.servers import on

MODES = pytest.mark.parametrize("mode", ["patched", pytest.param("threads", marks=pytest.mark.slow)])

STATE = """
    def soil(end):
        with dbsession.session_scope():
            id = session.scalar(text(f"SELECT {db.who}"))
            for statement in db.dirt:
                session.execute(text(statement))
            if end is not None:
                end()
        return id

    def state():
        with dbsession.session_scope():
            return session.scalar(text(db.state)), session.scalar(text(f"SELECT {db.who}"))

    def fail():
        try:
            session.execute(text("SELECT nothing FROM nowhere"))
        except exc.SQLAlchemyError:
            pass
"""


@MODES
@pytest.mark.parametrize("level", ["the server's", "READ COMMITTED"])
def test_no_session_state_reaches_the_next_request(mode, level, with_server):
    """The connection is the same one, and as the engine's settings want it: charset, autocommit, what is set as it is
    opened, and isolation level."""
    with_server(
        STATE
        + """
    options = {"pool_size": 1, "connect_args": db.connect_args}
    if sys.argv[3] != "the server's":
        options["isolation_level"] = sys.argv[3]
    configure(options=options, reset="connection")
    fresh, id = state()
    expected = set(db.fresh)
    if "isolation_level" not in options and "READ-COMMITTED" in expected:
        expected = expected - {"READ-COMMITTED"} | {"REPEATABLE-READ"}
    assert expected <= set(fresh.split("|")), fresh
    for end in (None, session.commit, session.rollback, fail):
        assert soil(end) == id
        assert state() == (fresh, id)
        assert code(failure("SELECT * FROM private")) == db.UNKNOWN_TABLE
    def with_level():
        with dbsession.session_scope():
            session.connection(execution_options={"isolation_level": "SERIALIZABLE"})
            return session.scalar(text(f"SELECT {db.isolation}"))
    assert with_level().upper() == "SERIALIZABLE"
    assert state() == (fresh, id)
    nothing_in_use()
    """,
        level,
        mode=mode,
    )


@on("mariadb")  # PostgreSQL's role is among its `dirt`
@pytest.mark.parametrize("dirt", ["USE information_schema", "SET ROLE dbs_role"])
def test_current_database_and_role_do_not_reach_the_next_request(with_server, dirt):
    with_server(
        """
        configure(options={"pool_size": 1}, reset="connection")
        user = request("SELECT CURRENT_USER()").replace("@", "@'") + "'"
        server.sql("CREATE OR REPLACE ROLE dbs_role")
        server.sql(f"GRANT dbs_role TO {user}")
        state = "SELECT CONCAT_WS('|', DATABASE(), COALESCE(CURRENT_ROLE(), 'none'))"
        fresh = request(state)
        request(sys.argv[3])
        assert request(state) == fresh
        """,
        dirt,
    )


def test_connection_is_replaced_when_it_cannot_be_reset(with_server):
    """Killed at the server, or the server stopped, while it was in use: the next request does not see it."""
    with_server(
        STATE
        + """
    configure(options={"pool_size": 1}, reset="connection")
    fresh, id = state()
    soil(lambda: server.kill_connection(id))
    again, other = state()
    assert again == fresh and other != id
    soil(server.stop)
    server.start()
    assert state()[0] == fresh
    nothing_in_use()
    """
    )


@MODES
def test_waiting_requests_get_clean_connections_when_the_pool_is_small(mode, with_server):
    """Two hundred at once over two connections: each is reset between two users, whatever the first one did."""
    with_server(
        """
        configure(options={"pool_size": 2}, reset="connection")
        def use(k):
            with dbsession.session_scope():
                assert session.scalar(text(db.recall)) is None
                session.execute(text(db.remember))
                if k % 3 == 0:
                    session.commit()
                if k % 7 == 0:
                    session.execute(text("SELECT * FROM nowhere"))
        def outcome(k):
            try:
                use(k)
            except exc.ProgrammingError:
                return k % 7 == 0
            return k % 7 != 0
        assert all(join([spawn(outcome, k) for k in range(200)]))
        nothing_in_use()
        wait_until(lambda: len(server.ids()) == 2, 20, "the two are all there are")
        dbsession.dispose()
        wait_until(lambda: not server.ids())
        """,
        mode=mode,
    )


@MODES
@pytest.mark.parametrize("reset", ["rollback", "connection"])
def test_stream_that_nobody_reads_on_is_not_read_to_its_end(mode, reset, server, server_url, with_server):
    """300 MB, of which ten rows are wanted: counted by a proxy, hardly more than those pass."""
    with Proxy(server.port) as proxy:
        with_server(
            """
    from support.proxy import ProxyControl
    proxy = ProxyControl(int(sys.argv[3]))
    configure(options={"pool_size": 2}, reset=sys.argv[4], kill_abandoned=False)
    def stream(end):
        with dbsession.session_scope():
            rows = session.execute(
                text(f"SELECT {db.who}, REPEAT('x', 50) FROM {db.numbers(5_000_000)}"),
                execution_options={"stream_results": True, "max_row_buffer": 10},
            )
            ids = {rows.fetchone()[0] for _ in range(10)}
            end(rows)
        return ids
    ends = [
        lambda rows: None,
        lambda rows: session.rollback(),
        lambda rows: rows.close(),
        lambda rows: dbsession.clear_dbsession(),
    ]
    for end in ends:
        id, = stream(end)
        nothing_in_use()
        if db.sends_streams:
            wait_until(lambda: id not in server.ids(), 10, "the server ends it")
        else:
            assert id in server.ids()
        assert request() == 1
    passed = [connection["to_client"] for connection in proxy.connections()]
    assert sum(size > 100 for size in passed) >= (len(ends) if db.sends_streams else 1), passed
    assert max(passed) < 30_000_000, passed
    """,
            proxy.control_port,
            reset,
            url=server_url.replace(f":{server.port}/", f":{proxy.port}/"),
            mode=mode,
        )
