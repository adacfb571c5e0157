"""Write files that are whole at every moment: the old one or the new one, whatever happens, with the usual mode.

Beside it, what opens plain files alone for reading."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_file(path: str | os.PathLike[str], suffix: str = ".part") -> Iterator[Path]:
    """A temporary file beside `path` to write to, empty at first. At the end it is flushed to the disk and renamed to
    `path`; an error deletes it. A process that is killed leaves it, a hidden file
    with that suffix, which may be deleted.

    Links are followed: what they lead to is replaced, or made. A file that is there gives its mode to the new one; any
    other gets the usual mode (0o666 less the umask), whatever mode the writer would give it. Raises OSError that names
    `path`, also where the disk is full, and for what is no plain file: a device, a pipe, a socket, a folder.
    """
    with _naming(path):
        target, former = _target(path)
    part = target.with_name(f".{secrets.token_hex(8)}{suffix}")
    with _naming(path, part):
        # Not readable by others before the end, where the file that is replaced is not.
        create = 0o666 if former is None else former.st_mode & 0o666 | 0o600
        os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, create))
        usual = part.stat()
        try:
            yield part
            _give(part, former or usual)  # a writer may have made it anew
            sync(part)
            os.replace(part, target)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    if os.name == "posix":
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself
        finally:
            os.close(folder)


def open_plain(path: str | os.PathLike[str]) -> BinaryIO:
    """A plain file, open for reading. Raises ValueError for what cannot be read from any place at any time, such as a
    named pipe, where opening alone could wait without end."""
    number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if what := special_file(os.fstat(number).st_mode):
        os.close(number)
        raise ValueError(f"it is {what}; needed a plain file, whose parts can be read in any order: copy it to one")
    return os.fdopen(number, "rb")


def special_file(mode: int) -> str:
    """What a file of `st_mode` is that is no plain file; nothing for a plain one.

    >>> special_file(os.stat(".").st_mode)
    'a folder'
    """
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
    }
    return "" if stat.S_ISREG(mode) else kinds.get(stat.S_IFMT(mode), "no plain file")


def _target(path: str | os.PathLike[str]) -> tuple[Path, os.stat_result | None]:
    """Where a path leads, and what the file that is there is like. Raises OSError where no file can be written."""
    text = os.fsdecode(path)
    if not text:
        raise FileNotFoundError(errno.ENOENT, "needed the name of a file, found an empty one")
    target = Path(os.path.realpath(text))
    try:
        former = os.stat(text)
    except FileNotFoundError:
        if not target.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, "there is no such folder to write to", str(target.parent)) from None
        if text.endswith(tuple(filter(None, (os.sep, os.altsep)))):
            raise IsADirectoryError(errno.EISDIR, "needed the name of a file, without a slash at its end") from None
        return target, None
    if what := special_file(former.st_mode):
        number = errno.EISDIR if stat.S_ISDIR(former.st_mode) else errno.EINVAL
        raise OSError(number, f"it is {what}; needed a plain file, or the name of a new one")
    return target, former


def _give(part: Path, like: os.stat_result) -> None:
    """Give a file the mode of another and, where that is allowed, its owner and group."""
    mine = part.stat()
    if (mine.st_uid, mine.st_gid) != (like.st_uid, like.st_gid) and hasattr(os, "chown"):
        with suppress(PermissionError):
            os.chown(part, like.st_uid, like.st_gid)
    part.chmod(stat.S_IMODE(like.st_mode))


@contextmanager
def _naming(path: str | os.PathLike[str], part: Path | None = None) -> Iterator[None]:
    """Errors of the system that name no file, or the temporary one, name `path`."""
    try:
        yield
    except OSError as error:
        if error.errno is None or (error.filename is not None and error.filename not in (part, str(part))):
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file atomically, in UTF-8."""
    with atomic_file(path) as part:
        part.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Flush the contents of a file to the disk."""
    with open(path, "r+b") as file:
        os.fsync(file.fileno())


@contextmanager
def usual_modes(folder: Path, pattern: str) -> Iterator[None]:
    """Files of a folder that match a glob and are written meanwhile keep the mode that they had; new ones get that of
    any new file. (safetensors writes with mode 0600.)"""
    before = {file: file.stat().st_mode for file in folder.glob(pattern)}
    yield
    probe = folder / f".{secrets.token_hex(8)}.part"
    probe.touch(exist_ok=False)
    usual = probe.stat().st_mode
    probe.unlink()
    for file in folder.glob(pattern):
        file.chmod(stat.S_IMODE(before.get(file, usual)))
