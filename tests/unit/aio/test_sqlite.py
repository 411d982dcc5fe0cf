"""The threads of aiosqlite end once, and before their loop does."""

from __future__ import annotations

import asyncio
import threading

import pytest

from dbsession.aio import SessionManager


@pytest.fixture
def manager(tmp_path):
    return SessionManager({"default": f"sqlite:///{tmp_path}/a.db"})


async def driver_of(manager):
    connection = await manager.engine().raw_connection()
    driver = connection.driver_connection
    connection.detach()
    return driver


def test_close_ends_when_the_connection_was_stopped_meanwhile(manager):
    """As SQLAlchemy does it where the task that waits for the close is cancelled a second time."""

    async def main():
        driver = await driver_of(manager)
        closing = asyncio.create_task(driver.close())
        await asyncio.sleep(0)
        driver.stop()
        await asyncio.wait_for(closing, 10)
        assert driver.stop() is None

    asyncio.run(main())


@pytest.mark.parametrize("end", ["dispose", "loop"])
def test_threads_that_are_ending_are_waited_for(manager, end):
    busy, gate, ended = threading.Event(), threading.Event(), threading.Event()

    def slow():
        busy.set()
        assert gate.wait(10)
        ended.set()

    async def main():
        driver = await driver_of(manager)
        await driver.create_function("slow", 0, slow)
        query = asyncio.create_task(driver.execute_fetchall("SELECT slow()"))
        await asyncio.to_thread(busy.wait, 10)
        query.cancel()
        driver.stop()
        if end == "loop":
            asyncio.get_running_loop().call_later(0.1, gate.set)
            return
        disposing = asyncio.create_task(manager.dispose())
        await asyncio.wait([disposing], timeout=0.1)
        assert not disposing.done()
        gate.set()
        await disposing
        assert ended.is_set()

    asyncio.run(main())
    assert ended.is_set()
