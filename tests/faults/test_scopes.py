"""F1, F2, F5, F6, F10, F12, F17: which session a caller gets, and when it ends. Each script knows only the public
contract and runs in a process of its own: gevent patched before the import, after it, and not at all."""

from __future__ import annotations

import pytest

from support.processes import run_python, run_script


def test_f01_new_greenlet_never_inherits_a_session(mode, tmp_path):
    """A thousand greenlets one after another, whose idents' addresses are reused at once."""
    run_script(
        mode,
        """
        import gc, sys
        gc.disable()
        dbsession.configure({"default": f"sqlite:///{sys.argv[1]}/a.db"})
        session = dbsession.get_dbsession()
        def use(n):
            inherited = session.info.get("owner")
            session.info["owner"] = n
            return inherited
        assert [join(spawn(use, n)) for n in range(1000)] == [[None]] * 1000
        wait_until(lambda: checked_out(dbsession.get_engine()) == 0, 20)
        """,
        tmp_path,
    )


def test_f02_concurrent_idents_have_a_session_each(mode, tmp_path):
    run_script(
        mode,
        """
        import sys, threading
        from sqlalchemy import text
        dbsession.configure({"default": f"sqlite:///{sys.argv[1]}/a.db"})
        session = dbsession.get_dbsession()
        barrier = threading.Barrier(15)
        def use():
            session.execute(text("SELECT 1"))
            mine = session()
            barrier.wait(20)
            assert session() is mine
            return mine
        assert len(set(map(id, join([spawn(use) for _ in range(15)])))) == 15
        """,
        tmp_path,
    )


def test_f06_request_starts_with_a_new_scope_whatever_the_last_one_left(mode, tmp_path):
    """Teardown skipped once on a keep-alive ident: the server never closed a streamed body."""
    run_script(
        mode,
        """
        import logging, sys
        from sqlalchemy import text
        dbsession.configure({"default": f"sqlite:///{sys.argv[1]}/a.db"})
        session = dbsession.get_dbsession()
        with dbsession.session_scope():
            session.execute(text("CREATE TABLE t (n INTEGER)"))
            session.commit()
        def app(environ, start_response):
            start_response("200 OK", [])
            if environ["PATH_INFO"] == "/first":
                session.execute(text("INSERT INTO t VALUES (7)"))
                return iter([b"x"])
            rows = session.execute(text("SELECT n FROM t")).all()
            session.commit()
            return [repr(rows).encode()]
        application = dbsession.DBSessionMiddleware(app)
        messages = []
        handler = logging.Handler()
        handler.emit = lambda record: messages.append((record.levelname, record.getMessage()))
        logging.getLogger("dbsession").addHandler(handler)
        def keep_alive():
            left = application({"REQUEST_METHOD": "GET", "PATH_INFO": "/first"}, lambda *_: None)
            assert list(left) == [b"x"]
            answer = application({"REQUEST_METHOD": "GET", "PATH_INFO": "/second"}, lambda *_: None)
            left.close()
            return answer
        assert join(spawn(keep_alive)) == [[b"[]"]]
        assert len(messages) == 1 and messages[0][0] == "WARNING" and "GET /first" in messages[0][1], messages
        assert checked_out(dbsession.get_engine()) == 0
        """,
        tmp_path,
    )


def test_f10_uncleared_idents_give_their_connections_back(mode, tmp_path):
    """A thousand that never clear over a pool of two, without garbage collection; nobody times out."""
    run_script(
        mode,
        """
        import gc, sys
        from sqlalchemy import text
        gc.disable()
        dbsession.configure({"default": {"url": f"sqlite:///{sys.argv[1]}/a.db",
                                         "options": {"pool_size": 2, "pool_timeout": 50}}})
        session = dbsession.get_dbsession()
        total = 1000 if MODE != "threads" else 300
        kept = []
        def use():
            session.execute(text("SELECT 1"))
        for _ in range(total // 50):
            batch = [spawn(use) for _ in range(50)]
            join(batch)
            kept.append(batch)                    # still referenced: no destructor may be what saves us
        wait_until(lambda: checked_out(dbsession.get_engine()) == 0, 20)
        """,
        tmp_path,
    )


