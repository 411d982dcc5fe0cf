"""The state that the running loop keeps for `loop_local`.

    loop._dbsession_loop_local -> LoopState

An attribute of the loop: the fastest look-up there is, and it dies with the loop, whatever is in it.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable
from typing import Any

from dbsession import errors
from dbsession.aio.loop_local import shutdown
from dbsession.aio.loop_local.state import LoopState

# Any: mypy knows of no such attribute. For `running_loop()._dbsession_loop_local`, where every nanosecond counts.
running_loop: Callable[[], Any] = asyncio.get_running_loop
ABSENT = (RuntimeError, AttributeError, KeyError)  # no loop runs, nothing is kept for it, or not this

_ATTRIBUTE = "_dbsession_loop_local"
# For a loop that takes no attributes. Written by each loop's own thread, with one dict operation.
_elsewhere: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, LoopState] = weakref.WeakKeyDictionary()


def running_state() -> LoopState:
    """Return what the running loop keeps, made at its first call. Raises LoopRequired."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        raise errors.LoopRequired(
            "No event loop runs in this thread, and what was asked for belongs to one. Call it from a coroutine or a "
            "callback of the loop; a function that runs in a worker thread gets the value passed in."
        ) from None
    known: LoopState | None = getattr(loop, _ATTRIBUTE, None) or _elsewhere.get(loop)
    if known is not None:
        return known
    state = LoopState()
    try:
        setattr(loop, _ATTRIBUTE, state)
    except AttributeError:
        _elsewhere[loop] = state
    shutdown.spread(loop, state)
    return state
