"""The command `openwork inspect`: what a compressed file holds, from its header alone."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from openwork.cli.source import check_finished
from openwork.files.checkpoint import Entry, describe
from openwork.utils.counted import counted
from openwork.utils.table import aligned


def inspect(words: Sequence[str]) -> int:
    """List the tensors of a file of ow.save (or of a folder with one, as a run directory is), from its header alone."""
    parser = argparse.ArgumentParser("openwork inspect", description=inspect.__doc__)
    parser.add_argument("file", metavar="FILE")
    file = parser.parse_args(words).file
    check_finished(Path(file))
    print(file_table(describe(file)))
    return 0


def file_table(entries: Sequence[Entry]) -> str:
    """The tensors of a compressed file, the sparse ones first, and how many of them are sparse."""
    header = ("tensor", "shape", "dtype", "pattern", "density", "bytes")
    entries = sorted(entries, key=lambda entry: not _is_sparse(entry))
    sparse = sum(map(_is_sparse, entries))
    size = sum(entry.bytes for entry in entries)
    summary = f"{sparse} of {counted(len(entries), 'tensor')} sparse, {size:,} bytes of tensors"
    return "\n".join([*aligned(header, [_cells(entry) for entry in entries]), summary])


def _is_sparse(entry: Entry) -> bool:
    return entry.pattern is not None and not entry.pattern.is_dense


def _cells(entry: Entry) -> tuple[str, ...]:
    shape = "x".join(map(str, entry.shape)) or "scalar"
    pattern = f"= {entry.alias_of}" if entry.alias_of else str(entry.pattern or "dense")
    dtype = str(entry.dtype).removeprefix("torch.")
    return entry.name, shape, dtype, pattern, f"{entry.density:.3f}", f"{entry.bytes:,}"
