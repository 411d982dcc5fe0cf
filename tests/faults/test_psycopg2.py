"""psycopg2 under gevent, which waits by one callback for a whole process: what other drivers promise it keeps, too."""

from __future__ import annotations

import json

import pytest

from support.processes import run_python
from support.proxy import Proxy
from support.sweep import KILLS, VARIANTS, rotated, run_sweep

from .conftest import script_runner

pytestmark = pytest.mark.postgresql


@pytest.fixture
def psycopg2_url(postgresql_url):
    return postgresql_url.replace("+psycopg:", "+psycopg2:")


@pytest.fixture
def with_psycopg2(postgresql, psycopg2_url):
    with script_runner(postgresql, psycopg2_url) as run:
        yield run


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "kill"), rotated(VARIANTS, KILLS))
def test_f09_request_by_psycopg2_leaves_nothing_behind_when_killed_at_any_switch(
    postgresql, psycopg2_url, variant, kill
):
    report = run_sweep(postgresql, psycopg2_url, variant, kill)
    assert report.kills > 10
    assert not report.faults, json.dumps(report.faults[:3], indent=1).replace("\\n", "\n")


@pytest.mark.parametrize("mode", ["patched", pytest.param("late", marks=pytest.mark.slow)])
def test_f14_statement_and_row_locks_are_gone_when_its_greenlet_is_killed(with_psycopg2, mode):
    """Also where psycopg2 was imported before gevent has patched: it would stop the loop without a callback."""
    with_psycopg2(
        """
        import gevent, logging
        warnings = []
        logging.getLogger("dbsession").addHandler(handler := logging.Handler("WARNING"))
        handler.emit = lambda record: warnings.append(record.getMessage())

        configure()
        request("CREATE TABLE t (id INT PRIMARY KEY, n INT)", commit=True)
        request("INSERT INTO t VALUES (1, 0)", commit=True)
        bystander = spawn(request, "SELECT 'bystander', pg_sleep(50)")
        bystanders_id = running("bystander")

        def victim():
            with dbsession.session_scope():
                session.execute(text("UPDATE t SET n = n + 1 WHERE id = 1"))
                session.execute(text("SELECT pg_sleep(51)"))

        task = spawn(victim)
        id = running("pg_sleep(51)")
        waiting = spawn(request, "UPDATE t SET n = n + 100 WHERE id = 1")
        id_waiting = running("n + 100")
        waiting.handle.kill()  # in a lock wait
        wait_until(lambda: id_waiting not in server.ids(), 20)
        assert id in server.ids()
        task.handle.kill()
        wait_until(lambda: id not in server.ids(), 20)
        request("UPDATE t SET n = n + 10 WHERE id = 1", commit=True)
        assert request("SELECT n FROM t WHERE id = 1") == 10
        assert bystanders_id in server.ids() and not warnings, warnings
        bystander.handle.kill()
        wait_until(lambda: bystanders_id not in server.ids(), 20)
        nothing_in_use()
        """,
        mode=mode,
    )


@pytest.mark.slow
@pytest.mark.parametrize("through", ["proxy", "pgbouncer"])
def test_statement_behind_a_proxy_is_nobodys_to_be_ended_and_that_is_said_once(
    postgresql, pgbouncer, psycopg2_url, with_psycopg2, through
):
    """The server shows the proxy's port and not ours, so its session may be somebody else's; PgBouncer tells a process
    id that nobody has there."""
    with Proxy(postgresql.port) as proxy:
        port = proxy.port if through == "proxy" else pgbouncer.port
        with_psycopg2(
            """
            import logging
            warnings = []
            logging.getLogger("dbsession").addHandler(handler := logging.Handler("WARNING"))
            handler.emit = lambda record: warnings.append(record.getMessage())
            from dbsession.green import abandoned

            configure()
            for n in (51, 52):
                task = spawn(request, f"SELECT pg_sleep({n})")
                id = running(f"pg_sleep({n})")
                task.handle.kill()
                wait_until(lambda: not abandoned.pending(), 20)
                assert id in server.ids()
            (warning,) = warnings
            assert "cannot be recognised" in warning and "kill_abandoned" in warning, warning
            """,
            url=psycopg2_url.replace(f":{postgresql.port}/", f":{port}/"),
        )


@pytest.mark.slow
def test_f11_silent_server_gives_an_error_within_the_bounds_by_psycopg2(with_psycopg2):
    with_psycopg2(
        """
        import time
        configure(read_timeout_s=1.0, options={"pool_size": 3})
        fill(2)
        server.pause()
        try:
            # One in a statement, one in a ping, one while it connects.
            time.sleep(1.1)
            connect_within(1)
            errors = concurrently(failure, 3, 40)
        finally:
            server.resume()
        texts = sorted(str(error.orig) for error in errors)
        assert all("within 1 s" in text for text in texts), texts
        connect_within(60)
        wait_until(lambda: failure() is None, 30)
        nothing_in_use()
        """
    )


