"""Who holds the connections of a real server: in the error of whoever waits in vain, and in the counts."""

from __future__ import annotations

HOLDING = """
    import re, time
    from dbsession import PoolTimeout, snapshot

    class Event:
        def __init__(self): self.is_set = False
        def set(self): self.is_set = True
        def wait(self): wait_until(lambda: self.is_set, 30)

    end = Event()

    def hold(label, *statements):
        with dbsession.session_scope(label):
            for statement in statements:
                session.execute(text(statement))
            end.wait()

    def holders():
        return {holder.scope: holder for holder in snapshot().holders}

    def holding(*labels):
        def there():
            return {s for s, holder in holders().items() if holder.statement and holder.state != "executing"}
        wait_until(lambda: set(labels) <= there(), 20, "they hold")
"""


def test_pool_timeout_names_every_holder_and_what_it_is_busy_with(with_server, mode):
    with_server(
        HOLDING
        + """
    configure(options={"pool_size": 4, "pool_timeout": 0.5})
    request("CREATE TABLE t (id INT PRIMARY KEY, note VARCHAR(20))", commit=True)
    tasks = [spawn(hold, "first", "SELECT 1")]
    holding("first")
    tasks.append(spawn(hold, "writer", "INSERT INTO t VALUES (4711, 'secret')"))
    holding("writer")

    def reader():
        with dbsession.session_scope("reader"):
            session.execute(text("SELECT * FROM t WHERE note = :note"), {"note": "hush"})
            end.wait()

    tasks.append(spawn(reader))
    holding("reader")

    def sleeper():
        with dbsession.session_scope("sleeper"):
            session.execute(text(f"SELECT {db.sleep(50)}, :x /* a comment */"), {"x": "hush"})

    tasks.append(spawn(sleeper))
    running(db.sleep(50))

    def in_vain():
        with dbsession.session_scope("in vain"):
            try:
                session.execute(text("SELECT 2"))
            except PoolTimeout as error:
                return error

    (error,) = join(spawn(in_vain))
    assert [holder.scope for holder in error.holders] == ["first", "writer", "reader", "sleeper"], str(error)
    states = {holder.scope: holder.state for holder in error.holders}
    assert states == dict.fromkeys(("first", "writer", "reader"), "idle in transaction") | {"sleeper": "executing"}
    statements = [holder.statement.replace("::VARCHAR", "") for holder in error.holders]
    assert statements == [
        "SELECT 1", "INSERT INTO t VALUES (?, ?)", "SELECT * FROM t WHERE note = %(note)s",
        f"SELECT {db.sleep(50).replace('50', '?')}, %(x)s",
    ], statements
    sites = [re.findall(r"script\\.py:\\d+ in (\\w+)$", "\\n".join(holder.stack), re.M) for holder in error.holders]
    places = [found[0] for found in sites]
    assert places == ["hold", "hold", "reader", "sleeper"]
    assert error.in_use == error.size == 4 and error.waiting == 0
    said = str(error)
    assert said.index("first") < said.index("writer") < said.index("reader") < said.index("sleeper")
    for hidden in ("secret", "hush", "4711", "comment", "app:"):
        assert hidden not in said, (hidden, said)
        for holder in error.holders:
            told = repr([getattr(holder, field) for field in holder.__slots__ if not field.endswith("_s")])
            assert hidden not in told, (hidden, told)  # without the times, which have any digits
    assert holders()["sleeper"].state == "executing"
    end.set()
    server.kill_statement(running(db.sleep(50)))
    try:
        join(tasks)
    except exc.OperationalError:
        pass  # of the statement that was killed
    nothing_in_use()
    assert not snapshot().holders
    """,
        mode=mode,
    )


def test_holder_is_committing_while_the_server_takes_its_time(with_server):
    with_server(
        HOLDING
        + """
    from support.proxy import Proxy
    configure(options={"pool_size": 2})
    request("CREATE TABLE t (id INT PRIMARY KEY)", commit=True)

    before = []

    def commit():
        with dbsession.session_scope("committer"):
            session.execute(text("INSERT INTO t VALUES (1)"))
            before.append(holders()["committer"])
            server.pause()
            session.commit()

    task = spawn(commit)
    try:
        wait_until(lambda: "committer" in holders() and holders()["committer"].state == "committing", 20)
        holder = holders()["committer"]
        assert holder.statement == "INSERT INTO t VALUES (1)"
        # Since the COMMIT, and not since the INSERT ended.
        assert holder.held_s - holder.state_s > before[0].held_s - before[0].state_s
    finally:
        server.resume()
    join(task)
    nothing_in_use()
    assert not holders()
    """
    )


def test_kills_and_invalidated_are_counted(with_server):
    with_server(
        HOLDING
        + """
    configure(options={"pool_size": 2})
    request()
    def counts():
        (found,) = snapshot().databases
        return found
    before = counts()
    task = spawn(request, f"SELECT {db.sleep(30)}")
    id = running(db.sleep(30))
    assert holders() and counts().in_use == 1
    task.handle.kill()
    wait_until(lambda: counts().kills == before.kills + 1, 20, "the kill")
    wait_until(lambda: id not in server.ids(), 20, "the server has ended it")
    assert counts().invalidated == before.invalidated + 1 and counts().in_use == 0 and not holders()
    request()
    assert counts().connects == before.connects + 1 and counts().checkouts == before.checkouts + 2
    assert sum(counts().holds.counts) == counts().checkouts == sum(counts().waits.counts)
    # A whole pool is lost with its server.
    fill(2)
    server.restart()
    failure()
    request()
    assert counts().in_use == 0 and not holders()
    assert sum(counts().holds.counts) == counts().checkouts
    """
    )


def test_kill_at_the_checkout_leaves_no_note(with_server):
    """While it connects, while it is asked whether it lives, and while it waits for its turn."""
    with_server(
        HOLDING
        + """
    import gevent
    configure(options={"pool_size": 1}, ping_idle_s=0)
    engine = dbsession.get_engine()

    def counts():
        return snapshot().databases[0]

    request()
    server.pause()
    asked = spawn(request)
    wait_until(lambda: counts().in_use == 1, 20)
    waits = spawn(request)
    wait_until(lambda: counts().waiting == 1, 20)
    assert [holder.state for holder in snapshot().holders] == ["pinging"], snapshot().holders
    waits.handle.kill()
    asked.handle.kill()
    wait_until(lambda: counts().in_use == 0 and not snapshot().holders, 20)
    connects = spawn(request)  # a new connection, as the old one is gone
    wait_until(lambda: counts().in_use == 1, 20)
    sleep(0)
    connects.handle.kill()
    wait_until(lambda: counts().in_use == 0 and not snapshot().holders, 20)
    server.resume()
    request()
    nothing_in_use()
    assert not snapshot().holders
    """
    )
