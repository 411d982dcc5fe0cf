"""green.mysql.kill: from where the side connection goes to the server, and who works."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from dbsession.core import fork
from dbsession.core.backends.mysql_kill import Thread
from dbsession.core.pool.stats import Stats
from dbsession.green import abandoned
from dbsession.green.mysql import kill


class Dialled(Exception):
    pass


@pytest.mark.parametrize(
    ("arguments", "source"), [({}, None), ({"bind_address": "127.0.0.2"}, ("127.0.0.2", 0))], ids=["any", "bound"]
)
def test_side_connection_comes_from_the_address_that_the_user_has_bound(arguments, source, monkeypatch):
    """The account may be allowed to come from there only."""

    def create_connection(address, timeout=None, source_address=None):
        raise Dialled(address, source_address)

    monkeypatch.setattr(kill.socket, "create_connection", create_connection)
    killer = kill.GreenKiller("shop", Stats())
    with pytest.raises(Dialled) as caught:
        killer.open_side(Thread(5, "h:1", ("10.0.0.1", 3306)), {"user": "u", **arguments})
    assert caught.value.args == (("10.0.0.1", 3306), source)


def test_hub_that_connects_in_a_forked_child_does_the_work_of_its_threads(monkeypatch):
    """As after gunicorn's preload, where the engine is made before the fork."""
    killer = kill.GreenKiller("shop", Stats())
    monkeypatch.setattr(fork, "epoch", fork.epoch + 1)
    main_hub, aside = object(), []
    monkeypatch.setattr(abandoned.hub, "here", lambda: main_hub)
    monkeypatch.setattr(abandoned.hub, "lasts", lambda: True)
    monkeypatch.setattr(abandoned.hub, "run_aside", lambda work, hub: aside.append(hub))
    monkeypatch.setattr(abandoned.hub, "run_in_thread", aside.append)
    connection = SimpleNamespace(local=None, peer=None, seen_as="h:1", thread_id=lambda: 5)
    killer.opened(connection, {})
    monkeypatch.setattr(abandoned.hub, "lasts", lambda: False)  # in a thread
    connection.on_abandon(connection)
    assert aside == [main_hub] and [each.id for each in killer.abandoned] == [5]
