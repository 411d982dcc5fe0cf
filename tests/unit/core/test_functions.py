"""What a decorator asks of a function."""

from __future__ import annotations

import functools

import pytest

from dbsession.core.functions import name_of, runs_later


def generator():
    yield


async def coroutine():
    pass


async def async_generator():
    yield


@pytest.mark.parametrize(
    ("function", "of_a_call", "of_an_await"),
    [(len, False, False), (generator, True, True), (coroutine, True, False), (async_generator, True, True)],
)
def test_body_runs_later_than_the_call_or_than_its_await(function, of_a_call, of_an_await):
    assert runs_later(function) is of_a_call
    assert runs_later(function, awaited=True) is of_an_await


class Job:
    def __call__(self):
        pass

    def method(self):
        pass


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (len, "len"),
        (Job, "Job"),
        (Job(), "Job"),
        (Job().method, "Job.method"),
        (functools.partial(functools.partial(generator)), "generator"),
        (functools.partial(Job()), "Job"),
    ],
)
def test_function_is_called_by_its_own_name_or_that_of_its_class(function, name):
    assert name_of(function) == name
