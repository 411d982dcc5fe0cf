"""The side connection that says KILL is let in as a new connection is, or with what the old one was opened with."""

from __future__ import annotations

import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import OperationalError

from support.halves import done, entered, on_both_halves, sync


@pytest.fixture
def rotated(mariadb, mariadb_url):
    """The URL of a user of its own, and what gives him another password."""
    with mariadb.root() as cursor:
        cursor.execute("CREATE USER rotated@'127.0.0.1' IDENTIFIED BY 'first'")
        cursor.execute(f"GRANT ALL ON {mariadb_url.rpartition('/')[2]}.* TO rotated@'127.0.0.1'")
        yield (
            mariadb_url.replace(f"app:{mariadb.password}", "rotated:first"),
            lambda password: cursor.execute("SET PASSWORD FOR rotated@'127.0.0.1' = PASSWORD(%s)", (password,)),
        )
        cursor.execute("DROP USER rotated@'127.0.0.1'")


@pytest.fixture
def manager(driver, half, rotated):
    url = rotated[0].replace("pymysql", driver)
    manager = half.verbs.SessionManager({"default": url})
    yield manager

    async def dispose():
        await done(manager.dispose())

    half.run(dispose)


def give(manager, password):
    """From now on the engine's new connections have this password, or fail with it if it is an error."""

    def do_connect(dialect, record, args, arguments):
        if isinstance(password[0], Exception):
            raise password[0]
        arguments["password"] = password[0]

    event.listen(sync(manager.engine()), "do_connect", do_connect)


async def abandon(manager, *before):
    async with entered(manager.scope()):  # the connection is open, and idle then
        await done(manager.get().scalar(text("SELECT 1")))
    for step in before:
        step()
    async with entered(manager.scope(read_timeout_s=0.3)):
        with pytest.raises(OperationalError):
            await done(manager.get().execute(text("SELECT SLEEP(60)")))


@on_both_halves
async def test_f42_statement_is_ended_after_the_password_was_rotated(half, manager, rotated, caplog):
    password = ["first"]
    give(manager, password)
    await abandon(manager, lambda: rotated[1]("second"), lambda: password.__setitem__(0, "second"))
    await half.until(lambda: manager.database("default").stats.kills == 1)
    assert not [record for record in caplog.records if "kill" in record.name]


@pytest.mark.parametrize("new", ["wrong", RuntimeError("the vault is sealed")], ids=["refused", "failed"])
@on_both_halves
async def test_f42_connections_own_credentials_are_tried_when_new_ones_are_not_let_in(half, manager, new, caplog):
    password = ["first"]
    give(manager, password)
    await abandon(manager, lambda: password.__setitem__(0, new))
    await half.until(lambda: manager.database("default").stats.kills == 1)
    assert not [record for record in caplog.records if "kill" in record.name]


@on_both_halves
async def test_f42_it_is_said_once_in_words_when_neither_is_let_in(half, manager, rotated, caplog):
    def said():
        return [record.getMessage() for record in caplog.records if record.name == "dbsession.mysql.kill"]

    await abandon(manager, lambda: rotated[1]("second"))
    await half.until(said)
    rotated[1]("first")
    await abandon(manager, lambda: rotated[1]("second"))
    await abandon_again(half, manager)
    assert len(said()) == 1 and said()[0].count("1045") == 2 and "side connections" in said()[0]
    assert "first" not in said()[0] and "second" not in said()[0]
    rotated[1]("first")
    await abandon(manager)
    await half.until(lambda: manager.database("default").stats.kills == 1)


async def abandon_again(half, manager):
    """Wait until what was abandoned has been tried."""
    if half.name == "gevent":
        killer = sync(manager.engine()).dialect.connect.__self__._killer
        await half.until(lambda: not killer.pending)
    else:
        killer = manager.database("default").connections.backend._killer
        await half.until(lambda: not killer.abandoned and not killer._working)
