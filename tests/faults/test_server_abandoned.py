"""F14: a statement that nobody waits for any more is ended at the server, its locks with it; never anybody else's."""

from __future__ import annotations

import pytest

from support.proxy import Proxy
from support.servers import on

ENDED = """
    import gevent, logging, time

    class Boom(Exception):
        pass

    warnings = []
    class Keep(logging.Handler):
        def emit(self, record):
            warnings.append(record.getMessage())
    logging.getLogger("dbsession").addHandler(Keep(level="WARNING"))

    def gone(id):
        wait_until(lambda: id not in server.ids(), 20, "the statement is ended")  # it would run for 50 s

    def late():
        "The error of a statement that takes too long, and its connection's number."
        with dbsession.session_scope():
            id = session.scalar(text(f"SELECT {db.who}"))
            try:
                session.execute(text(f"SELECT {db.sleep(50)}"))
            except exc.SQLAlchemyError as error:
                return error, id

    def killed(before, count):
        "Whether so many kills, and no more, have reached the server since."
        wait_until(lambda: server.kills() >= before + count, 20)
        return server.kills() == before + count
"""


@on("mariadb", "postgresql", slow=("mariadb_resolving",))
def test_f14_statement_and_row_locks_are_gone_when_its_greenlet_is_killed(with_server):
    with_server(
        ENDED
        + """
    configure()
    request("CREATE TABLE t (id INT PRIMARY KEY, n INT)", commit=True)
    request("INSERT INTO t VALUES (1, 0), (2, 0)", commit=True)
    before = server.kills()
    bystander = spawn(request, f"SELECT 'bystander', {db.sleep(50)}")
    bystanders_id = running("bystander")

    def victim(statement):
        with dbsession.session_scope():
            session.execute(text("UPDATE t SET n = n + 1 WHERE id = 1"))
            session.execute(text(statement))

    task = spawn(victim, f"SELECT {db.sleep(51)}")
    id = running(db.sleep(51))
    waiting = spawn(request, "UPDATE t SET n = n + 100 WHERE id = 1")
    id_waiting = running("n + 100")
    waiting.handle.kill()  # in a lock wait
    gone(id_waiting)
    assert id in server.ids()
    task.handle.kill()
    gone(id)
    assert request("UPDATE t SET n = n + 10 WHERE id = 1", commit=True) is None
    assert request("SELECT n FROM t WHERE id = 1") == 10

    tasks = [spawn(request, f"SELECT {db.sleep(60 + k)}") for k in range(10)]
    ids = {running(db.sleep(60 + k)) for k in range(10)}
    gevent.killall([task.handle for task in tasks])
    wait_until(lambda: not ids & server.ids(), 20)
    assert killed(before, 12) and not warnings, warnings
    assert bystanders_id in server.ids()
    bystander.handle.kill()
    nothing_in_use()
    """
    )


def test_f14_statement_is_ended_when_a_timeout_ends_it(with_server):
    """The database's own timeout, gevent's as it is and with an exception of the user's; with AUTOCOMMIT the statement
    is not applied afterwards."""
    with_server(
        ENDED
        + """
    configure(options={"isolation_level": "AUTOCOMMIT"})
    request("CREATE TABLE t (n INT)", commit=True)
    request("INSERT INTO t VALUES (0)")
    before = server.kills()
    ids = {}
    def work(k, bound):
        with dbsession.session_scope():
            ids[k] = session.scalar(text(f"SELECT {db.who}"))
            with bound():
                session.execute(text(f"UPDATE t SET n = n + 1 WHERE {k} + {db.sleep(50)} = 0"))
    bounds = (lambda: gevent.Timeout(1), lambda: gevent.Timeout(1, Boom), lambda: gevent.Timeout(1, TimeoutError))
    tasks = [spawn(work, k, bound) for k, bound in enumerate(bounds)]
    for k, (task, expected) in enumerate(zip(tasks, (gevent.Timeout, Boom, TimeoutError))):
        try:
            join(task)
        except expected:
            gone(ids[k])
        else:
            raise AssertionError("the exception is swallowed")
    nothing_in_use()
    configure(read_timeout_s=3)
    lost, id = late()
    assert db.is_lost(lost), lost
    gone(id)
    assert request("SELECT n FROM t") == 0
    assert killed(before, 4) and not warnings, warnings
    """
    )


@pytest.mark.slow
def test_f14_statement_is_ended_when_a_timeout_ends_it_in_a_thread(with_server):
    with_server(
        ENDED
        + """
    configure(read_timeout_s=3)
    lost, id = join(spawn(late))[0]
    assert db.is_lost(lost), lost
    gone(id)
    nothing_in_use()
    """,
        mode="threads",
    )


@pytest.mark.slow
def test_f14_nothing_is_killed_when_kill_abandoned_is_off(with_server):
    with_server(
        ENDED
        + """
    configure(kill_abandoned=False)
    before = server.kills()
    task = spawn(request, f"SELECT {db.sleep(4)}")
    id = running(db.sleep(4))
    task.handle.kill()
    nothing_in_use()
    gone(id)  # by itself
    assert killed(before, 0) and not warnings, warnings
    """
    )


