"""Private names of other libraries that dbsession relies on. When one of these fails after an upgrade, the library
has changed: find the new place before anything else is believed."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import os
import socket
import ssl
import types

import gevent
import gevent.socket
import gevent.ssl
import gevent.threadpool
import pymysql
import pytest
from prometheus_client import CollectorRegistry, Histogram
from sqlalchemy import Column, Integer, Table, create_engine, event, text
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import QueuePool
from sqlalchemy.util import await_only

from dbsession.aio import SessionManager, scope
from dbsession.aio.mysql import connection as line
from dbsession.aio.mysql import results
from dbsession.core import fork
from dbsession.green import hub
from dbsession.green.mysql import parser
from support.processes import run_python


def test_gevent_tells_whether_a_thread_has_a_hub_without_making_one():
    run_python(
        """
        from gevent._hub_local import get_hub_if_exists
        from dbsession.green import hub
        assert get_hub_if_exists() is None and hub.here() is None
        import gevent
        assert gevent.get_hub() is hub.here() is get_hub_if_exists()
        """
    )


def test_sqlalchemy_sets_up_a_pools_first_connections_under_a_mutex_that_may_be_another():
    held = []

    class Mutex:
        def __enter__(self):
            held.append("taken")

        def __exit__(self, *_):
            held.append("given back")

    pool = QueuePool(lambda: pymysql.connections.Connection(defer_connect=True), reset_on_return=None)
    event.listen(pool, "connect", lambda *_: held.append("set up"))
    pool.dispatch.connect.for_modify(pool.dispatch)._exec_once_mutex = Mutex()
    first, second = pool.connect(), pool.connect()
    assert held == ["taken", "set up", "given back", "set up"]
    first.invalidate()
    second.invalidate()


def test_gevent_runs_threadpool_jobs_in_a_greenlet_class_of_its_threadpool_module():
    assert gevent.get_hub() is hub.here()
    job = gevent.get_hub().threadpool.apply(lambda: type(gevent.getcurrent()).__module__)
    assert job == "gevent.threadpool"


def test_gevents_sockets_say_that_another_greenlet_has_closed_them_by_a_class_of_their_own():
    assert gevent.socket.cancel_wait_ex.__module__ == "gevent._socketcommon"


def test_gevents_sockets_wait_for_their_read_event(mariadb):
    with gevent.socket.create_connection(("127.0.0.1", mariadb.port)) as plain:
        plain._wait(plain._read_event)
        assert plain.send(b"", 0, 0.0) == 0 and not hasattr(plain, "pending")
        assert plain.recv(4)
    assert gevent.ssl.SSLSocket._wait is gevent.socket.socket._wait and hasattr(gevent.ssl.SSLSocket, "pending")


def test_socket_gives_a_clients_descriptor_without_making_a_socket_of_it():
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()):
        descriptor, _ = listener._accept()
        os.close(descriptor)


def test_pymysql_keeps_its_socket_in_sock(mariadb_url):
    engine = create_engine(mariadb_url)
    with engine.connect() as connection:
        driver = connection.connection.dbapi_connection
        assert isinstance(driver, pymysql.connections.Connection)
        assert fork.descriptor_of(driver) == driver._sock.fileno() >= 0
    engine.dispose()
    assert fork.descriptor_of(driver) is None


def test_pymysql_makes_a_tls_context_by_a_method_that_asks_nothing_of_its_connection(tmp_path):
    made = pymysql.connections.Connection._create_ssl_ctx(None, {"verify_mode": False})
    assert isinstance(made, ssl.SSLContext) and made.verify_mode == ssl.CERT_NONE and not made.check_hostname

    class Ours(pymysql.connections.Connection):
        def _create_ssl_ctx(self, options):
            asked.append(options)
            return made

    asked = []
    for given in ({}, {"ssl": {"ca": "a"}}, {"ssl_ca": "a"}, {"ssl_disabled": True}):
        Ours(defer_connect=True, **given)
    assert asked == [{}, {"ca": "a"}, {"ca": "a", "check_hostname": False, "verify_mode": False}]


@pytest.mark.parametrize("driver", ["asyncmy", "aiomysql"])
def test_asyncio_drivers_have_their_transport_in_an_attribute(mariadb_url, driver):
    async def work():
        engine = create_async_engine(mariadb_url.replace("pymysql", driver))
        async with engine.connect() as connection:
            held = (await connection.get_raw_connection()).driver_connection
            transport = line.transport_of(held)
            assert isinstance(transport, asyncio.WriteTransport)
            assert not transport.is_closing()
        await engine.dispose()
        assert transport.is_closing()

    asyncio.run(work())


@pytest.mark.parametrize("driver", ["asyncmy", "aiomysql"])
def test_asyncio_drivers_tell_what_was_received_and_not_read(mariadb_url, driver):
    """For aio.mysql.connection: of an idle connection nothing has been read ahead; of one whose query nobody reads, its
    answer has."""

    async def work():
        engine = create_async_engine(mariadb_url.replace("pymysql", driver))
        async with engine.connect() as connection:
            held = (await connection.get_raw_connection()).driver_connection
            assert getattr(held, "_reader", None) is not None or held._proto is not None
            assert not line._read_ahead(held)
            await held._execute_command(3, "SELECT 1")  # COM_QUERY
            while not line._read_ahead(held):
                await asyncio.sleep(0.001)
            await connection.invalidate()
        await engine.dispose()

    asyncio.run(work())


@pytest.mark.parametrize("driver", ["asyncmy", "aiomysql"])
def test_asyncio_cursors_tell_of_later_results_and_read_them_away(mariadb_url, driver):
    def read(connection):
        result = connection.exec_driver_sql("SELECT 1 AS a; SELECT 2 AS b")
        cursor, context = result.cursor, result.context
        assert cursor._cursor._result.has_next and hasattr(context, "_rowcount")
        results.read_later_results(cursor, "")
        assert not cursor._cursor._result.has_next
        assert list(result.keys()) == ["a"] and cursor.description[0][0] == "a" and result.all() == [(1,)]

    async def work():
        engine = create_async_engine(mariadb_url.replace("pymysql", driver), connect_args={"client_flag": 0x10000})
        async with engine.connect() as connection:
            await connection.run_sync(read)
        await engine.dispose()

    asyncio.run(work())


def test_asyncmys_cursors_are_opened_and_closed_without_leaving_the_greenlet(mariadb_url, monkeypatch):
    """SQLAlchemy awaits its cursor three times for a statement; what ours replaces of it is there."""
    left = []

    def await_(awaitable):
        left.append(awaitable.__qualname__)
        return await_only(awaitable)

    def read(connection):
        monkeypatch.setattr("sqlalchemy.connectors.asyncio.await_", await_)
        result = connection.exec_driver_sql("SELECT 1 AS a UNION SELECT 2")
        cursor = result.cursor
        driver, adapted = cursor._cursor, connection.connection.dbapi_connection
        assert cursor._connection is adapted._connection is adapted.driver_connection
        assert not adapted._execute_mutex.locked()
        assert result.all() == [(1,), (2,)] and driver.connection is None
        assert [each.rpartition(".")[2] for each in left] == ["_execute_async"]

    async def work():
        manager = SessionManager({"default": mariadb_url.replace("pymysql", "asyncmy")})
        async with manager.engine().connect() as connection:
            await connection.run_sync(read)
        await manager.dispose()

    asyncio.run(work())


def test_asyncio_tells_which_task_runs_in_a_loop():
    async def work():
        assert scope.task_in(asyncio.get_running_loop()) is asyncio.current_task()

    asyncio.run(work())


def test_pymysqls_result_says_whether_its_stream_is_at_its_end(mariadb_url):
    engine = create_engine(mariadb_url)
    raw = engine.raw_connection()
    with raw.cursor(pymysql.cursors.SSCursor) as cursor:
        cursor.execute("SELECT 1")
        result = raw.dbapi_connection._result
        assert result is cursor._result and result.unbuffered_active is True and result.has_next is None
        assert result._read_rowdata_packet_unbuffered() == (1,)
        result._finish_unbuffered_query()
        assert result.unbuffered_active is False and not result.has_next
    raw.close()
    engine.dispose()


def test_pymysqls_result_reads_columns_and_rows_by_methods_that_ours_override(mariadb_url):
    """And a connection has its decoders, by column type, where green.mysql.columns looks for them."""
    called = []

    class Noting(pymysql.connections.MySQLResult):
        def _get_descriptions(self):
            called.append(self.field_count)
            super()._get_descriptions()
            assert self.description and [field.type_code for field in self.fields] == [3]
            assert self.converters == [("ascii", int)]

        def _read_row_from_packet(self, packet):
            called.append(packet)
            return super()._read_row_from_packet(packet)

        def _read_rowdata_packet(self):
            super()._read_rowdata_packet()
            assert self.rows == ((1,),) and self.affected_rows == 1 and self.connection is None

    engine = create_engine(mariadb_url)
    raw = engine.raw_connection()
    driver = raw.dbapi_connection
    assert driver.decoders[3] is int and driver.use_unicode and driver.encoding == "utf8" and driver._next_seq_id >= 0
    driver._execute_command(3, "SELECT 1")  # COM_QUERY
    Noting(driver).read()
    assert len(called) == 2 and called[0] == 1
    raw.close()
    engine.dispose()


def test_asyncmys_parser_reads_rows_as_pymysql_does():
    """A function that is not documented: where it is gone or another, rows are read in Python."""
    parser.compiled.cache_clear()
    assert parser.compiled() is not None


@pytest.mark.parametrize("name", ["protocol.parse_rows_from_buffer", "converters.convert_date", "errors.InternalError"])
def test_asyncmys_parser_is_left_out_when_it_is_gone_or_reads_something_else(monkeypatch, name):
    module, _, attribute = name.partition(".")
    module = importlib.import_module(f"asyncmy.{module}")
    with monkeypatch.context() as patched:
        patched.delattr(module, attribute)
        parser.compiled.cache_clear()
        assert parser.compiled() is None
    other = {"parse_rows_from_buffer": lambda *_: (0, 0), "convert_date": bytes.decode, "InternalError": ValueError}
    with monkeypatch.context() as patched:
        patched.setattr(module, attribute, other[attribute])
        parser.compiled.cache_clear()
        assert (parser.compiled() is None) is (attribute != "InternalError")
    parser.compiled.cache_clear()


def test_sqlalchemy_record_without_its_connection_is_not_reset_when_collected(tmp_path):
    """What fork.abandon() does to a record must be enough to keep SQLAlchemy's finalizer off the connection."""
    engine = create_engine(f"sqlite:///{tmp_path}/a.db")
    connection = engine.connect()
    connection.execute(text("SELECT 1"))
    fairy = connection.connection
    driver, record = fairy.dbapi_connection, fairy._connection_record
    rolled_back = []
    engine.dialect.do_rollback = rolled_back.append
    record.dbapi_connection = None
    del connection, fairy
    import gc

    gc.collect()
    assert rolled_back == []
    driver.close()
    engine.dispose()