def test_f10_gevent_greenlet_starts_closing_within_one_pass_of_the_loop(tmp_path):
    run_python(
        """
        import gc, sys
        import gevent, dbsession
        from sqlalchemy import text
        gc.disable()
        dbsession.configure({"default": f"sqlite:///{sys.argv[1]}/a.db"})
        engine = dbsession.get_engine()
        jobs = [gevent.spawn(lambda: dbsession.get_dbsession().execute(text("SELECT 1"))) for _ in range(10)]
        gevent.joinall(jobs)
        assert engine.pool.checkedout() == 10
        gevent.sleep(0)                           # the links run
        gevent.sleep(0)                           # the closing greenlets they started run
        assert engine.pool.checkedout() == 0
        """,
        tmp_path,
    )


@pytest.mark.parametrize("referenced", [False, True], ids=["dropped", "still referenced"])
def test_f10_raw_greenlets_give_their_connections_back(referenced, tmp_path):
    """One that nobody references any more at once; a dead one that is still referenced before the next caller waits."""
    run_python(
        """
        import gc, sys
        import gevent, greenlet, dbsession
        from sqlalchemy import text
        gc.disable()
        dbsession.configure({"default": {"url": f"sqlite:///{sys.argv[1]}/a.db",
                                         "options": {"pool_size": 2, "pool_timeout": 5}}})
        session, kept = dbsession.get_dbsession(), []
        def use():
            session.execute(text("SELECT 1"))
        gevent.sleep(0)                           # there is a hub
        for n in range(20):
            raw = greenlet.greenlet(use)
            raw.switch()
            assert raw.dead
            if sys.argv[2] == "True":
                kept.append(raw)
            else:
                del raw
                gevent.sleep(0)
                gevent.sleep(0)
                assert dbsession.get_engine().pool.checkedout() == 0, n
        use()                                     # would wait 5 s and fail
        """,
        tmp_path,
        referenced,
    )


def test_f10_raw_greenlets_are_closed_in_a_thread_when_there_is_no_hub(tmp_path):
    run_python(
        """
        import gc, sys
        import greenlet, dbsession
        from sqlalchemy import text
        from support.waiting import wait_until
        gc.disable()
        dbsession.configure({"default": f"sqlite:///{sys.argv[1]}/a.db"})
        for _ in range(5):
            greenlet.greenlet(lambda: dbsession.get_dbsession().execute(text("SELECT 1"))).switch()
        wait_until(lambda: dbsession.get_engine().pool.checkedout() == 0, 20)
        """,
        tmp_path,
    )


@pytest.mark.parametrize("patched", [False, True])
def test_f10_native_thread_gives_its_connection_back(patched, tmp_path):
    """A thread that gevent knows nothing of, in a patched process too, where the hub is busy waiting elsewhere."""
    run_python(
        """
        import sys
        if sys.argv[2] == "True":
            from gevent import monkey; monkey.patch_all()
        import gc, time
        import gevent, dbsession
        from gevent._hub_local import get_hub_if_exists
        from gevent.monkey import get_original
        from sqlalchemy import text
        from support.waiting import wait_until
        gc.disable()
        dbsession.configure({"default": f"sqlite:///{sys.argv[1]}/a.db"})
        started, hubs = [], []
        def use():
            dbsession.get_dbsession().execute(text("SELECT 1"))
            hubs.append(get_hub_if_exists())
            started.append(dbsession.get_engine().pool.checkedout())
        for n in range(5):
            get_original("_thread", "start_new_thread")(use, ())
            wait_until(lambda: len(started) > n and dbsession.get_engine().pool.checkedout() == 0, 20)
        assert started == [1] * 5
        # Two threads that build their first hub at once may wait for each other for ever, inside gevent's imports.
        assert hubs == [None] * 5
        """,
        tmp_path,
        patched,
    )


def test_f10_threadpool_job_is_refused_with_the_advice_session_scope(tmp_path):
    run_python(
        """
        import sys
        import gevent, dbsession
        from sqlalchemy import text
        dbsession.configure({"default": f"sqlite:///{sys.argv[1]}/a.db"})
        pool = gevent.get_hub().threadpool
        def bare():
            return dbsession.get_dbsession().scalar(text("SELECT 1"))
        def scoped():
            with dbsession.session_scope("a job"):
                return bare()
        try:
            pool.apply(bare)
        except dbsession.ScopeRequired as error:
            assert "session_scope()" in str(error)
        else:
            raise AssertionError("not refused")
        assert [pool.apply(scoped) for _ in range(5)] == [1] * 5
        assert dbsession.get_engine().pool.checkedout() == 0
        """,
        tmp_path,
    )


