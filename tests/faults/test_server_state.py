"""reset="connection": nothing that a request set on its connection at the server reaches the next request. And a
result that nobody reads on is not read to its end for the sake of the connection."""

from __future__ import annotations

import pytest

from support.proxy import Proxy

MODES = pytest.mark.parametrize("mode", ["patched", pytest.param("threads", marks=pytest.mark.slow)])

STATE = """
    STATE = (
        "SELECT CONVERT(CONCAT_WS('|',"
        " COALESCE(@who, 'nobody'), @@time_zone, @@sql_mode, @@tx_isolation, @@autocommit,"
        " @@character_set_client, @@character_set_connection, @@character_set_results, @@collation_connection,"
        " @@lock_wait_timeout, @@group_concat_max_len, DATABASE(), COALESCE(IS_USED_LOCK('dbs'), 'free')"
        ") USING utf8mb4)"
    )
    DIRT = [
        "SET @who = 'alice'",
        "SET time_zone = '+05:00'",
        "SET sql_mode = ''",
        "SET SESSION TRANSACTION ISOLATION LEVEL READ UNCOMMITTED",
        "SET NAMES latin1",
        "SET lock_wait_timeout = 3",
        "SET group_concat_max_len = 4",
        "CREATE TEMPORARY TABLE private (n INT)",
        "INSERT INTO private VALUES (1)",
        "SELECT GET_LOCK('dbs', 0)",
        "SET autocommit = 1",
    ]

    def soil(end):
        with dbsession.session_scope():
            id = session.scalar(text("SELECT CONNECTION_ID()"))
            for statement in DIRT:
                session.execute(text(statement))
            if end is not None:
                end()
        return id

    def state():
        with dbsession.session_scope():
            return session.scalar(text(STATE)), session.scalar(text("SELECT CONNECTION_ID()"))

    def fail():
        try:
            session.execute(text("SELECT nothing FROM nowhere"))
        except exc.SQLAlchemyError:
            pass
"""


@MODES
@pytest.mark.parametrize("level", ["the server's", "READ COMMITTED"])
def test_no_session_state_reaches_the_next_request(mode, level, with_server):
    """The connection is the same one, and as the engine's settings want it: charset, autocommit, init_command and
    isolation level."""
    with_server(
        STATE
        + """
    options = {"pool_size": 1, "connect_args": {"init_command": "SET lock_wait_timeout = 77"}}
    if sys.argv[3] != "the server's":
        options["isolation_level"] = sys.argv[3]
    configure(options=options, reset="connection")
    fresh, id = state()
    expected = ["nobody", "utf8mb4", "77", "READ-COMMITTED" if "isolation_level" in options else "REPEATABLE-READ"]
    assert set(expected) <= set(fresh.split("|")), fresh
    for end in (None, session.commit, session.rollback, fail):
        assert soil(end) == id
        assert state() == (fresh, id)
        assert code(failure("SELECT * FROM private")) == 1146
    def with_level():
        with dbsession.session_scope():
            session.connection(execution_options={"isolation_level": "SERIALIZABLE"})
            return session.scalar(text("SELECT @@tx_isolation"))
    assert with_level() == "SERIALIZABLE"
    assert state() == (fresh, id)
    nothing_in_use()
    """,
        level,
        mode=mode,
    )


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
    soil(lambda: server.sql("KILL %s", id))
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
                assert session.scalar(text("SELECT @mine")) is None
                session.execute(text("SET @mine = 1"))
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
def test_stream_that_nobody_reads_on_is_not_read_to_its_end(mode, reset, mariadb, mariadb_url, with_server):
    """300 MB, of which ten rows are wanted: counted by a proxy, hardly more than those pass."""
    with Proxy(mariadb.port) as proxy:
        with_server(
            """
    from support.proxy import ProxyControl
    proxy = ProxyControl(int(sys.argv[3]))
    configure(options={"pool_size": 2}, reset=sys.argv[4], kill_abandoned=False)
    def stream(end):
        with dbsession.session_scope():
            rows = session.execute(
                text("SELECT CONNECTION_ID(), REPEAT('x', 50) FROM seq_1_to_5000000"),
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
        wait_until(lambda: id not in server.ids(), 10, "the server ends it")
        assert request() == 1
    passed = [connection["to_client"] for connection in proxy.connections()]
    assert sum(size > 100 for size in passed) >= len(ends) and max(passed) < 30_000_000, passed
    """,
            proxy.control_port,
            reset,
            url=mariadb_url.replace(f":{mariadb.port}/", f":{proxy.port}/"),
            mode=mode,
        )
