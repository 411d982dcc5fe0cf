"""Who wants to know of each engine that is built."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable

from sqlalchemy.engine import Engine

from dbsession.errors import describe

logger = logging.getLogger(__name__)

Listener = Callable[[str, Engine], object]

listeners: list[Listener] = []
"""Grows only."""


class Told:
    """Which listeners know of one engine. Lives as long as the engine, through forks."""

    def __init__(self, name: str, engine: Engine) -> None:
        self._name = name
        self._engine = engine
        self._known: dict[int, object] = {}  # by id(); written by `setdefault`, one step

    def tell(self, listener: Listener) -> None:
        """Call `listener` with the engine, if it has not been. What it raises is logged, unless it is a kill."""
        token = object()
        if self._known.setdefault(id(listener), token) is not token:
            return
        try:
            listener(self._name, self._engine)
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            logger.warning(
                "Database %r: the on_engine_created function %s failed with %s at %s; the engine is used as it is.",
                self._name,
                getattr(listener, "__qualname__", type(listener).__qualname__),
                describe(error),
                f"{frame.filename}:{frame.lineno}",
            )