@pytest.mark.slow
def test_f11_silent_server_gives_an_error_within_the_bounds_by_psycopg2_in_a_thread(with_psycopg2):
    """There it waits in C; a connection that something still comes from is left alone."""
    with_psycopg2(
        """
        configure(read_timeout_s=1.0)
        connect_within(60)
        assert request("SELECT 1, pg_sleep(0.5)") == 1
        trickle = text("SELECT repeat('x', 100000), pg_sleep(0.4) FROM generate_series(1, 5)")
        with dbsession.session_scope():
            assert len(session.execute(trickle).all()) == 5  # two seconds, but never one without a byte
        id = request("SELECT pg_backend_pid()")
        late = failure("SELECT pg_sleep(50)")
        assert "within 1 s" in str(late.orig), late
        wait_until(lambda: id not in server.ids(), 20)  # ended at the server, too
        fill(2)
        server.pause()
        try:
            errors = concurrently(failure, 2, 40)
        finally:
            server.resume()
        assert all("within 1 s" in str(error.orig) for error in errors), errors
        wait_until(lambda: failure() is None, 30)
        nothing_in_use()
        """,
        mode="threads",
    )


def test_psycopg2_needs_two_round_trips_for_a_select_and_one_where_nothing_is_written(
    postgresql, psycopg2_url, with_psycopg2
):
    """BEGIN goes with the first statement; a read-only database has no transactions."""
    with Proxy(postgresql.port) as proxy:
        with_psycopg2(
            """
            import json
            from support.proxy import ProxyControl
            proxy = ProxyControl(int(sys.argv[3]))

            def messages():
                "How many queries the only connection has sent."
                sent = proxy.sent(len(proxy.connections()) - 1)
                at = 8 if int.from_bytes(sent[:4]) == 8 else 0  # a request for TLS
                at, found = at + int.from_bytes(sent[at : at + 4]), ""
                while at < len(sent):
                    found += chr(sent[at])
                    at += 1 + int.from_bytes(sent[at + 1 : at + 5])
                return found.count("Q")

            def trips(*args, **kwargs):
                request(*args, **kwargs)
                wait_until(lambda: checked_out(dbsession.get_engine()) == 0, 10)
                before = messages()
                request(*args, **kwargs)
                wait_until(lambda: checked_out(dbsession.get_engine()) == 0, 10)
                return messages() - before

            configure(options={"pool_size": 1})
            request("CREATE TABLE t (n INT)", commit=True)
            assert trips("SELECT 1") == 2
            assert trips("SELECT count(*) FROM t", commit=True) == 2
            assert trips("INSERT INTO t VALUES (1)", commit=True) == 2
            configure(options={"pool_size": 1}, readonly=True)
            assert trips("SELECT 1") == 1
            """,
            proxy.control_port,
            url=psycopg2_url.replace(f":{postgresql.port}/", f":{proxy.port}/"),
        )


@pytest.mark.slow
def test_connections_that_are_not_ours_wait_by_the_callback_that_was_there(with_psycopg2):
    with_psycopg2(
        """
        import psycopg2
        from gevent.socket import wait_read, wait_write
        from psycopg2 import extensions
        waited = []

        def callback(connection):
            waited.append(connection)
            while (state := connection.poll()) != extensions.POLL_OK:
                (wait_read if state == extensions.POLL_READ else wait_write)(connection.fileno())

        for how in (callback, None):
            extensions.set_wait_callback(how)
            configure()
            assert request("SELECT 1") == 1 and not waited
            assert extensions.get_wait_callback() not in (how, None)
            own = psycopg2.connect(url.replace("+psycopg2", ""))
            cursor = own.cursor()
            cursor.execute("SELECT 2")
            assert cursor.fetchone() == (2,)
            own.close()
            assert bool(waited) is (how is not None)
            waited.clear()
            dbsession.dispose()

        # psycogreen may be asked for late; a stop of the loop would be seen as a hang here.
        configure()
        request()
        extensions.set_wait_callback(callback)
        task = spawn(request, "SELECT pg_sleep(50)")
        running("pg_sleep(50)")
        task.handle.kill()
        nothing_in_use()
        assert not waited
        """
    )