def test_sqlalchemys_pool_calls_what_ours_overrides_and_has_what_ours_copies():
    """FairPool overrides the first two, calls the third, and hands the rest on in recreate()."""
    pool = QueuePool(object)
    for name in ("_do_get", "_do_return_conn", "_create_connection"):
        assert callable(getattr(QueuePool, name))
    for name in ("_creator", "_pre_ping", "_recycle", "_orig_logging_name", "_reset_on_return", "_dialect"):
        assert hasattr(pool, name), name
    assert pool._max_overflow == 10  # read by watch.check.probe, as are _recycle and _pre_ping


def test_pymysql_sends_and_reads_through_what_our_connection_overrides():
    """mysql.connection.Connection: every byte and every answer must go through these, with these arguments."""
    stock = pymysql.connections.Connection
    taken = {
        "_execute_command": ["self", "command", "sql"],
        "_write_bytes": ["self", "data"],
        "_read_bytes": ["self", "num_bytes"],
        "_read_packet": ["self", "packet_type"],
        "_read_query_result": ["self", "unbuffered"],
        "_read_ok_packet": ["self"],
        "_force_close": ["self"],
        "connect": ["self", "sock"],
    }
    for name, arguments in taken.items():
        assert list(inspect.signature(getattr(stock, name)).parameters) == arguments, name
    results = "_check_packet_is_eof", "_finish_unbuffered_query", "_read_ok_packet", "init_unbuffered_query", "read"
    for name in (*results, "__del__"):
        assert name in vars(pymysql.connections.MySQLResult), name
    source = inspect.getsource(stock)
    for used in ("_read_timeout", "_write_timeout", "_current_timeout", "_rfile", "_sock", "_result"):
        assert f"self.{used} = " in source, used
    assert source.count(".sendall(") == 1 and source.count("_rfile.read(") == 1
    # mysql.wire.Wire._read_packet() does what this does, for packets that came whole.
    packets = inspect.getsource(stock._read_packet)
    assert "self._next_seq_id = (self._next_seq_id + 1) % 256" in packets and "packet_type(" in packets
    assert "_read_packet(FieldDescriptorPacket)" in inspect.getsource(pymysql.connections.MySQLResult._get_descriptions)


