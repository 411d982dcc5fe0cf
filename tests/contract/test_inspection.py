"""The inspection socket, as a process serves it and as `collect` asks it: patched, late patched, and in threads."""

from __future__ import annotations

import json
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from dbsession import SessionManager, snapshot
from dbsession.errors import ConfigError
from dbsession.watch.dashboard.history import History
from dbsession.watch.inspection import sockets as folders
from dbsession.watch.inspection.client import Collected, Unreadable, Workers, collect, summary, understood
from dbsession.watch.top.command import lines
from support.processes import run_python, run_script
from support.snapshots import HOSTILE, Served, database, worker

START = """
import json, os, socket, sys, threading
from pathlib import Path
from dbsession.watch.inspection import server
from dbsession.watch.inspection.client import collect

folder = Path(sys.argv[1], "sockets")
path = folder / f"{os.getpid()}.sock"
sleep(0)  # where there is gevent, there is a hub now

def connect():
    client = socket.socket(socket.AF_UNIX)
    client.connect(str(path))
    return client

def rest(client):
    with client, client.makefile("rb") as file:
        return file.read()
"""


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "sockets"


def left_behind(folder: Path, pid: int) -> Path:
    """The socket of a process that was killed."""
    path = folders.make(folder) / f"{pid}.sock"
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(path))
        killed.listen()
    return path


# -- serving ---------------------------------------------------------------------------------------------------


def test_socket_serves_one_snapshot_to_each_client_and_goes_with_the_process(mode, tmp_path, folder):
    run_script(
        mode,
        START
        + """
from sqlalchemy import text
dbsession.configure({"default": f"sqlite:///{sys.argv[1]}/a.db"})
session = dbsession.get_dbsession()
dbsession.serve_snapshots(folder)
with dbsession.session_scope("import"):
    session.execute(text("SELECT 1"))
    for _ in range(2):
        answer = rest(connect())
        assert answer.endswith(b"}\\n") and answer.count(b"\\n") == 1
        assert json.loads(answer)["pid"] == os.getpid()
        assert [each["scope"] for each in json.loads(answer)["holders"]] == ["import"]
assert folder.stat().st_mode & 0o777 == 0o700 and path.stat().st_mode & 0o777 == 0o600
assert os.listdir(folder) == [path.name]
""",
        tmp_path,
    )
    assert list(folder.iterdir()) == []


def test_socket_takes_no_notice_of_what_a_client_sends(mode, tmp_path):
    """It gets the whole answer and its end, and no error: neither at once nor when the answer has come already."""
    run_script(
        mode,
        START
        + """
dbsession.serve_snapshots(folder)
for at_once in (True, False) * 5:
    with connect() as client:
        received = b"" if at_once else client.recv(65536)
        client.sendall(b"POST /stop HTTP/1.1\\r\\n\\r\\n")
        while piece := client.recv(65536):
            received += piece
    assert json.loads(received)["pid"] == os.getpid()
assert [each["pid"] for each in collect(folder, 30).workers] == [os.getpid()]
""",
        tmp_path,
    )


def test_socket_drops_the_clients_that_do_not_close_and_answers_the_next(mode, tmp_path):
    run_script(
        mode,
        START
        + """
server.LINGER_S = 0.05
dbsession.serve_snapshots(folder)
lazy = [connect() for _ in range(server.CLIENTS)]
assert [each["pid"] for each in collect(folder, 30).workers] == [os.getpid()]
wait_until(lambda: not server._server._clients, 20)
for client in lazy:
    assert json.loads(rest(client))["pid"] == os.getpid()
""",
        tmp_path,
    )


@pytest.mark.slow
def test_socket_drops_the_clients_that_do_not_read_and_answers_the_next(mode, tmp_path):
    """More is sent than the kernel takes, and as many do not read it as are answered at a time."""
    run_script(
        mode,
        START
        + """
from types import SimpleNamespace
scope = {"label": "x" * 8_000_000, "kind": "block", "age_s": 0.0, "sessions": []}
large = {"version": 1, "pid": os.getpid(), "time_s": 0.0, "databases": [], "holders": [], "scopes": [scope]}
server.snapshot = lambda: SimpleNamespace(as_dict=lambda: large)
dbsession.serve_snapshots(folder)
lazy = [connect() for _ in range(server.CLIENTS)]
assert collect(folder, 40).workers == [large]
wait_until(lambda: not server._server._clients, 40)
for client in lazy:
    assert len(rest(client)) < 8_000_000
""",
        tmp_path,
    )


