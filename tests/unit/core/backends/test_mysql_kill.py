"""mysql_kill: whose thread it is at the server, told without asking where that can be, and never guessed."""

from __future__ import annotations

import pytest
from pymysql import err

from dbsession.core.backends.mysql_kill import Killer, Thread, side_arguments
from dbsession.core.pool.stats import Stats

LOCAL = ("127.0.0.1", 40001)
PEER = ("127.0.0.1", 3306)


@pytest.fixture
def killer():
    return Killer("shop", Stats())


def run(killer, thread, *answers):
    """The statements that the steps yield, with `answers` to them; an exception is thrown in."""
    steps, said = killer.steps(thread), []
    try:
        said.append(next(steps))
        for answer in answers:
            said.append(steps.throw(answer) if isinstance(answer, Exception) else steps.send(answer))
    except StopIteration:
        pass
    return said


@pytest.mark.parametrize("shown", ["localhost", "127.0.0.1", "app-3.example", "::1"])
def test_address_is_asked_for_once_where_the_server_sees_our_port(killer, shown):
    assert killer.host_of(LOCAL, PEER) is None
    assert killer.learn(LOCAL, PEER, 5, (5, f"{shown}:40001")) == f"{shown}:40001"
    assert killer.host_of(("127.0.0.1", 40002), PEER) == f"{shown}:40002"
    assert killer.host_of(("10.0.0.9", 40002), PEER) is None  # by another address it may be shown otherwise


def test_address_is_asked_for_again_where_the_engine_connects_to_another_server(killer):
    """It may be behind a proxy, which shows another port, or gives ids of its own."""
    killer.learn(LOCAL, PEER, 5, (5, "127.0.0.1:40001"))
    assert killer.host_of(("127.0.0.1", 40002), ("127.0.0.1", 6033)) is None


def test_each_connection_asks_behind_a_proxy(killer):
    assert killer.learn(LOCAL, PEER, 5, (5, "10.0.0.7:51234")) == "10.0.0.7:51234"
    assert killer.host_of(("127.0.0.1", 40002), PEER) is None


@pytest.mark.parametrize(
    "row", [None, (5, "localhost"), (6, "127.0.0.1:40001")], ids=["none", "a Unix socket", "an id of the proxy's own"]
)
def test_thread_that_cannot_be_recognised_is_not_noted_and_that_is_said_once(killer, row, caplog):
    host = killer.learn(LOCAL, PEER, 5, row)
    assert host is None
    assert not killer.abandon(Thread(5, host)) and not killer.abandon(Thread(6, host))
    assert not killer.abandoned
    (record,) = caplog.records
    assert record.name == "dbsession.mysql.kill" and "'shop'" in record.getMessage()


def test_kill_is_sent_to_the_thread_that_has_both_the_id_and_the_host(killer):
    select, kill = run(killer, Thread(5, "h:1"), ("h:1",), None)
    assert select.endswith("WHERE ID = 5") and kill == "KILL 5"
    assert killer._stats.kills == 1


def test_another_clients_thread_is_left_alone_and_that_is_said(killer, caplog):
    assert len(run(killer, Thread(5, "h:1"), ("h:2",))) == 1
    assert killer._stats.kills == 0 and "another client" in caplog.text


def test_nothing_is_said_of_a_statement_that_is_over(killer, caplog):
    assert len(run(killer, Thread(5, "h:1"), None)) == 1
    assert len(run(killer, Thread(5, "h:1"), ("h:1",), err.OperationalError(1094, "Unknown thread id"))) == 2
    assert killer._stats.kills == 0 and not caplog.records


def test_other_errors_of_the_kill_go_on(killer):
    with pytest.raises(err.OperationalError):
        run(killer, Thread(5, "h:1"), ("h:1",), err.OperationalError(1095, "You are not owner of thread"))


def test_threads_of_a_server_that_does_not_answer_are_forgotten_and_others_kept(killer, caplog):
    killer.abandoned.extend([Thread(1, "h:1", "a"), Thread(2, "h:2", "b"), Thread(3, "h:3", "a")])
    killer.failed(TimeoutError("10.0.0.1"), Thread(0, "h:0", "a"))
    assert [each.id for each in killer.abandoned] == [2]
    assert "TimeoutError" in caplog.text and "10.0.0.1" not in caplog.text


def test_side_connection_goes_without_what_belongs_to_the_application():
    arguments = {"user": "u", "database": "d", "init_command": "SET x", "sql_mode": "y", "ssl": {"ca": "c"}}
    assert side_arguments(arguments) == {"user": "u", "ssl": {"ca": "c"}, "autocommit": True}
