"""green.mysql.kill: from where the side connection goes to the server."""

from __future__ import annotations

import pytest

from dbsession.core.backends.mysql_kill import Thread
from dbsession.core.pool.stats import Stats
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
    killer.arguments = {"user": "u", **arguments}
    with pytest.raises(Dialled) as caught:
        killer._kill(Thread(5, "h:1", ("10.0.0.1", 3306)))
    assert caught.value.args == (("10.0.0.1", 3306), source)
