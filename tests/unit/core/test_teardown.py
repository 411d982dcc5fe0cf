"""Throwing connections away, and the report of a session that failed to close."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from dbsession.core import teardown


class Connection:
    """Notes its steps, and fails at those that it is told to fail at."""

    def __init__(self, steps, **failures):
        self._steps, self._failures = steps, failures

    def _step(self, name):
        self._steps.append(name)
        if name in self._failures:
            raise self._failures[name]

    def invalidate(self):
        self._step("invalidate")

    def close(self):
        self._step("close")


def test_discard_takes_every_step_and_returns_the_first_kill():
    steps, kill = [], KeyboardInterrupt()
    connections = [
        Connection(steps, invalidate=RuntimeError()),
        Connection(steps, invalidate=kill, close=SystemExit()),
        Connection(steps),
    ]
    assert teardown.discard(connections) is kill
    assert steps == ["invalidate", "close"] * 3


def test_discard_returns_nothing_when_only_errors_were_raised():
    assert teardown.discard([Connection([], invalidate=RuntimeError(), close=RuntimeError())]) is None


class Handler(logging.Handler):
    def __init__(self, failure):
        super().__init__()
        self._failure = failure

    def emit(self, record):
        raise self._failure


@pytest.fixture
def logger():
    logger = logging.getLogger("dbsession.tests.teardown")
    yield logger
    logger.handlers.clear()


def test_report_names_database_scope_and_error_but_no_text_of_it(logger, caplog):
    teardown.report(logger, SimpleNamespace(name="reports"), "a job", RuntimeError("secret"))
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("Database 'reports': a session of a job failed to close with RuntimeError;")
    assert "secret" not in line


def test_report_lets_only_a_kill_of_a_log_handler_pass(logger):
    database = SimpleNamespace(name="reports")
    logger.addHandler(Handler(RuntimeError()))
    teardown.report(logger, database, "a job", ValueError())
    logger.handlers[:] = [Handler(SystemExit())]
    with pytest.raises(SystemExit):
        teardown.report(logger, database, "a job", ValueError())
