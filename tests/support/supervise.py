"""Run one command that must not outlive the tests: `python supervise.py FOLDER-TO-REMOVE-OR-'' COMMAND...`.

Whoever started this holds the other end of its stdin. When that closes, by close() or because the holder
died, even by SIGKILL, the command's process group is killed and the folder removed (not after `keep`, written
to stdin: the folder has another command to serve). On stdout, one line each:
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


def main(folder: str, command: list[str]) -> None:
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=2, start_new_session=True)
    say(f"pid {child.pid}")
    threading.Thread(target=report_exit, args=(child.pid,), daemon=True).start()
    keep = sys.stdin.buffer.read() == b"keep"
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    if folder and not keep:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
