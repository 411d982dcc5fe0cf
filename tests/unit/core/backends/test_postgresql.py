"""PostgreSQL's rules that no driver of ours is needed for: what a `readonly` database is given."""

from __future__ import annotations

import pytest
from sqlalchemy import event, text

from dbsession.errors import ConfigError
from support.halves import HALVES, done, entered, on_both_halves, sync


@pytest.fixture(params=HALVES)
def half(request):
    return HALVES[request.param]


def drop_what_is_asked_for(dialect, record, arguments, named):
    """Do as PgBouncer does with what it is told to ignore."""
    named.pop("options", None)
    named.pop("server_settings", None)


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])  # in asyncio asyncpg stands for the second
@on_both_halves
async def test_readonly_session_that_does_not_begin_so_is_refused(half, postgresql_url, driver):
    url = postgresql_url.replace("psycopg", driver)
    manager = half.verbs.SessionManager({"default": {"url": url, "readonly": True}})
    try:
        engine = manager.engine()
        async with entered(engine.connect()) as connection:
            shown = await done(connection.scalar(text("SHOW default_transaction_read_only")))
            assert shown == "on"
        await done(engine.dispose())
        event.listen(sync(engine), "do_connect", drop_what_is_asked_for)
        with pytest.raises(ConfigError, match="is `readonly`, but its session has begun with"):
            await done(engine.connect())
        assert engine.pool.checkedout() == 0
    finally:
        await done(manager.dispose())
