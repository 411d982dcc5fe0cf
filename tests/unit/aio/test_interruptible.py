"""`interruptible` comes to know first of what is thrown into what it awaits, and raises it, whatever becomes of it."""

from __future__ import annotations

import asyncio

import pytest

from dbsession.aio.postgresql.interruptible import interruptible


def test_result_and_error_of_what_is_awaited_come_out():
    told = []

    async def work(future):
        return await future

    async def main():
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        loop.call_soon(future.set_result, 7)
        assert await interruptible(work(future), told.append, told.clear) == 7
        future = loop.create_future()
        loop.call_soon(future.set_exception, LookupError("of the driver"))
        with pytest.raises(LookupError, match="of the driver"):
            await interruptible(work(future), told.append, told.clear)

    asyncio.run(main())
    assert not told


def test_error_of_what_is_awaited_may_be_caught_and_more_be_awaited():
    told = []

    async def work(first, second):
        try:
            await first
        except LookupError:
            return await second

    async def main():
        loop = asyncio.get_running_loop()
        first, second = loop.create_future(), loop.create_future()
        loop.call_soon(first.set_exception, LookupError())
        loop.call_later(0.01, second.set_result, 7)
        assert await interruptible(work(first, second), told.append, told.clear) == 7

    asyncio.run(main())
    assert not told


@pytest.mark.parametrize("swallows", [False, True])
def test_cancellation_comes_out_when_it_is_swallowed(swallows):
    """As asyncpg's `finally: return await waiter` does, for an answer that will not come until it is cut."""
    told = []

    async def work(first, waiter):
        try:
            await first
        except asyncio.CancelledError:
            if not swallows:
                raise
            return await waiter

    async def main():
        loop = asyncio.get_running_loop()
        waiter = loop.create_future()

        def cut():
            told.append("cut")
            waiter.set_exception(ConnectionError())

        task = asyncio.create_task(_await(interruptible(work(loop.create_future(), waiter), told.append, cut)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            async with asyncio.timeout(20):
                await task

    asyncio.run(main())
    assert [type(each) for each in told] == ([asyncio.CancelledError, str] if swallows else [asyncio.CancelledError])


async def _await(work):
    return await work