def test_f12_first_use_by_many_asks_and_builds_once(mode, tmp_path):
    run_script(
        mode,
        """
        import sys
        from sqlalchemy import text
        asked = []
        def find(name):
            asked.append(name)
            sleep(0.05)
            return f"sqlite:///{sys.argv[1]}/{name}.db"
        dbsession.configure(find)
        def use():
            return dbsession.get_dbsession("a")().get_bind()
        engines = join([spawn(use) for _ in range(10)])
        assert asked == ["a"] and len(set(map(id, engines))) == 1, (asked, engines)
        """,
        tmp_path,
    )


def test_f12_failed_or_killed_build_does_not_poison_the_name(tmp_path):
    run_python(
        """
        import sys
        import gevent, dbsession
        outcomes = [gevent.GreenletExit, OSError, None]
        def find(name):
            outcome = outcomes.pop(0)
            gevent.sleep(0.01)
            if outcome:
                raise outcome("while it was being built")
            return f"sqlite:///{sys.argv[1]}/{name}.db"
        dbsession.configure(find)
        def use():
            try:
                return dbsession.get_engine("a")
            except BaseException as error:
                return type(error)
        jobs = [gevent.spawn(use) for _ in range(10)]
        gevent.joinall(jobs, timeout=10)
        results = [job.value for job in jobs]
        assert results[:2] == [gevent.GreenletExit, OSError], results
        assert set(results[2:]) == {dbsession.get_engine("a")}, results
        """,
        tmp_path,
    )


def test_f17_session_used_after_its_end_raises(mode, tmp_path):
    run_script(
        mode,
        """
        import sys
        from sqlalchemy import text
        from sqlalchemy.exc import InvalidRequestError
        dbsession.configure({"default": f"sqlite:///{sys.argv[1]}/a.db"})
        proxy = dbsession.get_dbsession()
        def use():
            kept = []
            with dbsession.session_scope():
                kept.append(proxy())
            kept.append(proxy()); dbsession.clear_dbsession()
            kept.append(proxy()); proxy.remove()
            kept.append(proxy()); proxy.close()
            kept.append(proxy()); kept[-1].close()
            assert len(set(map(id, kept))) == 5
            for session in kept:
                try:
                    session.execute(text("SELECT 1"))
                except InvalidRequestError:
                    continue
                raise AssertionError("not refused")
            assert proxy.scalar(text("SELECT 1")) == 1
        join(spawn(use))
        wait_until(lambda: checked_out(dbsession.get_engine()) == 0, 20)
        """,
        tmp_path,
    )


def test_session_used_in_the_hub_is_a_clear_error(tmp_path):
    run_python(
        """
        import sys
        import gevent, dbsession
        from sqlalchemy import text
        dbsession.configure({"default": f"sqlite:///{sys.argv[1]}/a.db"})
        seen = []
        def callback():
            for use in (dbsession.get_dbsession(), lambda: dbsession.get_dbsession().execute(text("SELECT 1")),
                        dbsession.session_scope().__enter__):
                try:
                    use()
                except dbsession.UsedInHub as error:
                    seen.append(str(error))
            dbsession.clear_dbsession()           # nothing to do, so no error
        gevent.get_hub().loop.run_callback(callback)
        gevent.sleep(0.01)
        assert len(seen) == 3 and "gevent.spawn" in seen[0] and "[DBS-HUB]" in seen[0], seen
        """,
        tmp_path,
    )


def test_scope_closed_in_another_greenlet_or_thread_is_the_right_one(mode, tmp_path):
    """A generator with a session_scope() in it, started here and closed there."""
    run_script(
        mode,
        """
        import sys
        dbsession.configure({"default": f"sqlite:///{sys.argv[1]}/a.db"})
        session = dbsession.get_dbsession()
        def lines():
            with dbsession.session_scope("lines") as scope:
                session.info["in"] = "lines"
                yield scope
        def elsewhere(generator):
            session.info["in"] = "elsewhere"
            generator.close()
            return session.info["in"]
        generator = lines()
        scope = next(generator)
        assert join(spawn(elsewhere, generator)) == ["elsewhere"]
        assert scope.ended and "in" not in session.info
        """,
        tmp_path,
    )
