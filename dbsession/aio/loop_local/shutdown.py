"""What closes a loop's resources when its user does not: the loop's own end.

Two public methods of the loop are replaced on the instance. `shutdown_asyncgens()` is what asyncio.run and uvloop.run
await in the running loop while its executor still works (uvicorn, too, but not after a SIGTERM). An asynchronous
generator of ours, which the original would close, does not do: it closes all of them at once and in no order, among
them the one inside each object that @asynccontextmanager makes, so that resources would end before those that were
built on them. `close()` is the last net, for who calls nothing else (gunicorn's ASGI worker).
"""

from __future__ import annotations

import asyncio
import weakref

from dbsession.aio.loop_local.state import EXIT_TIMEOUT_S, LoopState, logger, report


def spread(loop: asyncio.AbstractEventLoop, state: LoopState) -> None:
    """Lets the end of `loop` close what is in `state`. The loop refers to itself from here on, until it is closed."""
    close_loop = loop.close
    shutdown = loop.shutdown_asyncgens
    # Cleared by the garbage collector before any __del__: that of asyncio's loops calls close().
    alive = weakref.ref(loop)

    async def close_resources() -> None:
        try:
            await state.close(EXIT_TIMEOUT_S)
        except BaseExceptionGroup as group:
            report(loop, group)

    async def shutdown_asyncgens() -> None:
        try:
            await close_resources()
        finally:
            await shutdown()

    def close() -> None:
        # A loop that runs refuses, a closed one has nothing to do; a collected one is no place to run anything in.
        if loop.is_running() or loop.is_closed() or alive() is None:
            close_loop()
            return
        try:
            if state.to_close():
                if other_loop_runs():
                    logger.warning(
                        "a loop was closed while another one ran in the same thread, so that these exits could not "
                        "run: %s; await loop_local.aclose() in it before",
                        ", ".join(state.own_exits()),
                    )
                else:
                    _run_to_its_end(loop, asyncio.Task(close_resources(), loop=loop))
        except Exception as error:
            logger.warning("closing the resources of a loop that was closed failed: %s", type(error).__name__)
        finally:
            state.clear()
            for name, ours in nets.items():
                if vars(loop).get(name) is ours:  # not somebody else's, who came later
                    delattr(loop, name)
            nets.clear()
            close_loop()

    nets = {"shutdown_asyncgens": shutdown_asyncgens, "close": close}
    try:
        for name, net in nets.items():
            setattr(loop, name, net)
    except AttributeError:
        logger.warning(
            "shutdown_asyncgens() or close() of %s cannot be replaced, so that the end of the loop may not close its "
            "resources: await loop_local.aclose() before",
            type(loop).__name__,
        )


def _run_to_its_end(loop: asyncio.AbstractEventLoop, task: asyncio.Task[None]) -> None:
    """Run all exits, also after a first interrupt or an exit that stops the loop."""
    try:
        loop.run_until_complete(task)
    finally:
        if not task.done():
            loop.run_until_complete(task)


def other_loop_runs() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
