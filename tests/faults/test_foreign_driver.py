"""Connections that the user opens with stock PyMySQL: what holds for ours holds for them, as far as it can."""

from __future__ import annotations

import pymysql
import pytest
from sqlalchemy import Integer, TypeDecorator, event, literal, select, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import OperationalError, StatementError

from dbsession import RollbackRequired
from support.processes import run_python

DEADLOCK = text("SIGNAL SQLSTATE '40001' SET MYSQL_ERRNO = 1213, MESSAGE_TEXT = 'deadlock'")


class Picky(TypeDecorator):
    impl = Integer
    cache_ok = True

    def process_bind_param(self, value, dialect):
        raise ValueError("not a number")


@pytest.fixture
def stock(managed, mariadb_url):
    """A manager whose connections are PyMySQL's own."""
    parts = make_url(mariadb_url)
    login = {"host": "127.0.0.1", "port": parts.port, "user": parts.username, "password": parts.password}
    return managed(options={"creator": lambda: pymysql.connect(database=parts.database, **login)})


def test_f09_errors_on_a_driver_that_is_not_ours_arrive_as_they_are(stock):
    with stock.engine().connect() as connection, pytest.raises(StatementError, match="not a number"):
        connection.execute(select(literal(1, Picky)))
    with stock.engine().connect() as connection:
        with pytest.raises(OperationalError):
            connection.execute(DEADLOCK)
        with pytest.raises(RollbackRequired):
            connection.execute(text("SELECT 1"))
        assert not connection.invalidated
        connection.rollback()
        assert connection.scalar(text("SELECT 1")) == 1


def test_f09_a_timeout_thrown_into_a_driver_that_is_not_ours_discards_its_connection(mariadb_url):
    run_python(
        """
from gevent import monkey; monkey.patch_all()
import sys, gevent, dbsession, pymysql
from sqlalchemy import text
from sqlalchemy.engine import make_url
class Mine(Exception): pass
url = make_url(sys.argv[1])
login = dict(host=url.host, port=url.port, user=url.username, password=url.password)
dbsession.configure({"default": {"url": url, "options": {"creator": lambda: pymysql.connect(**login), "pool_size": 1}}})
engine = dbsession.get_engine()
with engine.connect() as connection:
    try:
        with gevent.Timeout(0.2, Mine):
            connection.execute(text("SELECT SLEEP(30)"))
    except Mine:
        assert connection.invalidated
    else:
        raise AssertionError("not ended")
with engine.connect() as connection:
    assert connection.scalar(text("SELECT 'own'")) == "own"
""",
        mariadb_url,
    )


def test_stock_connection_of_a_do_connect_listener_is_rolled_back_before_the_next_user(managed):
    manager = managed()
    with manager.engine().begin() as connection:
        connection.execute(text("CREATE TABLE t (n INT) ENGINE=InnoDB"))
    manager.dispose()
    event.listen(manager.engine(), "do_connect", lambda d, r, args, arguments: pymysql.connect(*args, **arguments))
    raw = manager.engine().raw_connection()
    raw.cursor().execute("INSERT INTO t VALUES (1)")
    raw.close()
    with manager.scope():
        assert manager.get().scalar(text("SELECT count(*) FROM t")) == 0