def test_sqlalchemys_pool_replaces_what_was_opened_before_its_invalidate_time():
    engine = create_engine("sqlite://", poolclass=QueuePool)
    with engine.connect() as connection:
        first, record = connection.connection.dbapi_connection, connection.connection._connection_record
    assert engine.pool._invalidate_time == 0
    for opened_s, replaced in ((record.starttime, False), (record.starttime + 0.001, True)):
        engine.pool._invalidate_time = opened_s
        with engine.connect() as connection:
            assert (connection.connection.dbapi_connection is not first) is replaced
    engine.dispose()


@pytest.mark.parametrize("poolclass", [None, QueuePool])
def test_sqlalchemys_pool_opens_a_connection_for_no_record_as_for_one_of_its_own(tmp_path, poolclass):
    engine = create_engine(f"sqlite:///{tmp_path}/a.db", poolclass=poolclass)
    asked = []
    event.listen(engine, "do_connect", lambda dialect, record, args, arguments: asked.append(record))
    connection = engine.pool._invoke_creator(None)
    assert connection.execute("SELECT 7").fetchone() == (7,) and asked == [None]
    connection.close()


def test_pymysql_reads_the_servers_greeting_by_a_method_of_its_own(mariadb_url):
    arguments = make_url(mariadb_url).translate_connect_args(username="user")

    class Ours(pymysql.connections.Connection):
        def _get_server_information(self):
            super()._get_server_information()
            greeted.append(self.server_version)

    greeted = []
    Ours(**arguments).close()
    assert len(greeted) == 1