def test_child_serves_nothing_until_it_says_so_and_the_parent_goes_on_when_forked(mode, tmp_path, folder):
    """The child's descriptor is not the parent's socket any more, and its end leaves the parent's path alone."""
    run_script(
        mode,
        START
        + """
import gc
dbsession.serve_snapshots(folder)
lazy = connect()
opened = lambda fd: os.readlink(f"/proc/self/fd/{fd}")
descriptor = server._server._listener.fileno()
inherited, ours = opened(descriptor), os.getpid()
child = os.fork()
if not child:
    assert server._server is None
    assert inherited not in map(opened, filter(lambda fd: os.path.lexists(f"/proc/self/fd/{fd}"), range(3, 100)))
    sleep(0.01)
    gc.collect()
    assert not (folder / f"{os.getpid()}.sock").exists() and path.exists()
    dbsession.serve_snapshots(folder)
    path = folder / f"{os.getpid()}.sock"
    assert json.loads(rest(connect()))["pid"] == os.getpid()
    sys.exit()
wait_until(lambda: os.waitpid(child, os.WNOHANG) == (child, 0), 20)
assert json.loads(rest(lazy))["pid"] == ours and json.loads(rest(connect()))["pid"] == ours
assert os.listdir(folder) == [path.name]
""",
        tmp_path,
    )
    assert list(folder.iterdir()) == []


def test_socket_moves_when_served_in_another_folder_and_ends_when_stopped(mode, tmp_path):
    run_script(
        mode,
        START
        + """
other = Path(sys.argv[1], "other")
dbsession.serve_snapshots(folder)
dbsession.serve_snapshots(other)
assert os.listdir(folder) == [] and os.listdir(other) == [path.name]
assert [each["pid"] for each in collect(other, 30).workers] == [os.getpid()]
server.stop()
server.stop()
assert os.listdir(other) == [] and collect(other, 10).workers == []
wait_until(lambda: sys.argv[1] not in Path("/proc/net/unix").read_text(), 10)
""",
        tmp_path,
    )


@pytest.mark.parametrize("mode", ["patched", "late"])
def test_socket_keeps_no_loop_running(mode, tmp_path):
    run_script(
        mode,
        START
        + """
import gevent
dbsession.serve_snapshots(folder)
assert [each["pid"] for each in collect(folder, 30).workers] == [os.getpid()]
assert gevent.get_hub().join(timeout=20), "the loop did not end by itself"
""",
        tmp_path,
    )


def test_socket_answers_when_the_only_hub_is_blocked_before_it_was_made(tmp_path):
    """Without gevent the program never lets anybody run: a thread of ours answers."""
    run_python(
        """
import sys, dbsession, socket, os, json
dbsession.serve_snapshots(sys.argv[1] + "/sockets")
client = socket.socket(socket.AF_UNIX)
client.connect(f"{sys.argv[1]}/sockets/{os.getpid()}.sock")
with client, client.makefile() as file:
    assert json.load(file)["pid"] == os.getpid()
""",
        tmp_path,
    )


# -- the folder ------------------------------------------------------------------------------------------------


def test_sockets_of_killed_processes_are_removed_when_another_serves(mode, tmp_path, folder):
    left_behind(folder, 4_000_001)
    (folder / "README").write_text("somebody else's")
    run_script(
        mode,
        START
        + """
dbsession.serve_snapshots(folder)
assert sorted(os.listdir(folder)) == sorted(["README", path.name])
""",
        tmp_path,
    )


