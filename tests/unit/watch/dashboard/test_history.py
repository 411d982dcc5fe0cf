"""What the dashboard keeps of the last minutes, and what a page gets that has a part of it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dbsession.core.pool.stats import BOUNDS_S
from dbsession.watch.dashboard import history as history_module
from dbsession.watch.dashboard.history import INTERVAL_S, KEPT_S, SHOWN_ROWS, WINDOW_S, History, Point
from dbsession.watch.inspection.client import Collected
from support.snapshots import database, holder, scope, worker


def look(time_s: float, *workers: dict[str, Any], **others: Any) -> Collected:
    return Collected(time_s, list(workers), **others)


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
    assert found["counts"]["kills"] == 6 and found["backend"] == "sqlite"


def test_history_has_no_limit_when_one_worker_has_none() -> None:
    history = History()
    history.add(look(10, worker(1, database(limit=None)), worker(2, database())))
    assert points(history)[0].limit is None


def test_history_tells_rate_and_quantiles_of_the_last_seconds_only() -> None:
    """Not of all that was counted before."""
    history = History()
    history.add(look(10, worker(1, database(checkouts=1000, slow=1000))))
    assert points(history)[0][4:] == (None, None, None)
    later = worker(1, database(checkouts=1010, slow=1000))
    history.add(look(12, later))
    last = points(history)[-1]
    assert last.checkouts_per_s == 5
    assert last.wait_p99_s is not None and last.wait_p99_s < BOUNDS_S[0]
    history.add(look(12 + WINDOW_S, later))
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
    """Within the window; not when a worker with timeouts behind it appears."""
    history = History()
    history.add(look(10, worker(1, database(timeouts=3))))
    history.add(look(11, worker(1, database(timeouts=3)), worker(2, database(timeouts=9))))
    assert history.answer("", 11.0)["databases"][0]["timed_out_s"] is None
    history.add(look(12, worker(1, database(timeouts=4))))
    for time_s in (13, 13 + WINDOW_S):
        history.add(look(time_s, worker(1, database(timeouts=4))))
    assert history.answer("", 13.0)["databases"][0]["timed_out_s"] == 13


def test_history_puts_the_longest_first_and_bounds_the_answer() -> None:
    """Each row with its worker."""
    held = [holder(held_s=float(number)) for number in range(SHOWN_ROWS)]
    scopes = [scope(age_s=float(number)) for number in range(SHOWN_ROWS)]
    workers = [worker(pid, holders=held, scopes=scopes) for pid in (1, 2)]
    history = History()
    history.add(look(10, *workers, silent=[3]))
    answer = history.answer("", 12.5)
    assert [row["held_s"] for row in answer["holders"][:3]] == [SHOWN_ROWS - 1, SHOWN_ROWS - 1, SHOWN_ROWS - 2]
    assert {row["pid"] for row in answer["scopes"]} == {1, 2}
    assert len(answer["holders"]) == len(answer["scopes"]) == SHOWN_ROWS
    assert answer["more_holders"] == answer["more_scopes"] == SHOWN_ROWS
    assert (answer["workers"], answer["summary"], answer["level"]) == (2, "2 workers, silent: 3", "waiting")
    assert answer["age_s"] == 2.5


@pytest.mark.parametrize(
    ("others", "summary", "level"),
    [
        ({}, "1 worker", "fine"),
        ({"late": {1: 4.2}}, "1 worker", "waiting"),
        ({"unreadable": {7: "is odd"}}, "1 worker, pid 7 is odd", "waiting"),
    ],
)
def test_history_says_who_did_not_answer_well(others: dict[str, Any], summary: str, level: str) -> None:
    history = History()
    history.add(look(10, worker(1, holders=[holder()]), **others))
    answer = history.answer("", 10.0)
    assert (answer["summary"], answer["level"]) == (summary, level)
    assert answer["late"] == list(others.get("late", {}).items())
    assert answer["holders"][0]["late_s"] == others.get("late", {}).get(1, 0.0)