def test_sqlalchemys_session_keeps_whether_it_was_closed_where_ours_says_it_too():
    """ManagedSession.close() of an untouched session sets what Session.close() would set, and nothing else."""
    from sqlalchemy.orm import Session
    from sqlalchemy.orm.session import _SessionCloseState

    session = Session(close_resets_only=False)
    before = dict(vars(session))
    assert session._close_state is _SessionCloseState.ACTIVE
    session.close()
    assert session._close_state is _SessionCloseState.CLOSED
    assert Session()._close_state is _SessionCloseState.CLOSE_IS_RESET
    changed = {
        name for name, value in vars(session).items() if name != "identity_map" and value != before.get(name, value)
    }
    assert changed == {"_close_state"} and not len(session.identity_map)


def test_asyncios_task_keeps_its_exception_where_reading_it_retrieves_nothing():
    async def fails():
        raise LookupError

    async def main():
        task = asyncio.create_task(fails())
        await asyncio.wait([task])
        assert isinstance(task._exception, LookupError) and task._log_traceback
        task.exception()

    asyncio.run(main())


def test_sqlalchemys_session_says_whether_a_flush_would_do_anything():
    from sqlalchemy.orm import Session, registry

    class Thing:
        pass

    mapped = registry()
    mapped.map_imperatively(Thing, Table("thing", mapped.metadata, Column("id", Integer, primary_key=True)))
    session, thing = Session(), Thing()
    assert session._is_clean()
    session.add(thing)
    assert not session._is_clean()
    session.expunge(thing)
    assert session._is_clean()
    mapped.dispose()


def test_sqlalchemys_async_scoped_session_asks_proxied_for_the_session_of_each_method():
    """aio's AsyncScopedSession._proxied gives it with a call less than SQLAlchemy's own."""
    from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_sessionmaker

    assert isinstance(inspect.getattr_static(async_scoped_session, "_proxied"), property)
    session = AsyncSession()

    class Proxy(async_scoped_session):
        _proxied = session

    proxy = Proxy(async_sessionmaker(), scopefunc=pytest.fail)
    proxy.autoflush = False
    assert session.sync_session.autoflush is False
    assert proxy.info is session.info and proxy.is_active
    asyncio.run(proxy.rollback())