def test_folder_with_a_mode_for_others_is_refused_and_left_as_it_is(folder):
    folder.mkdir(0o750)
    with pytest.raises(ConfigError, match=r"has mode 0750: .* `chmod 0700 .*`.* \[DBS-CONFIG\]"):
        folders.make(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o750


def test_folder_is_refused_when_it_is_a_link_or_a_file_or_cannot_be_made(tmp_path, folder):
    (tmp_path / "own").mkdir(0o700)
    folder.symlink_to(tmp_path / "own")
    with pytest.raises(ConfigError, match="is no folder"):
        folders.make(folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is no folder"):
        folders.make(tmp_path / "file")
    with pytest.raises(ConfigError, match="cannot be used: File exists"):
        folders.make(tmp_path / "file" / "sockets")


def test_folder_of_another_user_is_refused(folder, monkeypatch):
    folder.mkdir(0o700)
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 4321)
    with pytest.raises(ConfigError, match=f"belongs to the user number {owner} and this process is {owner + 4321}"):
        folders.make(folder)


def test_folder_is_refused_when_a_socket_in_it_would_have_too_long_a_name(tmp_path):
    with pytest.raises(ConfigError, match=r"has a name of \d+ bytes; a Unix socket's leaves it 88\. Choose a shorter"):
        folders.make(tmp_path / ("x" * 90))
    assert list(tmp_path.iterdir()) == []


# -- collecting ------------------------------------------------------------------------------------------------


def test_collect_finds_nobody_where_there_is_no_folder(folder):
    found = collect(folder)
    assert (found.workers, found.silent) == ([], [])


def test_collect_raises_when_the_folder_is_none(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be used: Not a directory"):
        collect(tmp_path / "file")


def test_collect_removes_the_sockets_of_killed_processes_and_nothing_else(folder):
    left_behind(folder, 4_000_001)
    (folder / "4000002.sock").write_text("no socket")
    (folder / "other.sock").symlink_to(folder)
    found = collect(folder)
    assert (found.workers, found.silent, list(found.unreadable)) == ([], [], [4_000_002])
    assert sorted(path.name for path in folder.iterdir()) == ["4000002.sock", "other.sock"]


def test_collect_does_not_wait_longer_for_a_silent_process_than_it_may(folder):
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(folders.make(folder) / "4000001.sock"))
        silent.listen()
        found = collect(folder, 0.05)
    assert (found.workers, found.silent) == ([], [4_000_001])


# -- what cannot be read -----------------------------------------------------------------------------------------------


def answered(snapshot: Any, **values: Any) -> bytes:
    return json.dumps({**snapshot, **values}).encode()


ODD: dict[str, tuple[bytes, str]] = {
    "nothing": (b"{", "no whole JSON"),
    "nesting": (b"[" * 100_000, "no whole JSON"),
    "bytes": (b"\xff\xfe\xff", "no whole JSON"),
    "digits": (b'{"version": ' + b"1" * 10_000 + b"}", "no whole JSON"),
    "null": (b"null", "no snapshot of version 1"),
    "version": (answered(worker(7), version=2), "no snapshot of version 1"),
    "pid": (answered(worker(8)), "is that of pid 8"),
    "size": (b" " * (17 << 20), "has more than"),
    "missing": (answered({"version": 1, "pid": 7}), "snapshot has no databases"),
    "list": (answered(worker(7), databases={}), "databases is of another kind"),
    "nan": (answered(worker(7), time_s=float("nan")), "time_s is out of range"),
    "infinity": (answered(worker(7)).replace(b'"time_s": 0.0', b'"time_s": 1e999'), "time_s is out of range"),
    "bounds": (
        answered(worker(7, database(waits={"bounds_s": [1.0], "counts": [0, 0], "sum_s": 0.0}))),
        "other bounds",
    ),
}


@pytest.mark.parametrize("odd", ODD)
def test_collect_says_what_is_odd_about_an_answer_and_hears_the_others(folder, odd):
    answer, what = ODD[odd]
    with Served(folder, worker(7), worker(8)) as served:
        served.said[7] = answer
        found = collect(folder, 30)
    assert ([each["pid"] for each in found.workers], found.silent) == ([8], [])
    assert "gave an answer that cannot be read (" in found.unreadable[7] and what in found.unreadable[7]
    assert summary(found) == f"1 worker, pid 7 {found.unreadable[7]}"


def test_collect_says_who_is_no_socket_and_whose_socket_is_another_users(folder):
    with Served(folder, worker(1), worker(2)) as served:
        (folder / "3.sock").write_text("a file")
        (folder / "4.sock").symlink_to(folder / "1.sock")
        wrong = [3, 4]
        if os.geteuid() == 0:  # only root gives files away
            os.chown(folder / "2.sock", 4321, -1)
            wrong = [2, 3, 4]
        found = collect(served.folder, 30)
    assert list(found.unreadable) == wrong and found.workers[0]["pid"] == 1
    assert all(what.startswith("cannot be asked (") for what in found.unreadable.values())


LEAVES = (None, True, -1, 2**70, 1.5, float("nan"), "", HOSTILE, [], {}, [[[]]])


def mutated(value: Any) -> Iterator[Any]:
    """`value` with each part of it, one at a time, taken out, doubled, or something else."""
    yield from LEAVES
    if isinstance(value, dict):
        for key, part in value.items():
            yield {other: each for other, each in value.items() if other != key}
            yield from ({**value, key: changed} for changed in mutated(part))
        yield {**value, HOSTILE: HOSTILE}
    elif isinstance(value, list) and value:
        yield value + value
        yield value[1:]
        yield from ([changed, *value[1:]] for changed in mutated(value[0]))


def test_whatever_a_snapshot_is_made_into_is_shown_or_refused(tmp_path):
    """A real one, every part of it changed in every way: no face meets what it cannot show."""
    manager = SessionManager({"default": f"sqlite:///{tmp_path}/a.db"})
    with manager.scope("a job"):
        manager.get().execute(text("SELECT 1"))
        real = json.loads(json.dumps(snapshot().as_dict()))
    manager.dispose()
    assert real["databases"] and real["holders"] and real["scopes"]
    before = understood(json.dumps(real).encode(), real["pid"])
    shown = refused = 0
    for changed in mutated(real):
        try:
            read = understood(json.dumps(changed).encode(), real["pid"])
        except Unreadable as error:
            refused += 1
            assert str(error).isprintable()
            continue
        shown += 1
        now, history = Collected(2.0, [read]), History()
        assert all(line.isprintable() for line in lines(now))
        for look in (Collected(1.0, [before]), now, Collected(3.0, [before])):
            history.add(look)
            assert json.dumps(history.answer("", 3.0), ensure_ascii=False, allow_nan=False).isprintable()
    assert shown > 50 and refused > 500


# -- who answers late --------------------------------------------------------------------------------------------------


def test_late_worker_keeps_its_last_snapshot_until_it_answers_or_is_gone(folder):
    with Served(folder, worker(1, database(in_use=3)), worker(2)) as served:
        workers = Workers(folder)
        assert workers.look(30).late == {}
        served.said[1] = None
        first, second = workers.look(0.3), workers.look(0.3)
        for look in (first, second):
            assert [each["pid"] for each in look.workers] == [1, 2] and look.silent == []
            assert look.workers[0]["databases"][0]["in_use"] == 3
        assert 0 < first.late[1] < second.late[1] and summary(second) == "2 workers"
        served.said[1] = worker(1, database(in_use=4))
        answered = workers.look(30)
        assert answered.late == {} and answered.workers[0]["databases"][0]["in_use"] == 4
        served.said[1] = None
        assert list(workers.look(0.3).late) == [1]
        served.end(1)
        assert [each["pid"] for each in workers.look(30).workers] == [2]


def test_worker_that_has_never_answered_or_answers_nonsense_has_no_last_snapshot(folder):
    with Served(folder, worker(1), worker(2)) as served:
        workers = Workers(folder)
        served.said[1] = None
        assert workers.look(0.3).silent == [1]
        served.said[2] = b"{}"
        look = workers.look(0.3)
        assert (look.workers, look.silent, list(look.unreadable)) == ([], [1], [2])
        served.said[2] = None
        assert workers.look(0.3).silent == [1, 2]
