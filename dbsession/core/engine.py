"""Who wants to know of each engine that is built."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable

from sqlalchemy.engine import Engine

from dbsession.errors import describe, raised_at

logger = logging.getLogger("dbsession.created")

Listener = Callable[[str, Engine], object]

listeners: list[Listener] = []
"""Grows only."""

# Of every engine of this process that is still referenced, in greenlets and in every event loop. Written when one is
# made or goes, one set operation each: a WeakSet cannot be read while another thread adds to it.
_engines: set[weakref.ref[Told]] = set()


def on_created(listener: Listener) -> None:
    """Call `listener` for each engine that there is and each that will be built, once."""
    listeners.append(listener)  # first, so that none that is being built now is missed
    for reference in list(_engines):
        told = reference()
        if told is not None and not told.over:
            told.tell(listener)


class Told:
    """Which listeners know of one engine. Lives as long as the engine, through forks."""

    def __init__(self, name: str, engine: Engine) -> None:
        self._name = name
        self._engine = engine
        self._known: dict[int, object] = {}  # by id(); written by `setdefault`, one step
        self.over = False
        """Another configuration has taken its place, or it is a parent process's."""
        _engines.add(weakref.ref(self, _engines.discard))

    def tell_all(self) -> None:
        """Call every listener that does not know the engine yet."""
        for listener in list(listeners):
            self.tell(listener)

    def tell(self, listener: Listener) -> None:
        """Call `listener` with the engine, if it has not been. What it raises is logged, unless it is a kill."""
        token = object()
        if self._known.setdefault(id(listener), token) is not token:
            return
        try:
            listener(self._name, self._engine)
        except Exception as error:
            logger.warning(
                "Database %r: the on_engine_created function %s failed with %s at %s; the engine is used as it is.",
                self._name,
                getattr(listener, "__qualname__", type(listener).__qualname__),
                describe(error),
                raised_at(error),
            )
