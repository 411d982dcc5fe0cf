"""Many units of work at once over a small pool, of which everything that can go wrong goes wrong at random.

Run as a script in a patched process: `from support import stress; stress.main()`. Its standard output is one JSON
report. Of each wave's units of work some are killed, some have 20 milliseconds, the server kills connections of all of
them, and in the first waves it is restarted. An attempt that ends with a database error is made again, with another
token; what each attempt was told is then compared with what is stored.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import logging
import random
import sys
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import gevent
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from support.admin import ServerAdmin
from support.dialects import dialect_of
from support.victim import KILLS, Boom, Managed, Told, Variant, expect, work
from support.waiting import wait_until

POOL_SIZE = 5
ARRIVALS_PER_S = 300  # about as many as the pool can serve
KILLED = 0.3
TIMED = 0.2
TIMEOUT_S = 0.02
ATTEMPTS_WITHIN_S = 100.0  # the server is away at each restart, and a slow machine serves all of them late


@dataclass
class Attempt:
    """One try of a unit of work, and what became of it."""

    token: str
    told: Told = field(default_factory=Told)

    @property
    def became(self) -> str:
        if self.told.committed:
            return "committed"
        return "unknown" if self.told.outcome == "unknown" else type(self.told.error).__name__


class Stress:
    """One run. Lives as long as its process."""

    def __init__(self, url: str, control_port: int, seed: int) -> None:
        self._variant = Variant(options={"pool_size": POOL_SIZE, "pool_timeout": ATTEMPTS_WITHIN_S})
        self._world = Managed(url, self._variant)
        self._admin, self._dialect = ServerAdmin(url, control_port), dialect_of(url)
        self._random = random.Random(seed)
        self._attempts: list[Attempt] = []
        self._faults: list[str] = []
        self._server_kills = 0
        self._left_alone = 0  # units of work that nobody killed and that had no timeout
        self._left_alone_committed = 0

    def run(self, waves: int, size: int, restarts: int) -> dict[str, Any]:
        gc.disable()  # what is left behind must not be found by the collector
        for wave in range(waves):
            requests = [
                gevent.spawn_later(self._random.uniform(0, size / ARRIVALS_PER_S), self._request, f"{wave}-{n}")
                for n in range(size)
            ]
            mischief = gevent.spawn(self._make_mischief, requests, wave < restarts)
            gevent.joinall(requests, 150)
            running = [request for request in requests if not request.dead]
            if running:
                self._faults.append(f"wave {wave}: {len(running)} requests wait for ever")
                gevent.killall(running)
            mischief.get(timeout=60)
            self._hold_every_connection()
        self._compare_with_what_is_stored()
        became = Counter(attempt.became for attempt in self._attempts)
        return {
            "faults": self._faults,
            "became": became,
            "server_kills": self._server_kills,
            "left_alone": self._left_alone,
            "left_alone_committed": self._left_alone_committed,
        }

    def _request(self, name: str) -> None:
        chance = self._random.random()
        if chance < KILLED:
            kill = self._random.choice(list(KILLS.values()))()
            # A quiet machine is done in a few milliseconds, a busy one in a hundred: kills land on both.
            after_s = self._random.uniform(0, self._random.choice([0.003, 0.02, 0.1]))
            gevent.spawn_later(after_s, gevent.getcurrent().kill, kill, block=False)
        timed = KILLED <= chance < KILLED + TIMED
        timeout_s = self._random.choice([0.003, TIMEOUT_S / 4, TIMEOUT_S]) if timed else None
        left_alone = chance >= KILLED + TIMED
        self._left_alone += left_alone
        until = time.monotonic() + ATTEMPTS_WITHIN_S
        try:
            for number in itertools.count():
                if self._attempt(f"{name}-{number}", timeout_s):
                    self._left_alone_committed += left_alone
                    return
                assert time.monotonic() < until, "only database errors"
                gevent.sleep(self._random.uniform(0.01, 0.1))
        except (gevent.GreenletExit, gevent.Timeout, Boom, TimeoutError):
            pass  # what it was killed with, or its own time
        except BaseException as error:
            self._faults.append(f"{name}: " + "".join(traceback.format_exception(error)))

    def _attempt(self, token: str, timeout_s: float | None) -> bool:
        """Whether it was carried out; False: the database refused it, and it may be made again."""
        attempt = Attempt(token)
        self._attempts.append(attempt)
        try:
            with gevent.Timeout(timeout_s, self._random.choice([None, Boom, TimeoutError])):
                work(self._world, self._variant, token, attempt.told)
            return True
        except DBAPIError as error:
            attempt.told.error = error
            # A killed connection or a server that goes away and comes back says nothing else.
            if not self._dialect.is_lost(error) and self._dialect.code(error) not in (0, self._dialect.CANCELLED):
                raise
            return False
        except BaseException as error:
            attempt.told.error = error
            raise

    def _make_mischief(self, requests: list[Any], restart: bool) -> None:
        # One thing after the other: nothing is asked of a server that is away.
        while not all(request.dead for request in requests):
            gevent.sleep(self._random.uniform(0, 0.02))
            if restart and sum(request.dead for request in requests) > len(requests) / 3:
                self._admin.control.restart()
                restart = False
                continue
            ids = sorted(self._admin.control.ids())
            for number in self._random.sample(ids, min(3, len(ids))):
                with contextlib.suppress(RuntimeError):  # it has ended meanwhile
                    self._admin.control.kill_connection(number)
                    self._server_kills += 1

    def _hold_every_connection(self) -> None:
        """No place of the pool is lost: as many as there should be hold a connection at once."""
        (engine,) = self._world.engines
        wait_until(lambda: engine.pool.checkedout() == 0, 20, "every connection is back")
        holding: list[int] = []

        def hold(n: int) -> None:
            with self._world.scope():
                expect(self._world.get("a").scalar(text("SELECT :n"), {"n": n}), n)
                holding.append(n)
                wait_until(lambda: len(holding) == POOL_SIZE, 20, "all places at once")

        gevent.joinall([gevent.spawn(hold, n) for n in range(POOL_SIZE)], 30, raise_error=True)
        assert engine.pool.checkedout() == 0

    def _compare_with_what_is_stored(self) -> None:
        wait_until(lambda: not self._admin.open_transactions(), 20, "no transaction is open at the server")
        rows = self._admin.sql("SELECT token, COUNT(*) AS n FROM unit GROUP BY token")
        stored = {row["token"]: row["n"] for row in rows}
        for attempt in self._attempts:
            lie = attempt.told.lie("a", stored.get(f"{attempt.token}-a", 0))
            if lie:
                self._faults.append(f"{attempt.token}: {lie}; {attempt.told.outcome!r}, {attempt.told.error!r}")


def main() -> None:
    url, *numbers = sys.argv[1:]
    control_port, seed, waves, size, restarts = map(int, numbers)
    logging.getLogger().addHandler(logging.NullHandler())  # what teardown says of lost connections is no error here
    print(json.dumps(Stress(url, control_port, seed).run(waves, size, restarts)))
