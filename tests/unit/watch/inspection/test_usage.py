"""What `dbsession top` adds up, and how it writes what comes from a snapshot."""

from __future__ import annotations

import copy

import pytest

from dbsession.errors import plain
from dbsession.watch.inspection.client import Collected
from dbsession.watch.inspection.usage import holders, usage
from dbsession.watch.top.text import duration, short_call_site, table
from support.snapshots import HARMLESS, HOSTILE, database, holder, worker


def test_usage_adds_the_workers_up():
    now = Collected(
        100.0,
        [
            worker(1, database(in_use=3, idle=1, waiting=2, checkouts=10, timeouts=1), database("audit", limit=5)),
            worker(2, database(in_use=4, idle=0, waiting=1, checkouts=20, timeouts=2)),
        ],
    )
    audit, default = usage(now)
    assert (audit.database, audit.limit, audit.in_use) == ("audit", 5, 0)
    assert (default.in_use, default.limit, default.idle, default.waiting) == (7, 40, 1, 3)
    assert (default.counts["checkouts"], default.counts["timeouts"], default.pid) == (30, 3, None)
    assert [(each.database, each.pid) for each in usage(now, by_process=True)] == [
        ("audit", 1),
        ("default", 1),
        ("default", 2),
    ]


def test_usage_has_the_rate_of_a_process_with_several_databases_of_a_name():
    """Of several managers, or of several event loops."""
    earlier = Collected(100.0, [worker(1, database(checkouts=100), database(checkouts=1000))])
    later = [worker(1, database(checkouts=104, slow=4), database(checkouts=1004))]
    [found] = usage(Collected(104.0, later), earlier)
    assert found.checkouts_per_s == 2 and found.wait_p50_s < 0.5 < found.wait_p99_s


def test_usage_has_no_limit_where_one_pool_has_none():
    [found] = usage(Collected(1.0, [worker(1, database()), worker(2, database(limit=None))]))
    assert found.limit is None


def test_usage_has_no_rate_and_all_the_waits_without_an_earlier_look():
    [found] = usage(Collected(1.0, [worker(1, database(checkouts=4, slow=4))]))
    assert found.checkouts_per_s is None and 0.5 < found.wait_p50_s < found.wait_p99_s < 1


def test_usage_has_the_rate_and_the_waits_since_the_earlier_look():
    earlier = Collected(100.0, [worker(1, database(checkouts=1000)), worker(2, database(checkouts=7))])
    later = [worker(1, database(checkouts=1010, slow=10)), worker(2, database(checkouts=17, slow=10))]
    [found] = usage(Collected(104.0, later), earlier)
    assert found.checkouts_per_s == 5 and found.wait_p50_s > 0.5
    [found] = usage(Collected(104.0, copy.deepcopy(earlier.workers)), earlier)
    assert found.checkouts_per_s == 0 and found.wait_p50_s is None


def test_usage_counts_no_worker_as_busy_that_was_not_there_or_began_anew():
    earlier = Collected(100.0, [worker(1, database(checkouts=1000, slow=3))])
    [found] = usage(Collected(101.0, [worker(1, database(checkouts=5)), worker(2, database(checkouts=500))]), earlier)
    assert found.checkouts_per_s == 0 and found.wait_p99_s is None


def test_holders_come_with_their_pid_and_age_and_in_order():
    one, two = worker(1, holders=[holder()]), worker(2, holders=[holder(held_s=3.0), holder(held_s=0.5)])
    now = Collected(1.0, [one, two], late={1: 4.0})
    found = [(each["pid"], each["held_s"], each["late_s"]) for each in holders(now)]
    assert found == [(2, 3.0, 0.0), (1, 1.0, 4.0), (2, 0.5, 0.0)]


def test_usage_counts_who_waited_in_vain_since_the_earlier_look():
    """In one of several pools of a name, too."""
    earlier = Collected(1.0, [worker(1, database(timeouts=3), database(timeouts=5))])
    later = Collected(2.0, [worker(1, database(timeouts=5), database(timeouts=5)), worker(2, database(timeouts=9))])
    [found] = usage(later, earlier)
    assert (found.timed_out, found.counts["timeouts"]) == (2, 19) and usage(later)[0].timed_out == 0


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("GET /orders/7", "GET /orders/7"),
        ("GET /müßig/日本", "GET /müßig/日本"),
        ("a\x1b[31mb\nc\td\x9b", r"a\x1b[31mb\nc\td\x9b"),
        ("a\u202eb\u2028c\ud800\u200b\ufeff", r"a\u202eb\u2028c\ud800\u200b\ufeff"),
        (HOSTILE, HARMLESS),
        (HARMLESS, HARMLESS),
    ],
)
def test_plain_leaves_no_character_that_could_do_anything(value, shown):
    assert plain(value) == shown


def test_durations_have_their_unit():
    shown = [duration(each) for each in (None, 0.0, 0.001, 0.0024, 0.9991, 0.9999, 59.96, 599, 3600)]
    assert shown == ["-", "<1 ms", "<1 ms", "2 ms", "999 ms", "1.0 s", "60.0 s", "599.0 s", "60 min"]


def test_call_site_keeps_the_last_folder():
    assert short_call_site("/srv/shop/views/orders.py:12 in f") == "views/orders.py:12 in f"
    assert short_call_site("orders.py:12 in f") == "orders.py:12 in f"
    assert short_call_site("an unknown place") == "an unknown place"


def test_table_is_aligned():
    assert table([("name", "n"), ("a", "100")], "lr") == ["name    n", "a     100"]
