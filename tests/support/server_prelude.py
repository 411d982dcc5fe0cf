"""`support.prelude` and more, for scripts that see the server fail: argv[1] is the URL, argv[2] the control port.

server                        a `steering.ServerControl`
db                            the words of its kind of database: `dialects.dialect_of(url)`
session                       the proxy of the database "default", pool_size 20, once `configure()` was called
request, failure, ...         each a scope of its own, as a request of WSGI is
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

from sqlalchemy import event, exc, text

from support.dialects import dialect_of
from support.prelude import *  # noqa: F403  # for the scripts, as `__all__` says
from support.prelude import __all__ as _names
from support.prelude import checked_out, dbsession, join, spawn, wait_until
from support.steering import ServerControl

__all__ = [*_names, "concurrently", "configure", "connect_within", "exc", "failure", "fill", "nothing_in_use"]
__all__ += ["code", "db", "request", "running", "server", "session", "sys", "text", "threading", "url"]

url = sys.argv[1]
server = ServerControl(int(sys.argv[2]))
db = dialect_of(url)
code = db.code
session = dbsession.get_dbsession()


def configure(*, options: dict[str, Any] | None = None, **entry: Any) -> None:
    # Twenty that connect at once on a busy machine need more than the default's 10 s now and then.
    entry = {"connect_timeout_s": 60, **entry}
    dbsession.configure({"default": {"url": url, "options": {"pool_size": 20, **(options or {})}, **entry}})


def connect_within(seconds: float) -> None:
    """From now on the engine may take this long to connect, whatever its entry says: when the server is there, but the
    machine is busy, and short timeouts are for the time in which it is not. Ends with the next `configure()`."""
    engine = dbsession.get_engine()
    event.listen(engine, "do_connect", lambda _d, _r, _a, arguments: arguments.update(connect_timeout=seconds))


def request(statement: str = "SELECT 1", commit: bool = False) -> Any:
    """One scope with one statement; its first value."""
    with dbsession.session_scope():
        result = session.execute(text(statement))
        value = result.scalar() if result.returns_rows else None
        if commit:
            session.commit()
        return value


def failure(statement: str = "SELECT 1", commit: bool = False) -> exc.SQLAlchemyError | None:
    """What SQLAlchemy raised for a request, or None."""
    try:
        request(statement, commit)
    except exc.SQLAlchemyError as error:
        return error
    return None


def concurrently(work: Callable[..., Any], count: int = 20, timeout_s: float = 30.0) -> list[Any]:
    return join([spawn(work) for _ in range(count)], timeout_s)


def fill(count: int = 20) -> None:
    """Leaves the pool with that many idle connections."""
    barrier = threading.Barrier(count)

    def hold() -> None:
        with dbsession.session_scope():
            session.execute(text("SELECT 1"))
            barrier.wait(20)

    concurrently(hold, count)
    # Not at once: with reset="connection" each is cleaned first, aside.
    wait_until(lambda: dbsession.get_engine().pool.checkedin() == count, 10, "they are idle")


def running(part: str) -> int:
    """The server's number of the connection that runs a statement with `part` in it, as soon as there is one."""

    def find() -> list[int]:
        return [process["id"] for process in server.processlist() if part in (process["info"] or "")]

    return int(wait_until(find, 10, f"{part} runs")[0])


def nothing_in_use() -> None:
    pool = dbsession.get_engine().pool
    assert checked_out(dbsession.get_engine()) == 0, pool.status()
