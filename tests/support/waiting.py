"""The one place where a test waits by polling."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_until(predicate: Callable[[], T], deadline_s: float = 30.0, what: str = "") -> T:
    """Returns the first true value of `predicate()`; AssertionError after `deadline_s` seconds without one.

    Lets other greenlets run in a process patched by gevent, as `time.sleep` does there.
    """
    end = time.monotonic() + deadline_s
    while True:
        # The time is read first, so that the predicate is asked once more after the deadline.
        late = time.monotonic() >= end
        value = predicate()
        if value:
            return value
        if late:
            raise AssertionError(f"not within {deadline_s:g} s: {what or predicate!r} (last value: {value!r})")
        time.sleep(0.005)  # the one sleep of the tests that wait for something