def test_sqlalchemy_keeps_its_live_sessions_in_a_mapping_of_weak_references(tmp_path):
    """core.snapshot reads it without waiting, whatever other threads do: `valuerefs()` copies in one step."""
    import weakref

    from sqlalchemy.orm import Session
    from sqlalchemy.orm.session import _sessions

    assert type(_sessions) is weakref.WeakValueDictionary
    session = Session()
    assert session in [reference() for reference in _sessions.valuerefs()]


def test_gevent_knows_the_number_of_the_main_thread():
    """ident.name_of: what `threading` says of it in a patched process is a greenlet's number."""
    run_python(
        """
        import _thread
        number = _thread.get_ident()
        from gevent import monkey
        monkey.patch_all()
        import gevent.hub
        assert gevent.hub.MAIN_THREAD_IDENT == number == monkey.get_original("_thread", "get_ident")()
        """
    )


def test_sqlalchemys_generated_frames_say_whose_they_are():
    """`<sqlalchemy generated ... for sqlalchemy.orm.session...>` is; "<string>" might be anybody's."""
    from sqlalchemy.orm.session import SessionTransaction

    file = SessionTransaction._connection_for_bind.__code__.co_filename
    assert file.startswith("<sqlalchemy generated") and "sqlalchemy.orm.session" in file


def test_greenlet_spawns_coroutine_refers_to_the_greenlet_that_it_waits_for():
    """aio.holders finds there where a run_sync() function is."""
    import asyncio
    import gc

    import greenlet
    from sqlalchemy.util import await_, greenlet_spawn

    async def main():
        waiting = greenlet_spawn(lambda: inside.append(greenlet.getcurrent()) or await_(asyncio.sleep(0)))
        task = asyncio.ensure_future(waiting)
        await asyncio.sleep(0)
        assert [each for each in gc.get_referents(waiting) if isinstance(each, greenlet.greenlet)] == inside
        await task

    inside = []
    asyncio.run(main())


def test_prometheus_histogram_keeps_one_value_for_each_bucket_and_the_sum():
    """What watch.metrics adds to: each bucket's own count, not yet added up."""
    registry = CollectorRegistry()
    metric = Histogram("h", "text", ("database",), registry=registry, buckets=(1.0, 2.0))
    metric.labels("a").observe(1.5)
    child = metric.labels("a")
    assert [bucket.get() for bucket in child._buckets] == [0, 1, 0]
    for bucket, count in zip(child._buckets, (5, 6, 7), strict=True):
        bucket.inc(count)
    child._sum.inc(100.0)
    below = [registry.get_sample_value("h_bucket", {"database": "a", "le": le}) for le in ("1.0", "2.0", "+Inf")]
    assert below == [5, 12, 19]
    assert registry.get_sample_value("h_sum", {"database": "a"}) == 101.5


def test_sqlalchemys_asyncio_pool_is_a_queue_pool_and_makes_nothing_of_a_loop_until_it_waits():
    """aio.pool.FairPool overrides and copies what pool.FairPool does, and may be made where no loop runs."""
    from sqlalchemy.pool import AsyncAdaptedQueuePool

    assert issubclass(AsyncAdaptedQueuePool, QueuePool) and AsyncAdaptedQueuePool._is_asyncio
    for name in ("_do_get", "_do_return_conn", "_create_connection", "recreate", "status"):
        assert getattr(AsyncAdaptedQueuePool, name) is getattr(QueuePool, name), name
    pool = AsyncAdaptedQueuePool(object, timeout=None)
    assert pool._timeout is None and pool._dialect.is_async


def test_sqlalchemy_checks_a_record_in_that_has_no_proxy_any_more():
    """aio.connections finishes a checkin that a cancellation has ended in the middle."""
    pool = QueuePool(lambda: types.SimpleNamespace(rollback=bool, close=bool), pool_size=1, max_overflow=0)
    proxied = pool.connect()
    proxied._finalizer.detach()
    record = proxied._connection_record
    record.fairy_ref = None
    record.checkin(_fairy_was_created=False)
    assert pool.checkedout() == 0


def test_sqlalchemy_tells_whether_something_can_be_awaited_here():
    """aio.pool asks it before a connection is given out, or closed in peace."""
    import asyncio

    from sqlalchemy.util import await_, greenlet_spawn
    from sqlalchemy.util.concurrency import in_greenlet

    def inside():
        return in_greenlet(), await_(asyncio.sleep(0, "awaited"))

    async def main():
        assert not in_greenlet()
        return await greenlet_spawn(inside)

    assert asyncio.run(main()) == (True, "awaited") and not in_greenlet()