@pytest.mark.slow
def test_copy_and_large_objects_work_in_a_process_that_is_not_patched(with_psycopg2):
    """There psycopg2 waits without a callback, with which it has neither."""
    with_psycopg2(
        """
        import io
        from psycopg2 import extensions
        configure()
        request("CREATE TABLE t (n INT)", commit=True)
        assert extensions.get_wait_callback() is None
        raw = dbsession.get_engine().raw_connection()
        raw.cursor().copy_expert("COPY t FROM STDIN", io.StringIO("1\\n2\\n"))
        raw.rollback()
        raw.cursor().copy_expert("COPY t FROM STDIN", io.StringIO("1\\n2\\n"))
        raw.commit()
        large = raw.dbapi_connection.lobject(0, "wb")
        large.write(b"x" * 10)
        oid = large.oid
        raw.commit()
        assert raw.dbapi_connection.lobject(oid).read() == "x" * 10
        raw.close()
        assert request("SELECT count(*) FROM t") == 2
        """,
        mode="threads",
    )


def test_commit_that_the_server_makes_a_rollback_is_an_error_by_psycopg2(with_psycopg2):
    with_psycopg2(
        """
        import psycopg2
        from dbsession.errors import RollbackRequired
        configure()
        request("CREATE TABLE t (n INT)", commit=True)
        # The first text of a transaction, which the server parses with its BEGIN, and a later one.
        for before, wrong in ((None, "SELEC 1"), ("INSERT INTO t VALUES (1)", "SELECT 1/0")):
            raw = dbsession.get_engine().raw_connection()
            cursor = raw.dbapi_connection.cursor()
            if before:
                cursor.execute(before)
            try:
                cursor.execute(wrong)
            except psycopg2.Error:
                pass
            try:
                raw.dbapi_connection.commit()
                raise AssertionError("it was taken for a commit")
            except RollbackRequired as error:
                assert "nothing was committed" in str(error)
            raw.close()
        assert request("SELECT count(*) FROM t") == 0
        """
    )


@pytest.mark.slow
def test_session_is_as_at_first_for_the_next_user_by_psycopg2(with_psycopg2):
    with_psycopg2(
        """
        import psycopg2.extras
        from support.dialects import PostgreSQL
        configure(options={"pool_size": 1})
        first = request(PostgreSQL.state), request("SELECT pg_backend_pid()")
        with dbsession.session_scope():
            raw = session.connection().connection.dbapi_connection
            raw.cursor().execute("SELECT 1")
            raw.commit()
            raw.set_session(isolation_level="SERIALIZABLE", readonly=True, autocommit=True)
            for statement in PostgreSQL.dirt[:1]:
                session.execute(text(statement))
        with dbsession.session_scope():
            raw = session.connection().connection.dbapi_connection
            raw.set_session(readonly=True)
            raw.cursor_factory = psycopg2.extras.DictCursor
            raw.notifies.append("somebody else's")
            raw.set_client_encoding("LATIN1")
            for statement in PostgreSQL.dirt:
                if "TEMP" not in statement and "private" not in statement:
                    session.execute(text(statement))
            session.commit()
        with dbsession.session_scope():
            assert session.scalar(text("SHOW transaction_read_only")) == "off"
            raw = session.connection().connection.dbapi_connection
            assert (raw.autocommit, raw.isolation_level, raw.readonly) == (False, None, None)
            assert raw.cursor_factory is None and raw.notifies == []
            assert raw.encoding == "UTF8" and session.scalar(text("SELECT '\\u20ac'")) == "\\u20ac"
        assert (request(PostgreSQL.state), request("SELECT pg_backend_pid()")) == first
        """
    )


@pytest.mark.slow
def test_psycopg2_blocks_no_loop_while_it_connects_to_a_silent_server():
    """Its addresses share the time; a name is looked up by gevent and not by libpq."""
    run_python(
        """
        from gevent import monkey
        monkey.patch_all()
        import socket
        import gevent
        from sqlalchemy import exc, text
        import dbsession
        with socket.create_server(("127.0.0.1", 0)) as silent:
            port = silent.getsockname()[1]
            url = f"postgresql+psycopg2://app@/test?host=127.0.0.1:{port}&host=localhost:{port}"
            dbsession.configure({"default": {"url": url, "connect_timeout_s": 1}})
            ticks = []

            def tick():
                while True:
                    ticks.append(1)
                    gevent.sleep(0.01)

            ticking = gevent.spawn(tick)
            try:
                dbsession.get_dbsession().execute(text("SELECT 1"))
            except exc.OperationalError as error:
                assert "no connection within 1 s" in str(error) and "addresses" in str(error), error
            assert len(ticks) > 10
            ticking.kill()
        """
    )
