"""Write files that are whole at every moment: the old one or the new one, whatever happens, with the usual mode."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_file(path: str | os.PathLike[str], suffix: str = ".part") -> Iterator[Path]:
    """A temporary file beside `path` to write to, empty at first. At the end it is flushed to the disk and renamed to
    `path`; an error deletes it. A process that is killed leaves it, a hidden file
    with that suffix, which may be deleted.

    Its mode is that of any new file (0o666 less the umask), whatever mode the writer would give it.
    """
    target = Path(os.path.realpath(path))
    part = target.with_name(f".{secrets.token_hex(8)}{suffix}")
    part.touch(exist_ok=False)
    mode = part.stat().st_mode
    try:
        yield part
        part.chmod(mode)  # a writer may have made it anew
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


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file atomically, in UTF-8."""
    with atomic_file(path) as part:
        part.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Flush the contents of a file to the disk."""
    with open(path, "r+b") as file:
        os.fsync(file.fileno())


def give_usual_mode(folder: Path, pattern: str) -> None:
    """Give the files of a folder that match a glob the mode of any new file. (safetensors writes with mode 0600.)"""
    probe = folder / f".{secrets.token_hex(8)}.part"
    probe.touch(exist_ok=False)
    mode = probe.stat().st_mode
    probe.unlink()
    for file in folder.glob(pattern):
        file.chmod(mode)
