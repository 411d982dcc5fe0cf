"""F16: after a deadlock (1213, 40P01) the transaction is gone at the server, so the rest is refused until the whole is
rolled back: half a unit of work is never committed. A lock wait timeout (1205, 55P03) is test_lock_timeout's."""

from __future__ import annotations

import pytest

from support.servers import on

SETUP = """
    import contextlib
    configure()
    request("CREATE TABLE t (id INT PRIMARY KEY, n INT)", commit=True)
    request("INSERT INTO t VALUES (1, 0), (2, 0), (3, 0), (4, 0)", commit=True)
    wanted, how = getattr(db, sys.argv[3]), sys.argv[4]

    def add(id):
        return text(f"UPDATE t SET n = n + 1 WHERE id = {id}")

    def values():
        with dbsession.session_scope():
            return session.scalars(text("SELECT n FROM t ORDER BY id")).all()

    @contextlib.contextmanager
    def unit():
        "A Session or a Core Connection, in a transaction."
        if how == "session":
            with dbsession.session_scope():
                yield session
        else:
            with dbsession.get_engine().connect() as connection:
                yield connection

    def refused(use):
        try:
            use()
        except exc.PendingRollbackError as error:
            assert str(wanted) in str(error), error
            return
        raise AssertionError("not refused")

    @contextlib.contextmanager
    def victim():
        "A unit that has written row 1, and fails with `wanted` when it calls `fail()`, which then raises it."
        written, locked, done = threading.Event(), threading.Event(), threading.Event()
        def winner():
            with dbsession.session_scope():
                for id in (2, 4, 4, 4):  # more changes than the other: InnoDB's victim is the smaller one
                    session.execute(add(id))
                locked.set()
                written.wait(20)
                if wanted == db.DEADLOCK:
                    running("WHERE id = 2")  # PostgreSQL's victim is who has waited longer
                    session.execute(add(1))
                else:
                    done.wait(20)
                session.commit()
        other = spawn(winner)
        locked.wait(20)
        with unit() as mine:
            mine.execute(text(db.lock_timeout if wanted == db.LOCKED else "SELECT 1"))
            def fail():
                mine.execute(add(1))
                written.set()
                try:
                    mine.execute(add(2))
                finally:
                    done.set()
            yield mine, fail
        join(other)

    def fails(fail):
        try:
            fail()
        except exc.OperationalError as error:
            assert code(error) == wanted, error
            return
        raise AssertionError("no error")
"""

WAYS = pytest.mark.parametrize("how", ["session", pytest.param("core", marks=pytest.mark.slow)])
WINNERS = "[1 if wanted == db.DEADLOCK else 0, 1, 0, 3]"


@WAYS
def test_f16_everything_is_refused_until_the_rollback(how, with_server):
    with_server(
        SETUP
        + f"""
    with victim() as (mine, fail):
        fails(fail)
        def nested():
            with mine.begin_nested():
                mine.execute(add(3))
        for use in (lambda: mine.execute(add(3)), lambda: mine.execute(text("SELECT 1")), nested):
            refused(use)
        refused(mine.commit)
        mine.rollback()
        mine.execute(add(3))
        mine.commit()
    assert values() == {WINNERS.replace("0, 3]", "1, 3]")}
    nothing_in_use()
    """,
        "DEADLOCK",
        how,
    )


@WAYS
@on("mariadb")  # PostgreSQL keeps the savepoint
def test_f16_rollback_to_a_savepoint_is_not_enough(how, with_server):
    """The server has rolled back all, the savepoint too."""
    with_server(
        SETUP
        + f"""
    with victim() as (mine, fail):
        mine.execute(add(3))
        savepoint = mine.begin_nested()
        fails(fail)
        with contextlib.suppress(exc.SQLAlchemyError):
            savepoint.rollback()
        refused(lambda: mine.execute(add(3)))
        refused(mine.commit)
        mine.rollback()
        assert mine.execute(text("SELECT n FROM t WHERE id = 3")).scalar() == 0
    assert values() == {WINNERS}
    nothing_in_use()
    """,
        "DEADLOCK",
        how,
    )


@WAYS
def test_f16_block_that_swallowed_the_error_commits_nothing(how, with_server):
    """`with session.begin()`, `with engine.begin()`: the commit at their end is refused, and their work rolled back."""
    with_server(
        SETUP
        + f"""
    with victim() as (mine, fail):
        mine.rollback()
        def block():
            with mine.begin():
                mine.execute(text(db.lock_timeout))
                mine.execute(add(3))
                with contextlib.suppress(exc.OperationalError):
                    fail()
        refused(block)
        mine.rollback()
        assert mine.execute(text("SELECT n FROM t WHERE id = 3")).scalar() == 0
    assert values() == {WINNERS}
    nothing_in_use()
    """,
        "DEADLOCK",
        how,
    )


@WAYS
def test_f16_connection_of_a_doomed_unit_serves_the_next_one(how, with_server):
    """Whether it was rolled back or just left; the refusal is the transaction's, not the connection's."""
    with_server(
        SETUP.replace("configure()", 'configure(options={"pool_size": 2})')
        + f"""
    with victim() as (mine, fail):
        mine.execute(add(3))
        fails(fail)
    for _ in range(4):
        with unit() as mine:
            mine.execute(add(3))
            mine.commit()
    assert values() == {WINNERS.replace("0, 3]", "4, 3]")}
    nothing_in_use()
    """,
        "LOCKED",
        how,
    )