def test_f14_statement_is_ended_behind_a_proxy(server, server_url, with_server):
    """The ports that the server shows are the proxy's: each connection of MariaDB asks for its own as it is opened."""
    with Proxy(server.port) as proxy:
        with_server(
            ENDED
            + """
    configure()
    before = server.kills()
    for k in range(3):
        task = spawn(request, f"SELECT {k}, {db.sleep(40)}")
        id = running(f"SELECT {k}, {db.sleep(40)}")
        task.handle.kill()
        nothing_in_use()
        gone(id)
    assert killed(before, 3) and not warnings, warnings
    """,
            url=server_url.replace(f":{server.port}/", f":{proxy.port}/"),
        )


@on("mariadb")  # PostgreSQL tells each connection at its beginning what cancels its statements
def test_f14_nothing_is_said_of_a_kill_while_a_connection_asks_how_it_is_shown(with_server):
    """What is not known yet is no reason to say, once, that statements are not ended."""
    with_server(
        ENDED
        + """
    from dbsession.green.mysql import kill

    asked = kill.OWN_THREAD
    kill.OWN_THREAD = "SELECT 'asking', SLEEP(3)"
    configure()
    task = spawn(request)
    running("'asking'")
    task.handle.kill()
    nothing_in_use()
    assert not warnings, warnings

    kill.OWN_THREAD = asked
    task = spawn(request, "SELECT 'victim', SLEEP(50)")
    id = running("'victim'")
    task.handle.kill()
    gone(id)
    assert not warnings, warnings
    """
    )


@on("mariadb")  # a cancellation of PostgreSQL's has a secret beside its number
def test_f14_nobody_elses_thread_is_killed_when_the_number_is_anothers(with_server):
    """As behind a balancer, which puts the side connection on another server: there our number is someone else's."""
    with_server(
        ENDED
        + """
    configure()
    other = spawn(request, "SELECT 'other', SLEEP(50)")
    others_id = running("'other'")
    def victim():
        with dbsession.session_scope():
            session.connection().connection.dbapi_connection.server_thread_id = (others_id,)
            session.execute(text("SELECT 'victim', SLEEP(20)"))
    before = server.kills()
    task = spawn(victim)
    running("'victim'")
    task.handle.kill()
    wait_until(lambda: warnings, 20)
    assert others_id in server.ids()
    assert killed(before, 0) and len(warnings) == 1 and "another client" in warnings[0], warnings
    other.handle.kill()
    gone(others_id)
    nothing_in_use()
    """
    )


def test_f14_nobody_waits_for_the_killing_when_the_server_is_silent(with_server):
    with_server(
        ENDED
        + """
    configure(connect_timeout_s=10)
    tasks = [spawn(request, f"SELECT {db.sleep(8 + k)}") for k in range(3)]
    ids = {running(db.sleep(8 + k)) for k in range(3)}
    server.pause()
    gevent.killall([task.handle for task in tasks], timeout=5)
    assert all(task.handle.dead for task in tasks)
    nothing_in_use()
    server.resume()
    connect_within(60)
    wait_until(lambda: not ids & server.ids(), 20, "ended by us or by themselves")
    assert concurrently(request) == [1] * 20
    """
    )


@pytest.mark.slow
def test_f14_threadpool_jobs_do_not_wedge_the_pool_or_the_killing(with_server):
    """A job's hub does not run on when the job is over: nothing of ours may wait in it."""
    with_server(
        """
        import gevent, gevent.threadpool
        configure(options={"pool_size": 2, "pool_timeout": 10}, reset="connection")
        engine = dbsession.get_engine()
        def job(n):
            with dbsession.session_scope():
                return session.scalar(text(f"SELECT {n}"))
        def abandoned():
            with dbsession.session_scope():
                session.execute(text(f"SELECT {db.sleep(30)}"))
        def killed_job():
            try:
                with gevent.Timeout(0.3):
                    abandoned()
            except gevent.Timeout:
                return "ended"
        pool = gevent.threadpool.ThreadPool(1)
        assert [pool.spawn(job, n).get() for n in range(5)] == list(range(5))
        assert gevent.spawn(job, 6).get() == 6
        assert pool.spawn(killed_job).get() == "ended"
        assert gevent.spawn(job, 7).get() == 7
        def sleeping():
            return [each["id"] for each in server.processlist() if db.sleep(30) in (each["info"] or "")]
        wait_until(lambda: not sleeping(), 10)
        victim = gevent.spawn(abandoned)
        running(db.sleep(30))
        victim.kill()
        wait_until(lambda: not sleeping(), 10)
        wait_until(lambda: engine.pool.checkedout() == 0 and not engine.pool._being_cleaned, 10)

        # The threads of ours that end the statements leave none of their hubs' descriptors behind.
        import os
        from dbsession.green import abandoned as ended
        def open_files():
            wait_until(lambda: not ended.pending(), 10)
            return len(os.listdir("/proc/self/fd"))
        before = open_files()
        for _ in range(10):
            assert pool.spawn(killed_job).get() == "ended"
        wait_until(lambda: open_files() <= before + 3, 10)
        """
    )
