"""The last warnings that dbsession logged in this process, for whoever looks at it from outside."""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass

KEPT = 50


@dataclass(frozen=True, slots=True)
class Warned:
    """One log record of WARNING or above. `time_s` is in seconds since 1970."""

    time_s: float
    level: str
    logger: str
    text: str


_kept: deque[Warned] = deque(maxlen=KEPT)  # written by the logging of any greenlet or thread, one step each


class _Keep(logging.Handler):
    """Keeps them. Lives as long as the process, once installed."""

    def emit(self, record: logging.LogRecord) -> None:
        _kept.append(Warned(record.created, record.levelname, record.name, record.getMessage()))
        last = logging.lastResort
        if last is not None and not logging.getLogger().handlers and record.levelno >= last.level:
            last.handle(record)  # which logging would have called, had it found no handler


_handler = _Keep(logging.WARNING)


def keep() -> None:
    """Keep the warnings from now on. Idempotent."""
    logging.getLogger("dbsession").addHandler(_handler)


def warned() -> tuple[Warned, ...]:
    """Those kept, newest last."""
    return tuple(_kept.copy())
