"""The folder of the inspection sockets: <pid>.sock for each process that serves its snapshot."""

from __future__ import annotations

import argparse
import os
import re
import socket
import stat
from contextlib import suppress
from pathlib import Path

from dbsession.errors import ConfigError

VARIABLE = "DBSESSION_INSPECT"
"""The environment variable that names it."""

UNNAMED = (
    f"Set {VARIABLE} to the folder of the inspection sockets, the same as for the workers, or name it with --folder."
)
"""What a command says that knows of none."""

PATH_BYTES = 107  # of a Unix socket's name, on Linux
LONGEST_NAME = "4194304.sock.new"  # Linux's largest pid


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
    most = PATH_BYTES - len(LONGEST_NAME) - 1
    if len(os.fsencode(path)) > most:
        raise ConfigError(
            f"The folder for inspection sockets, {str(path)!r}, has a name of {len(os.fsencode(path))} bytes; a Unix "
            f"socket's leaves it {most}. Choose a shorter one, such as /run/<name of the service>."
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            path.mkdir(0o700)
        found = path.lstat()
    except OSError as error:
        raise _unusable(path, error.strerror) from error
    if not stat.S_ISDIR(found.st_mode):
        raise _unusable(path, "it is there, and is no folder (nor may it be a symbolic link to one)")
    if found.st_uid != os.geteuid():
        raise _unusable(path, f"it belongs to the user number {found.st_uid} and this process is {os.geteuid()}")
    if found.st_mode & 0o077:
        raise ConfigError(
            f"The folder for inspection sockets, {str(path)!r}, has mode {stat.S_IMODE(found.st_mode):04o}: others "
            f"could reach what is in it. Say `chmod 0700 {path}`, or name a folder that does not exist yet."
        )
    return path


def sockets(folder: str | os.PathLike[str]) -> list[tuple[int, Path]]:
    """(pid, path) of each socket in the folder, by pid; none where there is no folder (yet).

    Raises:
        ConfigError: [DBS-CONFIG] it cannot be read.
    """
    try:
        paths = list(Path(folder).iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _unusable(Path(folder), error.strerror) from error
    found = [(int(path.name.removesuffix(".sock")), path) for path in paths if re.fullmatch(r"\d+\.sock", path.name)]
    return sorted(each for each in found if each[1].is_socket())


def connect(path: Path) -> socket.socket | None:
    """A connection to a process's socket, not blocking; None where nobody listens any more, and the socket is removed.

    Raises:
        OSError: somebody may listen, and did not take the connection.
    """
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.setblocking(False)  # a Unix socket connects at once or not at all
        connection.connect(str(path))
    except ConnectionRefusedError:  # said by the kernel: whoever bound it is gone
        connection.close()
        path.unlink(missing_ok=True)
        return None
    except FileNotFoundError:
        connection.close()
        return None
    except BaseException:
        connection.close()
        raise
    return connection


def remove_stale(folder: Path) -> None:
    """Remove the sockets of processes that are gone."""
    for _, path in sockets(folder):
        with suppress(OSError):
            connection = connect(path)
            if connection is not None:
                connection.close()


def _unusable(path: Path, reason: str | None) -> ConfigError:
    return ConfigError(
        f"The folder for inspection sockets, {str(path)!r}, cannot be used: {reason}. Name one in {VARIABLE} that this "
        "user may make, or owns with mode 0700."
    )
