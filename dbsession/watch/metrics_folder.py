"""The folder in which the workers of one gunicorn put their metrics for each other.

It is that of prometheus_client's multiprocess mode, which reads PROMETHEUS_MULTIPROC_DIR at its import. So this module
imports nothing of it, and its `prepare()` runs before anything else does: when gunicorn's configuration file imports
the hooks.
"""

from __future__ import annotations

import atexit
import importlib
import importlib.util
import json
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Collection
from contextlib import suppress
from typing import Any

from dbsession.errors import describe, to_install

logger = logging.getLogger("dbsession.watch.metrics_folder")

PATH = "DBSESSION_METRICS"
FOLDER = "PROMETHEUS_MULTIPROC_DIR"

_FILE = re.compile(r"(?:counter|histogram|summary|gauge_[a-z]+)_([0-9]+)\.db")
"""What prometheus_client calls its files there: the kind, the process. It is no other `.db` that is removed."""

# The kinds of files that our own metrics are in, with how many values of one database, and the most bytes that such a
# value takes besides the database's name.
_VALUES = {"counter": 7, "histogram": 36, "gauge_livesum": 5, "gauge_livemax": 1}
_VALUE_BYTES = 300

_owner = 0  # the process that removes the folder at its end, if it was made here


def path() -> str | None:
    """The path that the environment opts in to; None: off."""
    return os.environ.get(PATH) or None


def folder() -> str | None:
    """The shared folder; None: this process is alone."""
    return os.environ.get(FOLDER) or None


def prepare() -> None:
    """Make the folder, where metrics are on, before anything imports prometheus_client. What is wrong is logged, and
    leaves them off: a server that answers and cannot be watched is better than none."""
    wrong = _make() if path() else None
    if wrong:
        logger.warning("DBSESSION_METRICS is ignored, there are no metrics: %s", wrong)
        del os.environ[PATH]


def _make() -> str | None:
    """Make the folder; return what is wrong, if anything is."""
    global _owner
    if not (path() or "").startswith("/"):
        return "it must be a path that begins with '/', such as /metrics."
    if importlib.util.find_spec("prometheus_client") is None:
        return f"prometheus_client is not installed: {to_install('metrics')}."
    if folder() is None and "prometheus_client" in sys.modules:
        return "prometheus_client was imported already: import dbsession.gunicorn_hooks before it."
    try:
        named = folder()
        if named is not None:
            os.makedirs(named, mode=0o700, exist_ok=True)
        else:
            made = os.environ[FOLDER] = tempfile.mkdtemp(prefix="dbsession-metrics-")  # of mode 0700
            _owner = os.getpid()
            atexit.register(_remove, made)
    except OSError as error:
        return f"the folder of PROMETHEUS_MULTIPROC_DIR cannot be made ({describe(error)})."
    return None


def begin(master: Any) -> None:
    """Empty the folder, in gunicorn's master before its workers, of what an earlier one has left. Not in the second
    master of a SIGUSR2: if the environment names the folder, the first one's workers count on in it."""
    global _owner
    _owner = os.getpid()  # gunicorn's `daemon` has forked since prepare()
    if path() and not master.master_pid:
        try:
            for file in os.scandir(folder()):
                found = _FILE.fullmatch(file.name)
                if found and int(found[1]) != os.getpid():  # those are of an application that was preloaded
                    os.remove(file)
        except OSError as error:
            logger.warning("The metrics of an earlier run could not be removed: %s.", describe(error))


def reserve(databases: Collection[str]) -> None:
    """Make this process's files, with room on the disk for the metrics of these databases. prometheus_client maps them
    into memory, and only makes them long: where the disk is full, its first write would kill the process (SIGBUS).

    Raises:
        OSError: there is no room, or no folder. No file is left half made.
    """
    for kind, values in _VALUES.items():
        needed = values * sum(_VALUE_BYTES + len(json.dumps(name)) for name in databases)
        count = 1 << max(12, needed.bit_length())  # it doubles them, too
        path = os.path.join(folder() or "", f"{kind}_{os.getpid()}.db")
        if os.path.exists(path):
            _allocate(path, max(count, os.path.getsize(path)))
            continue
        try:
            _allocate(path + ".new", count)
            os.rename(path + ".new", path)
        except OSError:
            with suppress(OSError):
                os.remove(path + ".new")
            raise


def _allocate(path: str, count: int) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        if sys.platform != "darwin":  # which cannot
            os.posix_fallocate(descriptor, 0, count)
    finally:
        os.close(descriptor)


def forget(pid: int) -> None:
    """Remove the gauges of a worker that has ended, in gunicorn's master. Its counts stay."""
    if path():
        multiprocess: Any = importlib.import_module("prometheus_client.multiprocess")
        multiprocess.mark_process_dead(pid)


def _remove(made: str) -> None:
    """Remove the folder at the end of the master, and not of its workers, which have inherited this."""
    if os.getpid() == _owner:
        shutil.rmtree(made, ignore_errors=True)
