"""Instructions, counted by valgrind's callgrind: exact, whatever else the machine does. User mode only, no kernel.

A child process calls `start()` when it has warmed up, and `mark()` wherever it has ended one thing and begins another;
`count()` runs it and returns what was executed between each two marks. From `start()` on everything is some fifty times
slower, before it some ten times.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# A function of the C library that nothing else calls, and that Python calls by its name.
_MARK = "getpriority"
_TOOL = "BENCH_CALLGRIND"

at_once = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
"""Children in parallel, one on each CPU: their figures do not depend on how busy it is."""


def available() -> bool:
    return shutil.which("valgrind") is not None


def start() -> None:
    """Begin to count, in a process that `count()` runs; does nothing in any other."""
    if _TOOL not in os.environ:
        return
    command = ["vgdb", f"--pid={os.getpid()}", "instrumentation", "on"]
    subprocess.run(command, check=True, capture_output=True, timeout=60)


def mark() -> None:
    os.getpriority(os.PRIO_PROCESS, 0)


def count(module: str, *arguments: str, timeout_s: float = 900) -> tuple[str, list[int]]:
    """Run `python -m module arguments...`: what it printed, and the instructions between its marks."""
    with tempfile.TemporaryDirectory(prefix="dbs-") as folder:
        command = ["valgrind", "--quiet", "--tool=callgrind", f"--dump-before={_MARK}"]
        command += ["--instr-atstart=no"]
        command += [f"--callgrind-out-file={folder}/out", sys.executable, "-m", module, *arguments]
        done = run(command, timeout_s, {_TOOL: "yes"})
        # out.1 is what came before the first mark, out.2 before the second; `out` is what came after the last.
        dumps = sorted(Path(folder).glob("out.*"), key=lambda path: int(path.suffix[1:]))
        totals = [re.search(r"^totals: (\d+)", path.read_text(), re.M) for path in dumps[1:]]
        return done, [int(total[1]) for total in totals if total]


def run(command: Sequence[str], timeout_s: float, more: Mapping[str, str] = {}) -> str:
    """What a child prints. Its hashes are those of every other run, so sets and dicts are gone through alike."""
    environment = os.environ | {"PYTHONHASHSEED": "0", **more}
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout
