"""Nothing grows with the number of asyncio tasks that have ended."""

from __future__ import annotations

import pytest

from support.processes import run_python

MEASURE = """
import asyncio, gc, re, sys
from sqlalchemy import text
from dbsession import aio
aio.configure({"default": f"sqlite:///{sys.argv[1]}/a.db"})
session = aio.get_dbsession()

def private_bytes():
    gc.collect()
    with open("/proc/self/smaps_rollup") as file:
        return 1024 * int(re.search(r"Private_Dirty: +(\\d+)", file.read())[1])

async def growth_per_task(unit, warm_up, tasks):
    async def run(number):
        for _ in range(number):
            await asyncio.create_task(unit())
        await asyncio.sleep(0)  # the last one's end
    await run(warm_up)
    before = private_bytes()
    await run(tasks)
    return (private_bytes() - before) / tasks

async def get():
    session()

def run(main):
    if sys.argv[2] == "uvloop":
        import uvloop
        return uvloop.run(main)
    return asyncio.run(main)
"""


@pytest.mark.slow
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_million_tasks_that_never_remove_leave_less_than_two_bytes_each(tmp_path, loop):
    run_python(
        MEASURE
        + """
grown = run(growth_per_task(get, 20_000, 1_000_000))
assert grown < 2, grown
""",
        tmp_path,
        loop,
        timeout=900,
    )


@pytest.mark.parametrize(
    "what",
    [
        *("children", "cancelled", "request"),
        *(pytest.param(each, marks=pytest.mark.slow) for each in ("task", "remove", "scope", "own context")),
    ],
)
def test_tasks_that_ended_leave_nothing(tmp_path, what):
    run_python(
        MEASURE
        + """
import contextvars
async def remove():
    session()
    await session.remove()
async def scope():
    session()
    async with aio.session_scope():
        session()
async def children():
    session()
    await asyncio.gather(get(), get())
async def own_context():
    session()
    contextvars.Context().run(session)
async def cancelled():
    async def wait():
        session()
        await asyncio.get_running_loop().create_future()
    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
async def request():
    async def app(scope, receive, send):
        session()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})
    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}
    async def send(message):
        pass
    await middleware(app)({"type": "http", "method": "GET", "path": "/"}, receive, send)
middleware = aio.DBSessionMiddleware
units = {"task": get, "remove": remove, "scope": scope, "children": children, "own context": own_context,
         "cancelled": cancelled, "request": request}
grown = run(growth_per_task(units[sys.argv[3]], 5_000, 20_000))
assert grown < 20, grown                          # a page or two of the allocator's, over 20,000
""",
        tmp_path,
        "asyncio",
        what,
        timeout=300,
    )


def test_ended_tasks_leave_no_entry_and_no_object_when_nothing_is_collected(tmp_path):
    run_python(
        MEASURE
        + """
from sqlalchemy.ext.asyncio import AsyncSession
from dbsession.aio import teardown
from dbsession.aio.scope import Scope, Stack

def alive():
    return {kind.__name__: sum(isinstance(each, kind) for each in gc.get_objects()) for kind in kinds}
kinds = (Scope, Stack, AsyncSession, asyncio.Task)
nothing = {"Scope": 0, "Stack": 0, "AsyncSession": 0, "Task": 1}  # this one

async def query(number):
    assert await session.scalar(text("SELECT :number"), {"number": number}) == number

async def main():
    gc.disable()
    await asyncio.gather(*(query(number) for number in range(1000)))
    async with asyncio.timeout(60):
        while teardown._under_way or alive() != nothing:
            await asyncio.sleep(0)
    assert aio.get_engine().pool.checkedout() == 0
run(main())
""",
        tmp_path,
        "asyncio",
    )


ENDED = """
import asyncio, gc, sys, threading, tracemalloc
from sqlalchemy import event, text
from sqlalchemy.event import registry
from sqlalchemy.ext.asyncio import AsyncSession
from dbsession import aio
import dbsession.watch.metrics

url, ending, loops = sys.argv[1], sys.argv[2], int(sys.argv[3])

class Own(AsyncSession):
    pass

entry = {"url": url, "session": {"class_": Own}}
if ":memory:" in url:
    from sqlalchemy.pool import StaticPool
    entry["options"] = {"poolclass": StaticPool}
aio.configure({"default": entry})
aio.on_engine_created(lambda name, engine: event.listen(engine, "commit", lambda connection: None))
session = aio.get_dbsession()

async def main():
    async with aio.session_scope():
        await session.scalar(text("SELECT 1"))
        await session.commit()
    await asyncio.gather(session.scalar(text("SELECT 2")))
    if ending == "dispose":
        await aio.dispose()

def once():
    if ending == "thread":
        thread = threading.Thread(target=asyncio.run, args=(main(),))
        thread.start()
        thread.join()
    elif ending == "close":
        loop = asyncio.new_event_loop()
        loop.run_until_complete(main())
        loop.close()
    else:
        asyncio.run(main())

def left_after(number):
    for done in range(number):
        once()
        if done % 50 == 0:
            gc.collect()                          # or what waits for it lets mappings grow that never shrink
    gc.collect()
    sys._clear_type_cache()  # which keeps the texts that name attributes, up to 4096
    known = len(registry._key_to_collection) + len(registry._collection_to_key)
    return len(gc.get_objects()), tracemalloc.get_traced_memory()[0], known

tracemalloc.start()
left_after(20)
before = left_after(1)
after = left_after(loops)
objects, size, known = (b - a for a, b in zip(before, after))
assert known == 0, known
assert abs(objects) <= 3, objects                 # a thread that was just ending
assert size < 40_000, size                        # some mapping that has grown to its next size, once
"""


def cases():
    for driver in ("aiosqlite", "memory", "asyncmy", "aiomysql"):
        for ending in ("run", "dispose", "close", "thread"):
            quick = (driver, ending) in (("aiosqlite", "run"), ("asyncmy", "thread"))
            yield pytest.param(driver, ending, 20 if quick else 900, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(("driver", "ending", "loops"), list(cases()))
def test_f40_loops_that_ended_leave_nothing(request, tmp_path, driver, ending, loops):
    """Objects counted one by one, and SQLAlchemy's registry, which keeps the listeners of a class for ever."""
    url = {"aiosqlite": f"sqlite+aiosqlite:///{tmp_path}/a.db", "memory": "sqlite+aiosqlite:///:memory:"}.get(driver)
    if url is None:
        url = request.getfixturevalue("mariadb_url").replace("pymysql", driver)
    run_python(ENDED, url, ending, str(loops), timeout=300)
