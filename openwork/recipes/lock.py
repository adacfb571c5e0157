"""One process at a time writes to a folder."""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from openwork.utils.caller import outside

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FILE = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Inside, no other process is; FileExistsError names the one that is. The folder is made.

    A POSIX lock of the file `.lock`: the kernel frees it whenever and however its process ends, and processes that
    are forked to load data do not hold it. The file stays, and means nothing by itself. Where a file system has no
    locks (some NFS), a warning says so; on Windows nothing is locked.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / FILE).open("a+", encoding="utf-8") as file:
        file.seek(0)
        owner, here = file.read(200).strip(), _name(os.getpid())
        if not _lock(file.fileno(), folder) or owner == here:  # POSIX locks let a process in twice
            raise FileExistsError(
                f"{folder} is in use by {owner or 'another process'}, which writes to it; wait for its end, end it, "
                "or choose another --out"
            )
        file.truncate(0)
        file.write(here)
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def _lock(descriptor: int, folder: Path) -> bool:
    """Whether this process has the lock now, or nobody can have one."""
    if fcntl is None:
        return True
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        warnings.warn(
            f"{folder} is on a file system without locks ({error}): make sure that no other process writes to it",
            stacklevel=outside(),
        )
    return True


def _name(process: int) -> str:
    return f"process {process} on {socket.gethostname()}"
