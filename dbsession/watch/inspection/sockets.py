"""The folder of the inspection sockets: <pid>.sock for each process that serves its snapshot."""

from __future__ import annotations

import argparse
import os
import re
import socket
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

from dbsession.errors import ConfigError

VARIABLE = "DBSESSION_INSPECT"
"""The environment variable that names it."""

UNNAMED = (
    f"Set {VARIABLE} to the folder of the inspection sockets, the same as for the workers, or name it with --folder."
)
"""What a command says that knows of none."""

PATH_BYTES = 107  # of a Unix socket's name, on Linux
DASHBOARD = "dashboard.sock"
LONGEST_NAME = f"{DASHBOARD}.new"  # longer than that of Linux's largest pid


def add_option(parser: argparse.ArgumentParser) -> None:
    """Add `--folder`, whose default is the environment's ("" where it names none)."""
    parser.add_argument(
        "--folder",
        metavar="DIR",
        default=os.environ.get(VARIABLE, "").strip(),
        help=f"where the workers' inspection sockets are (default: ${VARIABLE})",
    )


def make(folder: str | os.PathLike[str]) -> Path:
    """The folder, made with mode 0700 where there was none.

    Raises:
        ConfigError: [DBS-CONFIG] it cannot be made, its name is too long, or others might look into it.
    """
    path = Path(os.path.abspath(folder))
    _check_length(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            path.mkdir(0o700)
    except OSError as error:
        raise _unusable(path, error.strerror) from error
    return closed(path)


def _check_length(path: Path) -> None:
    most = PATH_BYTES - len(LONGEST_NAME) - 1
    if len(os.fsencode(path)) > most:
        raise ConfigError(
            f"The folder for inspection sockets, {str(path)!r}, has a name of {len(os.fsencode(path))} bytes; a Unix "
            f"socket's leaves it {most}. Choose a shorter one, such as /run/<name of the service>."
        )


def closed(path: Path, anybodys: bool = False) -> Path:
    """The folder, in which a socket may be made, because others do not get in.

    Args:
        anybodys: it may belong to another user.

    Raises:
        ConfigError: [DBS-CONFIG] its name is too long, or others might look into it.
    """
    _check_length(path)
    try:
        found = path.lstat()
    except OSError as error:
        raise _unusable(path, error.strerror) from error
    if not stat.S_ISDIR(found.st_mode):
        raise _unusable(path, "it is there, and is no folder (nor may it be a symbolic link to one)")
    if not anybodys and found.st_uid != os.geteuid():
        raise _unusable(path, f"it belongs to the user number {found.st_uid} and this process is {os.geteuid()}")
    if found.st_mode & 0o077:
        raise ConfigError(
            f"The folder for inspection sockets, {str(path)!r}, has mode {stat.S_IMODE(found.st_mode):04o}: others "
            f"could reach what is in it. Say `chmod 0700 {path}`, or name a folder that does not exist yet."
        )
    return path


def sockets(folder: str | os.PathLike[str]) -> list[tuple[int, Path]]:
    """(pid, path) of what is named as a process's socket, by pid; none where there is no folder (yet).

    Raises:
        ConfigError: [DBS-CONFIG] it cannot be read.
    """
    try:
        paths = list(Path(folder).iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _unusable(Path(folder), error.strerror) from error
    return sorted((int(path.stem), path) for path in paths if re.fullmatch(r"[1-9][0-9]{0,8}\.sock", path.name))


class NoSocketOfOurs(Exception):
    """What stands where a process's socket should be. Its text says what it is."""


def connect(path: Path) -> socket.socket | None:
    """A connection to a process's socket, not blocking; None where nobody listens any more, and the socket is removed.

    Raises:
        NoSocketOfOurs: it is no socket, or of a user who is neither root nor has the folder.
        OSError: somebody may listen, and did not take the connection.
    """
    try:
        found, owner = path.lstat(), path.parent.stat().st_uid
    except FileNotFoundError:
        return None
    if not stat.S_ISSOCK(found.st_mode):
        raise NoSocketOfOurs("there is no socket, but something else of its name")
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.setblocking(False)  # a Unix socket connects at once or not at all
        connection.connect(str(path))
        failed = None
    except OSError as error:
        failed = error
    if failed is None and found.st_uid in (owner, 0):
        return connection
    connection.close()
    if isinstance(failed, ConnectionRefusedError):  # said by the kernel: whoever bound it is gone
        path.unlink(missing_ok=True)
    elif found.st_uid not in (owner, 0):
        raise NoSocketOfOurs(f"its socket belongs to the user number {found.st_uid}, the folder to {owner}")
    elif failed is not None and not isinstance(failed, FileNotFoundError):
        raise failed
    return None


def listen(path: Path, kind: type[Any]) -> Any:
    """A listening socket of `kind` at `path`, complete and of mode 0600 from the moment it can be seen there: who finds
    one that refuses takes it for a dead process's.

    Raises:
        ConfigError: [DBS-CONFIG] it cannot be made.
    """
    listener = kind(socket.AF_UNIX)
    unfinished = path.with_name(path.name + ".new")
    try:
        unfinished.unlink(missing_ok=True)
        # Before it has a name: chmod() of a name would follow a link that stands there meanwhile.
        os.fchmod(listener.fileno(), 0o600)
        listener.bind(str(unfinished))
        listener.listen()
        unfinished.rename(path)
    except OSError as error:
        listener.close()
        raise ConfigError(f"The socket {str(path)!r} cannot be made: {error.strerror}.") from error
    return listener


def remove_stale(folder: Path) -> None:
    """Remove the sockets of processes that are gone."""
    for _, path in sockets(folder):
        with suppress(OSError, NoSocketOfOurs):
            connection = connect(path)
            if connection is not None:
                connection.close()


def _unusable(path: Path, reason: str | None) -> ConfigError:
    return ConfigError(
        f"The folder for inspection sockets, {str(path)!r}, cannot be used: {reason}. Name one in {VARIABLE} that this "
        "user may make, or owns with mode 0700."
    )
