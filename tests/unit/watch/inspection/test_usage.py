"""What `dbsession top` adds up, and how it writes what comes from a snapshot."""

from __future__ import annotations

import copy

import pytest

from dbsession.core.pool.stats import BOUNDS_S
from dbsession.errors import plain
from dbsession.watch.inspection.client import Collected
from dbsession.watch.inspection.usage import holders, usage
from dbsession.watch.top.text import duration, short_place, table

NONE = [0] * (len(BOUNDS_S) + 1)


def database(name="default", **values):
    """One of a snapshot; `slow` checkouts waited between 0.5 and 1 s, the others not at all."""
    slow, checkouts = values.pop("slow", 0), values.get("checkouts", 0)
    counts = NONE.copy()
    counts[0], counts[BOUNDS_S.index(1.0)] = checkouts - slow, slow
    waits = {"bounds_s": list(BOUNDS_S), "counts": counts, "sum_s": 0.0}
    zero = dict.fromkeys(("in_use", "idle", "waiting", "checkouts", "timeouts"), 0)
    return {"name": name, "limit": 20, **zero, **values, "waits": waits}


def worker(pid, *databases, **values):
    return {"pid": pid, "databases": list(databases), "holders": [], **values}


def test_usage_adds_the_workers_up():
    now = Collected(
        100.0,
        [
            worker(1, database(in_use=3, idle=1, waiting=2, checkouts=10, timeouts=1), database("audit", limit=5)),
            worker(2, database(in_use=4, idle=0, waiting=1, checkouts=20, timeouts=2)),
        ],
        [],
    )
    audit, default = usage(now)
    assert (audit.database, audit.limit, audit.in_use) == ("audit", 5, 0)
    assert (default.in_use, default.limit, default.idle, default.waiting) == (7, 40, 1, 3)
    assert (default.checkouts, default.timeouts, default.pid) == (30, 3, None)
    assert [(each.database, each.pid) for each in usage(now, by_process=True)] == [
        ("audit", 1),
        ("default", 1),
        ("default", 2),
    ]


def test_usage_has_the_rate_of_a_process_with_several_databases_of_a_name():
    """Of several managers, or of several event loops."""
    earlier = Collected(100.0, [worker(1, database(checkouts=100), database(checkouts=1000))], [])
    later = [worker(1, database(checkouts=104, slow=4), database(checkouts=1004))]
    [found] = usage(Collected(104.0, later, []), earlier)
    assert found.checkouts_per_s == 2 and found.wait_p50_s < 0.5 < found.wait_p99_s


def test_usage_has_no_limit_where_one_pool_has_none():
    [found] = usage(Collected(1.0, [worker(1, database()), worker(2, database(limit=None))], []))
    assert found.limit is None


def test_usage_has_no_rate_and_all_the_waits_without_an_earlier_look():
    [found] = usage(Collected(1.0, [worker(1, database(checkouts=4, slow=4))], []))
    assert found.checkouts_per_s is None and 0.5 < found.wait_p50_s < found.wait_p99_s < 1


def test_usage_has_the_rate_and_the_waits_since_the_earlier_look():
    earlier = Collected(100.0, [worker(1, database(checkouts=1000)), worker(2, database(checkouts=7))], [])
    later = [worker(1, database(checkouts=1010, slow=10)), worker(2, database(checkouts=17, slow=10))]
    [found] = usage(Collected(104.0, later, []), earlier)
    assert found.checkouts_per_s == 5 and found.wait_p50_s > 0.5
    [found] = usage(Collected(104.0, copy.deepcopy(earlier.workers), []), earlier)
    assert found.checkouts_per_s == 0 and found.wait_p50_s is None


def test_usage_counts_no_worker_as_busy_that_was_not_there_or_began_anew():
    earlier = Collected(100.0, [worker(1, database(checkouts=1000, slow=3))], [])
    [found] = usage(
        Collected(101.0, [worker(1, database(checkouts=5)), worker(2, database(checkouts=500))], []), earlier
    )
    assert found.checkouts_per_s == 0 and found.wait_p99_s is None


def test_holders_come_with_their_pid_and_in_order():
    one = worker(1, holders=[{"held_s": 1.0}])
    two = worker(2, holders=[{"held_s": 3.0}, {"held_s": 0.5}])
    now = Collected(1.0, [one, two], [])
    assert [(each["pid"], each["held_s"]) for each in holders(now)] == [(2, 3.0), (1, 1.0), (2, 0.5)]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("GET /orders/7", "GET /orders/7"),
        ("GET /müßig/日本", "GET /müßig/日本"),
        ("a\x1b[31mb\nc\td\x9b", r"a\x1b[31mb\nc\td\x9b"),
        ("a\u202eb\u2028c\ud800", r"a\u202eb\u2028c\ud800"),
    ],
)
def test_plain_leaves_no_character_that_could_do_anything(value, shown):
    assert plain(value) == shown


def test_durations_have_their_unit():
    shown = [duration(each) for each in (None, 0.0, 0.001, 0.0024, 0.9991, 0.9999, 59.96, 599, 3600)]
    assert shown == ["-", "<1 ms", "<1 ms", "2 ms", "999 ms", "1.0 s", "60.0 s", "599.0 s", "60 min"]


def test_place_keeps_the_last_folder():
    assert short_place("/srv/shop/views/orders.py:12 in f") == "views/orders.py:12 in f"
    assert short_place("orders.py:12 in f") == "orders.py:12 in f"
    assert short_place("an unknown place") == "an unknown place"


def test_table_is_aligned():
    assert table([("name", "n"), ("a", "100")], "lr") == ["name    n", "a     100"]