@pytest.mark.parametrize("driver", ["asyncmy", "aiomysql"])
def test_asyncio_drivers_send_each_command_by_one_method(driver, mariadb_url):
    async def main():
        engine = create_async_engine(mariadb_url.replace("pymysql", driver))
        async with engine.connect() as connection:
            stock = (await connection.get_raw_connection()).driver_connection
            commands = []

            class Watched(type(stock)):
                def _execute_command(self, number, sql):
                    commands.append((number, sql))
                    return super()._execute_command(number, sql)

            stock.__class__ = Watched
            async with stock.cursor() as cursor:
                await cursor.execute("SELECT 1")
            await stock.commit()
            await stock.rollback()
            await stock.ping()
            await stock._send_autocommit_mode()
            assert [number for number, _ in commands] == [3, 3, 3, 14, 3]
            assert commands[0][1] == b"SELECT 1" and commands[1][1] == "COMMIT" and commands[4][1].startswith("SET")
        await engine.dispose()

    asyncio.run(main())


def test_pymysql_sends_each_command_by_one_method(mariadb_url):
    engine = create_engine(mariadb_url)
    with engine.connect() as connection:
        driver = connection.connection.dbapi_connection
        commands = []
        stock = driver._execute_command
        driver._execute_command = lambda number, sql: (commands.append(number), stock(number, sql))
        with driver.cursor() as cursor:
            cursor.execute("SELECT 1")
        driver.commit()
        driver.rollback()
        driver.select_db(engine.url.database)
        driver.ping()
        driver._send_autocommit_mode()
        del driver._execute_command
        assert commands == [3, 3, 3, 2, 14, 3]
    engine.dispose()


def test_psycopg_runs_a_statement_by_the_generators_that_ours_override(postgresql_url):
    """core/backends/psycopg and psycopg_cursors: what is sent goes through these, in this order."""
    import psycopg
    from psycopg import errors
    from psycopg._preparing import Prepare

    from dbsession.core.backends import psycopg_cursors

    called = []

    def noted(cls, name):
        stock = getattr(cls, name)

        def method(self, *args, **kwargs):
            called.append(name)
            return stock(self, *args, **kwargs)

        return method

    of_connection = ("_start_query", "_exec_command", "_get_tx_start_command", "_commit_gen", "_rollback_gen")
    of_cursor = (
        "_execute_gen",
        "_maybe_prepare_gen",
        "_get_prepared",
        "_execute_send",
        "_check_results",
        "_set_results",
    )
    Watched = type("Watched", (psycopg.Connection,), {name: noted(psycopg.Connection, name) for name in of_connection})
    WatchedCursor = type("WatchedCursor", (psycopg.Cursor,), {name: noted(psycopg.Cursor, name) for name in of_cursor})
    url = make_url(postgresql_url)
    arguments = {"host": url.host, "port": url.port, "user": url.username, "password": url.password}
    with Watched.connect(**arguments, dbname=url.database, cursor_factory=WatchedCursor) as connection:
        connecting = Watched._connect_gen(psycopg.conninfo.make_conninfo(**arguments))
        assert [type(each) for each in next(connecting)] == [int, psycopg.waiting.Wait]
        connecting.close()
        connection.execute("SELECT %s", (1,))
        assert called == [
            *("_execute_gen", "_start_query", "_exec_command", "_get_tx_start_command", "_maybe_prepare_gen"),
            *("_get_prepared", "_execute_send", "_check_results", "_set_results"),
        ] or called == [
            *("_execute_gen", "_start_query", "_get_tx_start_command", "_exec_command", "_maybe_prepare_gen"),
            *("_get_prepared", "_execute_send", "_check_results", "_set_results"),
        ]
        called.clear()
        connection.commit()
        connection.rollback()
        assert called == ["_commit_gen", "_exec_command", "_rollback_gen"]
        assert (connection._autocommit, connection._tpc, connection._num_transactions) == (False, None, 0)
        assert connection._pipeline is None and connection._notify_handlers == []
        assert len(connection._notifies_backlog) == 0 and connection._adapters is connection.adapters
        prepared = connection._prepared
        assert len(prepared._to_flush) == 0 and prepared.clear() is False
        assert list(inspect.signature(prepared.validate).parameters) == ["key", "prep", "name", "results"]
        assert list(inspect.signature(prepared.maybe_add_to_cache).parameters) == ["query", "prep", "name"]
        with connection.cursor("named") as cursor:
            cursor.execute("SELECT 1")
            assert connection.wait(cursor._fetch_gen(1)) == [(1,)]
        connection.rollback()
        with pytest.raises(errors._WaitTimeout):
            connection.wait(psycopg.generators.notifies(connection.pgconn), timeout=0.001)
        assert list(inspect.signature(connection._tpc_finish_gen).parameters) == ["action", "xid"]
        assert callable(cursor._send_query_prepared)
        steps = ("_executemany_gen_pipeline", "_executemany_gen_no_pipeline", "_stream_send_gen", "_start_copy_gen")
        assert all(inspect.isgeneratorfunction(getattr(psycopg.Cursor, name)) for name in steps)
        assert inspect.isgeneratorfunction(psycopg.ServerCursor._declare_gen)
        connection.execute("SELECT 2", prepare=True)
        assert cursor._query.query.startswith(b"DECLARE") and [text for text, _ in prepared._names] == [b"SELECT 2"]
        names = ("_autocommit", "_isolation_level", "_read_only", "_deferrable", "_begin_statement", "_notice_handlers")
        assert all(name in vars(connection) for name in names)  # which psycopg_attributes gives back
    assert Prepare.SHOULD == psycopg_cursors._PREPARE_NOW


