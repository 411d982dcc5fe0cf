"""What the dashboard keeps of the last minutes, and what a page gets that has a part of it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dbsession.core.pool.stats import BOUNDS_S
from dbsession.watch.dashboard import history as history_module
from dbsession.watch.dashboard.history import INTERVAL_S, KEPT_S, SHOWN_ROWS, WINDOW_S, History, Point
from dbsession.watch.inspection.client import Collected


def histogram(bucket: int = 0, count: int = 0) -> dict[str, Any]:
    counts = [0] * (len(BOUNDS_S) + 1)
    counts[bucket] = count
    return {"bounds_s": list(BOUNDS_S), "counts": counts, "sum_s": 0.0}


def database(name: str = "default", **values: Any) -> dict[str, Any]:
    zero = dict.fromkeys(("in_use", "idle", "waiting", "checkouts", "connects", "invalidated", "timeouts", "kills"), 0)
    zero |= {"teardown_failures": 0, "retries": 0}
    fixed = {"name": name, "backend": "sqlite", "size": 20, "limit": 20, "waits": histogram(), "holds": histogram()}
    return {**zero, **fixed, **values}


def worker(pid: int = 1, *databases: dict[str, Any], **values: Any) -> dict[str, Any]:
    return {"version": 1, "pid": pid, "databases": databases, "holders": [], "scopes": [], **values}


def look(time_s: float, *workers: dict[str, Any], silent: tuple[int, ...] = ()) -> Collected:
    return Collected(time_s, list(workers), list(silent))


def points(history: History, cursor: str = "", name: str = "default") -> list[Point]:
    answer = json.loads(json.dumps(history.answer(cursor, 0.0)))
    (found,) = [each for each in answer["databases"] if each["name"] == name]
    assert tuple(answer["point"]) == Point._fields
    return [Point(*values) for values in found["points"]]


def test_history_adds_up_all_workers() -> None:
    """Uses, limits and those who wait; the counts too."""
    history = History()
    history.add(look(10, worker(1, database(in_use=3, kills=1)), worker(2, database(in_use=4, waiting=2, kills=5))))
    assert points(history) == [Point(10, in_use=7, limit=40, waiting=2)]
    (found,) = history.answer("", 10.0)["databases"]
    assert found["counts"]["kills"] == 6 and found["counts"]["backend"] == "sqlite"


def test_history_has_no_limit_when_one_worker_has_none() -> None:
    history = History()
    history.add(look(10, worker(1, database(limit=None)), worker(2, database())))
    assert points(history)[0].limit is None


def test_history_tells_rate_and_quantiles_of_the_last_seconds_only() -> None:
    """Not of all that was counted before."""
    history = History()
    slow, bound_s = BOUNDS_S.index(1.0), 1.0
    history.add(look(10, worker(1, database(checkouts=1000, waits=histogram(slow, 1000)))))
    assert points(history)[0][4:] == (None, None, None)
    waits = histogram(slow, 1000)
    waits["counts"][0] = 10
    history.add(look(12, worker(1, database(checkouts=1010, waits=waits))))
    last = points(history)[-1]
    assert last.checkouts_per_s == 5
    assert last.wait_p99_s is not None and last.wait_p99_s < BOUNDS_S[0] < bound_s
    history.add(look(12 + WINDOW_S, worker(1, database(checkouts=1010, waits=waits))))
    assert points(history)[-1][4:] == (0, None, None)


def test_history_counts_on_when_a_worker_is_replaced() -> None:
    """The new one has counted less; that is neither a negative rate nor a burst."""
    history = History()
    history.add(look(10, worker(1, database(checkouts=1000)), worker(2, database(checkouts=50))))
    history.add(look(11, worker(1, database(checkouts=1001)), worker(3, database(checkouts=700))))
    assert points(history)[-1].checkouts_per_s == 1


def test_history_gives_only_what_is_new_since_the_cursor() -> None:
    history = History()
    history.add(look(10, worker(1, database())))
    cursor = history.answer("", 10.0)["cursor"]
    assert points(history, cursor) == []
    history.add(look(11, worker(1, database())))
    assert [point.time_s for point in points(history, cursor)] == [11]


@pytest.mark.parametrize(
    "cursor", ["", "-", "nonsense", "0-1", "{id}-", "{id}--1", "{id}-x", "{id}-²", "{id}-" + "9" * 9999]
)
def test_history_gives_all_when_the_cursor_is_not_its_own(cursor: str) -> None:
    """One of a dashboard before this one, or anything else."""
    history = History()
    history.add(look(10, worker(1, database())))
    own = history.answer("", 10.0)["cursor"].partition("-")[0]
    assert len(points(history, cursor.replace("{id}", own))) == 1


def test_history_keeps_the_last_minutes_and_no_more() -> None:
    history = History()
    for number in range(int(KEPT_S / INTERVAL_S) + 10):
        history.add(look(number * INTERVAL_S, worker(1, database())))
    kept = points(history)
    assert kept[-1].time_s - kept[0].time_s == KEPT_S - INTERVAL_S


def test_history_shows_a_gap_while_no_worker_answers_and_forgets_what_is_only_gaps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(history_module, "KEPT_S", 3 * INTERVAL_S)
    history = History()
    history.add(look(10, worker(1, database(in_use=1))))
    history.add(look(11))
    assert [point.in_use for point in points(history)] == [1, None]
    assert history.answer("", 11.0)["databases"][0]["counts"] is None
    history.add(look(12))
    history.add(look(13))
    assert history.answer("", 13.0)["databases"] == []


def test_history_tells_when_somebody_last_waited_in_vain() -> None:
    """Not when a worker with timeouts behind it appears."""
    history = History()
    history.add(look(10, worker(1, database(timeouts=3))))
    history.add(look(11, worker(1, database(timeouts=3)), worker(2, database(timeouts=9))))
    assert history.answer("", 11.0)["databases"][0]["timed_out_s"] is None
    history.add(look(12, worker(1, database(timeouts=4))))
    history.add(look(13, worker(1, database(timeouts=4))))
    assert history.answer("", 13.0)["databases"][0]["timed_out_s"] == 12


def test_history_puts_the_longest_first_and_bounds_the_answer() -> None:
    """Each row with its worker."""
    held = [{"held_s": float(number)} for number in range(SHOWN_ROWS)]
    scopes = [{"age_s": float(number)} for number in range(SHOWN_ROWS)]
    parts = {"holders": held, "scopes": scopes}
    history = History()
    history.add(look(10, worker(1, **parts), worker(2, **parts), silent=(3,)))
    answer = history.answer("", 12.5)
    assert [row["held_s"] for row in answer["holders"][:3]] == [SHOWN_ROWS - 1, SHOWN_ROWS - 1, SHOWN_ROWS - 2]
    assert {row["pid"] for row in answer["scopes"]} == {1, 2}
    assert len(answer["holders"]) == len(answer["scopes"]) == SHOWN_ROWS
    assert answer["more_holders"] == answer["more_scopes"] == SHOWN_ROWS
    assert (answer["workers"], answer["silent"], answer["age_s"]) == ([1, 2], [3], 2.5)
