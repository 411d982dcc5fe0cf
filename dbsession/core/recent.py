"""The last warnings that dbsession logged in this process, for whoever looks at it from outside."""

from __future__ import annotations

import logging
import os
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
        if last is not None and record.levelno >= last.level and not _is_handled(logging.getLogger(record.name)):
            last.handle(record)  # which logging would have called, had it found no handler


def _is_handled(logger: logging.Logger | None) -> bool:
    """Whether a handler other than ours gets what this logger is told."""
    while logger is not None:
        if any(not isinstance(handler, _Keep) for handler in logger.handlers):
            return True
        logger = logger.parent if logger.propagate else None
    return False


os.register_at_fork(after_in_child=_kept.clear)  # they are the parent's


def keep() -> None:
    """Keep the warnings from now on. Idempotent."""
    ours = logging.getLogger("dbsession")
    if not any(isinstance(each, _Keep) for each in ours.handlers):
        # Held by its logger alone: freed before that, at the end of a patched process, it would make logging complain.
        ours.addHandler(_Keep(logging.WARNING))


def warned() -> tuple[Warned, ...]:
    """Those kept, newest last."""
    return tuple(_kept.copy())
