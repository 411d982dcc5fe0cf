"""Other processes: supervised servers, and Python scripts in a fresh interpreter."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import NoReturn

from .waiting import wait_until

TESTS = Path(__file__).resolve().parents[1]
MODES = ("patched", "late", "threads")


def missing(what: str) -> NoReturn:
    """Fail the test that needs it where tests/run may install Debian's packages; elsewhere skip it."""
    import pytest  # not for the scripts that use this module

    sudo = [] if os.geteuid() == 0 else ["sudo", "-n"]
    may = shutil.which("apt-get") and subprocess.run([*sudo, "true"], capture_output=True, check=False).returncode == 0
    if may:
        pytest.fail(f"{what}; tests/run installs it", pytrace=False)
    pytest.skip(f"{what}; tests/run may not install it here")


class Supervised:
    """A running command; `close()`, or the death of this process in any way, kills it, its group and its children.

    Args:
        command: the program and its arguments; it gets a process group of its own.
        log: its stdout and stderr are appended to this file.
        remove: a folder that is removed at the end, too.
        end: a signal with which it ends by itself, sent before it is killed; 0 for none.
    """

    def __init__(
        self,
        command: list[str],
        *,
        log: Path,
        remove: Path | None = None,
        env: dict[str, str] | None = None,
        cwd: Path | None = None,
        end: int = 0,
    ) -> None:
        self.log = log
        self._status: int | None = None
        supervisor = str(Path(__file__).with_name("supervise.py"))
        with log.open("ab") as output:
            self._supervisor = subprocess.Popen(
                [sys.executable, supervisor, str(remove or ""), str(int(end)), *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                bufsize=0,
                env=env,
                cwd=cwd,
                # Control-C at the terminal is for the tests; they close what they started.
                start_new_session=True,
            )
        line = self._line(60.0)
        if not line.startswith("pid "):
            self.close()
            raise RuntimeError(f"could not start {command[0]}:\n{log.read_text(errors='replace')}")
        self.pid = int(line.split()[1])

    def _line(self, timeout_s: float) -> str:
        stdout = self._supervisor.stdout
        assert stdout is not None
        ready, _, _ = select.select([stdout], [], [], timeout_s)
        return stdout.readline().decode() if ready else ""

    def poll(self, timeout_s: float = 0.0) -> int | None:
        """The exit status (negative: the signal) if the command ended within `timeout_s`, else None."""
        if self._status is None:
            line = self._line(timeout_s)
            if line:
                self._status = int(line.split()[1])
        return self._status

    def wait(self, timeout_s: float) -> int:
        """The exit status; AssertionError when the command still runs after `timeout_s`."""
        status = self.poll(timeout_s)
        assert status is not None, f"process {self.pid} still runs after {timeout_s:g} s"
        return status

    def signal(self, signum: int) -> None:
        """Sends a signal to the command, unless it has ended."""
        # Until close(), its pid cannot be anybody else's: the supervisor keeps the zombie.
        if self.poll() is None:
            os.kill(self.pid, signum)

    def close(self, *, keep_folder: bool = False) -> None:
        """Returns when the command, its process group and the folder are gone. Idempotent."""
        stdin = self._supervisor.stdin
        if keep_folder and stdin is not None and not stdin.closed:
            stdin.write(b"keep")
        for pipe in (self._supervisor.stdin, self._supervisor.stdout):
            if pipe is not None:
                pipe.close()
        self._supervisor.wait(30)


def pid_alive(pid: int) -> bool:
    """Whether a process with this pid runs; a zombie does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in ("Z", "X")


def pause_process(pid: int) -> None:
    """SIGSTOP; returns when no thread of this process runs any more, a zombie's neither. SIGCONT ends it.

    The signal stops the thread that takes it; on a busy machine the others can run, and answer, for some time yet.
    """
    os.kill(pid, signal.SIGSTOP)

    def stopped() -> bool:
        states = []
        for stat in Path(f"/proc/{pid}/task").glob("*/stat"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                states.append(stat.read_text().rpartition(")")[2].split()[0])
        return all(state in ("T", "t", "Z", "X") for state in states)

    wait_until(stopped, what=f"every thread of process {pid} is stopped")


def child_pids(pid: int) -> list[int]:
    """The pids of the running direct children of `pid`."""
    children = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            if int(parent) == pid and state not in ("Z", "X"):
                children.append(int(stat.parent.name))
    return children


def wait_gone(pids: list[int], deadline_s: float = 30.0) -> None:
    """Returns when none of these processes runs any more."""
    wait_until(lambda: not any(map(pid_alive, pids)), deadline_s, f"the end of processes {pids}")


def script_env(extra: dict[str, str] | None = None) -> dict[str, str]:
    """The environment of a child interpreter: this one's, with `support` importable, without DBSESSION_*."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("DBSESSION_")}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(TESTS), env.get("PYTHONPATH", "")]))
    return env | (extra or {})


def run_python(
    source: str, *args: object, timeout: float = 120.0, env: dict[str, str] | None = None, status: int = 0
) -> subprocess.CompletedProcess[str]:
    """Runs `source` in a fresh interpreter, where warnings are errors; returns when it has ended.

    Patched, late patched and unpatched gevent cannot share one process, so a test of each has its own.

    Args:
        source: the script; indented as the test is.
        args: its `sys.argv[1:]`.
        timeout: seconds, after which it is killed, with its stacks dumped just before.
        env: added to this process's environment (see `script_env`).
        status: the exit status it has to end with.
    """
    with tempfile.TemporaryDirectory(prefix="dbs-") as folder:
        script = Path(folder, "script.py")  # a file, so that tracebacks show the lines
        script.write_text(textwrap.dedent(source))
        command = [sys.executable, "-W", "error", str(script), *map(str, args)]
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # PYTHONFAULTHANDLER: SIGABRT then shows where it hung.
            env=script_env({"PYTHONFAULTHANDLER": "1", **(env or {})}),
            # What it started may outlive it: the group is ended as one, below.
            start_new_session=True,
        )
        timed_out = False
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            timed_out = True
            process.send_signal(signal.SIGABRT)
            # Not by communicate(): a grandchild with the same pipes would keep that waiting.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            out = err = ""
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if timed_out or process.returncode is None:
                out, err = process.communicate()
        shown = f"--- stdout\n{out}\n--- stderr\n{err}"
        assert not timed_out, f"the script did not end within {timeout:g} s\n{shown}"
        assert process.returncode == status, f"exit status {process.returncode}, expected {status}\n{shown}"
        return subprocess.CompletedProcess(command, process.returncode, out, err)


def run_script(
    mode: str, source: str, *args: object, timeout: float = 120.0, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """`run_python` after `from support.prelude import *` in one of MODES; see `prelude` for the names.

    patched: monkey.patch_all() before dbsession is imported; late: after it, as under `gunicorn --preload`;
    threads: never.
    """
    assert mode in MODES, mode
    return run_python(
        "from support.prelude import *\n" + textwrap.dedent(source),
        *args,
        timeout=timeout,
        env={"DBSESSION_TEST_MODE": mode, **(env or {})},
    )