def test_psycopg_gives_up_a_pipeline_whose_connection_is_closed(postgresql_url):
    """core/backends/psycopg: it leaves the pipeline mode of `pgconn` unless that is BAD, and reads what is queued."""
    import psycopg
    from psycopg._pipeline_base import BasePipeline

    names = set(BasePipeline._exit.__code__.co_names) | set(BasePipeline._fetch_gen.__code__.co_names)
    assert {"pgconn", "status", "exit_pipeline_mode", "result_queue"} <= names
    assert inspect.iscoroutinefunction(psycopg.AsyncConnection._try_cancel)
    assert "_try_cancel" in psycopg.AsyncCursor.stream.__code__.co_names
    with psycopg.connect(postgresql_url.replace("+psycopg", "")) as connection:
        assert connection._closed is False


def test_asyncpg_asks_for_the_end_of_a_statement_by_the_method_that_ours_overrides(postgresql_url):
    """aio/postgresql/asyncpg_connection: where a task of its own would do it."""
    import asyncpg

    asked = []

    class Watched(asyncpg.Connection):
        def _cancel_current_command(self, *waiters):
            asked.append((waiters, list(inspect.signature(self._cancel).parameters)))
            assert self._cancellations == set()
            super()._cancel_current_command(*waiters)

    async def main():
        connection = await asyncpg.connect(postgresql_url.replace("+psycopg", ""), connection_class=Watched)
        with pytest.raises(TimeoutError):
            await connection.execute("SELECT pg_sleep(60)", timeout=0.05)
        (waiters, parameters) = asked.pop()
        assert parameters == ["waiter", "cancel_waiter"][: len(waiters)] and not asked
        await connection.close()

    asyncio.run(main())


def test_sqlalchemy_uses_asyncpg_by_the_methods_that_ours_override():
    """aio/postgresql/asyncpg_adapted and asyncpg_cursors: what waits there."""
    from sqlalchemy.dialects.postgresql import asyncpg, psycopg

    connection, cursor = asyncpg.AsyncAdapt_asyncpg_connection, asyncpg.AsyncAdapt_asyncpg_cursor
    assert "_transaction" in connection.__slots__
    assert connection._cursor_cls is cursor and issubclass(connection._ss_cursor_cls, cursor)
    assert {"_transaction", "_call_and_discard"} <= set(connection.commit.__code__.co_names)
    assert inspect.iscoroutinefunction(connection._call_and_discard)
    assert list(inspect.signature(connection._handle_exception).parameters) == ["self", "error"]
    assert "_prepare_and_execute" in cursor.execute.__code__.co_names
    assert "_executemany" in cursor.executemany.__code__.co_names
    stream = asyncpg.AsyncAdapt_asyncpg_ss_cursor
    for fetch in (stream._buffer_rows, stream.fetchmany, stream._all):
        assert {"_cursor", "fetch"} <= set(fetch.__code__.co_names)
    assert psycopg.AsyncAdapt_psycopg_cursor._aenter_cursor is not None
