"""The guard: a session used by another greenlet or thread than the one whose scope owns it is named."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.orm import Session

from dbsession import ConfigError, DBSessionMiddleware, ForeignSession, SessionManager, session_scope
from support.models import Base, Line, Order


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Callable[..., SessionManager]]:
    made: list[SessionManager] = []

    def make(**entry: Any) -> SessionManager:
        made.append(SessionManager({"default": {"url": f"sqlite:///{tmp_path / 'guard.db'}", **entry}}))
        Base.metadata.create_all(made[-1].engine())
        return made[-1]

    yield make
    for each in made:
        each.clear()
        each.dispose()


def in_greenlet(function: Callable[[], Any]) -> Any:
    return gevent.spawn(function).get(timeout=10)


def in_thread(function: Callable[[], Any]) -> Any:
    came: list[Any] = []

    def run() -> None:
        try:
            came.append(function())
        except Exception as error:
            came.append(error)

    thread = threading.Thread(target=run, name="other-thread")
    thread.start()
    thread.join(10)
    if isinstance(came[0], Exception):
        raise came[0]
    return came[0]


@pytest.mark.parametrize("elsewhere", [in_greenlet, in_thread])
def test_guard_raises_with_both_and_the_place_when_a_session_is_used_elsewhere(manager, elsewhere):
    proxy = manager(guard="raise").get()
    with session_scope("import of orders"):
        session = proxy()

        def work() -> None:
            session.execute(text("SELECT 1"))

        with pytest.raises(ForeignSession) as caught:
            elsewhere(work)
        assert not session.in_transaction()  # nothing was sent
    said = str(caught.value)
    assert "'default'" in said and "import of orders" in said and "(execute)" in said
    assert f"{__file__}:" in said.split("was used")[0] and "test_guard_raises" in said.split("was used")[0]
    other = said.split("was used")[1]
    assert f"{__file__}:" in other and "work" in other
    assert ("Greenlet-" in other) if elsewhere is in_greenlet else ("thread other-thread" in other)
    assert said.endswith("[DBS-FOREIGN]")


def test_guard_warns_once_a_session_and_lets_it_work(manager, caplog):
    proxy = manager(guard="warn").get()
    with session_scope("job"):
        session = proxy()
        for _ in range(3):
            assert in_greenlet(lambda: session.scalar(text("SELECT 7"))) == 7
    warned = [record for record in caplog.records if record.name == "dbsession.guard"]
    assert [record.levelno for record in warned] == [logging.WARNING]
    assert "the session of job" in warned[0].getMessage()


def test_guard_sees_an_attribute_loaded_elsewhere(manager):
    proxy = manager(guard="raise").get()
    with session_scope("loader"):
        proxy.add(Order(id=1, lines=[Line(id=1)]))
        proxy.commit()
        order = proxy.scalars(select(Order)).one()
        with pytest.raises(ForeignSession):
            in_greenlet(lambda: order.lines)


@pytest.mark.parametrize(
    "verb", ["add", "commit", "rollback", "flush", "get", "delete", "query", "connection", "merge"]
)
def test_guard_sees_each_verb(manager, verb):
    proxy = manager(guard="raise").get()
    with session_scope():
        session = proxy()
        with pytest.raises(ForeignSession, match=rf"\({verb}\)"):
            in_greenlet(getattr(session, verb))


def test_guard_is_silent_when_everybody_uses_their_own(manager, caplog):
    made = manager(guard="raise")
    proxy = made.get()

    def own() -> int:
        return int(proxy.scalar(text("SELECT 1")))

    with session_scope("outer"):
        outer = proxy()
        with session_scope("inner"):
            assert outer.scalar(text("SELECT 2")) == 2  # the outer one's own greenlet
            assert in_greenlet(own) == in_thread(own) == own() == 1
    outer = proxy()
    assert outer.scalar(text("SELECT 3")) == 3  # an implicit scope
    made.run_in_transaction(lambda session: session.execute(text("SELECT 4")))
    assert not caplog.records


def test_guard_is_silent_when_a_body_is_read_and_closed_elsewhere(manager, caplog):
    proxy = manager(guard="raise").get()

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [])
        session = proxy()
        session.execute(text("SELECT 1"))
        yield b"first"
        yield str(session.scalar(text("SELECT 2"))).encode()

    body = DBSessionMiddleware(app)({"REQUEST_METHOD": "GET", "PATH_INFO": "/"}, lambda *_: None)
    assert in_greenlet(lambda: next(body)) == b"first"
    assert in_greenlet(lambda: next(body)) == b"2"
    in_greenlet(body.close)
    assert not caplog.records


def test_guard_guards_a_class_of_the_users(manager):
    class Own(Session):
        def shout(self) -> str:
            return str(self.scalar(text("SELECT 'ahoy'"))).upper()

    proxy = manager(guard="raise", session={"class_": Own}).get()
    with session_scope():
        session = proxy()
        assert session.shout() == "AHOY"
        with pytest.raises(ForeignSession):
            in_greenlet(session.shout)


def test_guard_keeps_no_session_and_no_greenlet_alive(manager):
    import gc
    import weakref

    proxy = manager(guard="warn").get()
    gone: list[weakref.ref[Any]] = []

    def work() -> None:
        gone.append(weakref.ref(proxy()))

    gc.disable()
    try:
        greenlet = gevent.spawn(work)
        gone.append(weakref.ref(greenlet))
        greenlet.join(10)
        del greenlet
        for _ in range(3):
            gevent.sleep(0)  # its scope is ended in a greenlet of ours
        assert [reference() for reference in gone] == [None, None]
    finally:
        gc.enable()


def test_guard_comes_from_the_environment_below_the_key(manager, monkeypatch):
    monkeypatch.setenv("DBSESSION_GUARD", "raise")
    with session_scope():
        session = manager().get()()
        with pytest.raises(ForeignSession):
            in_greenlet(session.commit)
        unguarded = manager(guard="off").get()()
        in_greenlet(unguarded.commit)


def test_guard_off_costs_nothing(manager):
    session = manager(guard="off").get()()
    assert type(session).execute is Session.execute


@pytest.mark.parametrize(
    ("variable", "entry", "whose"), [("", {"guard": "on"}, "`guard`"), ("1", {}, "DBSESSION_GUARD")]
)
def test_guard_refuses_other_words(manager, monkeypatch, variable, entry, whose):
    monkeypatch.setenv("DBSESSION_GUARD", variable)
    with pytest.raises(ConfigError, match=rf"{whose} is .*\('off', 'warn', 'raise'\)"):
        manager(**entry)


def test_session_of_a_scope_that_is_over_refuses_as_closed_and_not_as_foreign(manager):
    session = manager(guard="raise").get()
    with session_scope("job") as scope:
        kept = session()
    assert scope.ended
    with pytest.raises(InvalidRequestError, match="closed"):
        kept.execute(text("SELECT 1"))
