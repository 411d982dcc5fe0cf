"""Run one command that must not outlive the tests: `python supervise.py FOLDER-TO-REMOVE-OR-'' SIGNAL-OR-0 COMMAND...`.

Whoever started this holds the other end of its stdin. When that closes, by close() or because the holder
died, even by SIGKILL, the command's process group and its children are killed and the folder removed (not after
`keep`, written to stdin: the folder has another command to serve). The signal, if one is given, comes before that: with
it the command ends by itself, in five seconds at most. On stdout, one line each:
`pid N` at the start and `exit N` when the command ends by itself (negative: the signal). Imports only the
standard library and is run as a file, so that nothing the tests do to their own process reaches it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable


def say(line: str) -> None:
    # The reader may be gone; the clean-up below is what matters then.
    with contextlib.suppress(OSError):
        os.write(1, f"{line}\n".encode())


def report_exit(pid: int) -> None:
    # WNOWAIT leaves the zombie in place: its pid, and so its process group's id, cannot be given to
    # anybody else before the killpg() below.
    info = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert info is not None
    say(f"exit {info.si_status if info.si_code == os.CLD_EXITED else -info.si_status}")


def children(pid: int) -> list[int]:
    """PostgreSQL's have process groups of their own, and stay for a while when it is gone: stopped, for ever."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{entry}/stat") as stat:
            if int(stat.read().rpartition(")")[2].split()[1]) == pid:
                found.append(int(entry))
    return found


def end(pid: int, signum: int, ended: threading.Thread) -> None:
    if signum and ended.is_alive():
        for each in (*children(pid), pid):
            send(os.kill, each, signal.SIGCONT)
        os.kill(pid, signum)
        ended.join(5.0)
    if ended.is_alive():
        send(os.kill, pid, signal.SIGSTOP)  # after that it starts no other one
    left = children(pid)
    send(os.killpg, pid, signal.SIGKILL)
    for each in left:
        send(os.kill, each, signal.SIGKILL)


def send(kill: Callable[[int, int], None], pid: int, signum: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        kill(pid, signum)


def main(folder: str, signum: int, command: list[str]) -> None:
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=2, start_new_session=True)
    say(f"pid {child.pid}")
    ended = threading.Thread(target=report_exit, args=(child.pid,), daemon=True)
    ended.start()
    keep = sys.stdin.buffer.read() == b"keep"
    end(child.pid, signum, ended)
    child.wait()
    if folder and not keep:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
