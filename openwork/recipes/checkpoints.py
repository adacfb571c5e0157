"""The checkpoints of a run: the last and the one before, each with its checksum, so that a flipped bit is found.

`checkpoints/checksums` has a line for each checkpoint: its SHA-256 and its step. It is written before a checkpoint gets
its name, and keeps the lines of those that it replaces: whenever a run is killed, what lies there is listed.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from openwork.utils import atomic

_LINES = 3  # the new checkpoint and the two that may be there


@dataclass(frozen=True)
class Checkpoints:
    """last.ckpt and previous.ckpt in a folder, which both are whole at every moment."""

    folder: Path

    last = property(lambda self: self.folder / "last.ckpt")
    previous = property(lambda self: self.folder / "previous.ckpt")
    checksums = property(lambda self: self.folder / "checksums")
    draft = property(lambda self: self.folder / "last.part")

    def commit(self, step: int) -> None:
        """Make the draft the last checkpoint, that of `step`, and the last one the previous."""
        known = list(self._steps().items())[1 - _LINES :]
        lines = [*known, (checksum(self.draft), step)]
        atomic.sync(self.draft)
        atomic.write_text(self.checksums, "".join(f"{digest} {number}\n" for digest, number in lines))
        if self.last.exists():
            os.replace(self.last, self.previous)
        os.replace(self.draft, self.last)

    def newest(self) -> tuple[Path, int | None] | None:
        """The checkpoint to go on from and its step, None where it is not told; None where there is none.

        ValueError where it is damaged, which says whether the one before it is whole.
        """
        path = next((path for path in (self.last, self.previous) if path.exists()), None)
        if path is None:
            return None
        fault = self._fault(path)
        if not fault:
            return path, self._steps().get(checksum(path))
        advice = "remove it to start this run anew"
        if path == self.last and self.previous.exists() and not self._fault(self.previous):
            step = self._steps().get(checksum(self.previous))
            place = "" if step is None else f" (step {step})"
            advice = f"{self.previous}{place} is whole: remove {path.name}, and --resume goes on from there"
        raise ValueError(f"{path} is damaged: {fault}; {advice}")

    def _fault(self, path: Path) -> str:
        """What is wrong with a checkpoint; "" where it is as it was written."""
        if path.stat().st_size == 0:
            return "it is empty"
        known = self._steps()
        if known:
            found = checksum(path)
            return "" if found in known else f"its SHA-256, {found[:16]}..., is not the one it was written with"
        try:  # without a list, as of an older version: torch.save writes a checksum of each record, and reads none
            with zipfile.ZipFile(path) as archive:
                bad = archive.testzip()
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError, ValueError) as error:
            return f"it cannot be read ({error})"
        return f"the checksum of its record {bad} is wrong" if bad else ""

    def _steps(self) -> Mapping[str, int]:
        """SHA-256 -> step of the checkpoints written last, the newest last. Lines that are damaged are left out."""
        if not self.checksums.exists():
            return {}
        pairs = (line.split() for line in self.checksums.read_text(encoding="utf-8", errors="replace").splitlines())
        return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
