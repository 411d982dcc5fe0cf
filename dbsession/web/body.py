"""The response body that is read inside its request's scope, and ends it by its close() (PEP 3333)."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

from dbsession.errors import describe
from dbsession.green.hub import run_aside
from dbsession.green.scope import OpenedScope

logger = logging.getLogger("dbsession.wsgi")


class ScopedBody:
    """A response body read inside its request's scope. Lives until `close()`, or until it is garbage collected."""

    def __init__(self, body: Iterable[bytes], scope: OpenedScope) -> None:
        self._body = body
        self._scope = scope
        self._iterator: Iterator[bytes] | None = None
        self._closed = False
        self._read_out = False

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        self._scope.resume()
        try:
            if self._iterator is None:
                self._iterator = iter(self._body)
            return next(self._iterator)
        except StopIteration:
            self._read_out = True
            raise
        finally:
            self._scope.suspend(park=True)  # where it was read last

    def close(self) -> None:
        """Close the application's body, then every session. May switch greenlets."""
        if not self._closed:
            self._closed = True
            if self._iterator is not None and not self._read_out:  # it raised, or the client went away
                self._scope.failed = True
            _end(self._body, self._scope)

    def __del__(self) -> None:
        # The server dropped it. Closing may wait, and this may be the Hub or somebody else's request.
        if not getattr(self, "_closed", True):
            self._closed = self._scope.failed = True
            if self._scope.timer is not None:
                self._scope.timer.close()
            run_aside(partial(_end_dropped, self._body, self._scope), self._scope.owner_hub)


class ReadyBody(ScopedBody):
    """A body in which nothing of the application runs but its `close()`."""

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._body)


def close_body(body: Any) -> None:
    """Call the body's close(), if it has one."""
    if hasattr(body, "close"):
        body.close()


def _end(body: Any, scope: OpenedScope) -> None:
    scope.resume()
    try:
        close_body(body)
    finally:
        scope.leave()


def _end_dropped(body: Any, scope: OpenedScope) -> None:
    try:
        _end(body, scope)
    except Exception as error:  # nobody is there to be told; a Flask context cannot be left in another greenlet, say
        logger.warning("%s: its body was dropped by the server and failed to close: %s.", scope.label, describe(error))
