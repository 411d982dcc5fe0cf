"""What runs again and again, in a hub and in a thread."""

from __future__ import annotations

from support.processes import run_script


def test_task_goes_on_after_a_turn_that_failed_and_is_one_in_each_process(mode):
    done = run_script(
        mode,
        """
        import os
        from dbsession.green.periodic import PeriodicTask

        turns = []

        def work():
            turns.append(len(turns))
            if turns[-1] in (0, 2):
                raise RuntimeError(f"turn {turns[-1]}")
            return 0.001

        sleep(0)  # where there is a hub, it runs there
        task = PeriodicTask(work)
        task._pause_s = 0.001
        for _ in range(10):
            task.start()
        wait_until(lambda: len(turns) >= 6)
        so_far = list(turns)  # they go on
        assert so_far == sorted(set(so_far))
        task.start()
        if os.fork() == 0:
            seen = len(turns)
            sleep(0.05)
            assert len(turns) == seen  # it has none
            task.start()
            wait_until(lambda: len(turns) > seen + 3)
            os._exit(0)
        assert os.waitpid(-1, 0)[1] == 0
        seen = len(turns)
        wait_until(lambda: len(turns) > seen + 3)
        """,
    )
    assert done.stderr.count("RuntimeError: turn") == 2


def test_task_keeps_no_process_running(mode):
    run_script(
        mode,
        """
        from dbsession.green.periodic import PeriodicTask

        turns = []
        sleep(0)  # where there is a hub, it runs there
        PeriodicTask(lambda: turns.append(1) or 0.001).start()
        wait_until(lambda: turns)
        if MODE != "threads":
            import gevent
            gevent.wait()  # returns when nothing is left to wait for
        """,
    )
